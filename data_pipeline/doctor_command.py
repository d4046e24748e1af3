"""What `lockstep doctor` takes for a data set, and how it is examined."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING

from data_pipeline.command_line import Parser, progress, usable_cores, whole

if TYPE_CHECKING:
    from data_pipeline.doctor import Diagnosis

PROCESSES = 8  # that are to train, where nobody says


def diagnose(
    options: argparse.Namespace, dataset: str, *, processes: int | None, global_batch: int | None
) -> Diagnosis:
    """Examine a data set for so many processes and samples a step, with a bar on a terminal; DATA."""
    from data_pipeline.doctor import examine, sample_count
    from data_pipeline.doctor_splits import Use

    silent = nullcontext(lambda _done: None)
    with silent if options.json else progress("checking", sample_count(dataset)) as advance:
        return examine(
            dataset,
            Use(processes or PROCESSES, global_batch or 1),
            sample=options.sample,
            workers=options.workers,
            progress=advance,
        )


def doctor_parser() -> Parser:
    """The options for a data set."""
    parser = Parser(
        prog="lockstep doctor",
        description="Find everything that would waste a training run. In a data set: damaged files and "
        "samples, wrong labels and masks, doubles, pictures of val in train, classes without samples. "
        "Without a data set, on this machine: GPUs, cores, memory, the disk of the runs. With --config both, "
        "for that run. Exit code 1 if anything would hurt.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?", help="folder or URL of a data set; it is only read"
    )
    add = parser.add_argument
    add(
        "--sample",
        type=whole(1, 10**12),
        metavar="N",
        help="decode N samples at even distances, not all; checksums and labels are of all",
    )
    add("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    add(
        "--workers",
        type=whole(1, 1024),
        default=usable_cores(),
        metavar="N",
        help="processes that check (%(default)s)",
    )
    add(
        "--processes",
        type=whole(1, 10**6),
        metavar="N",
        help=f"that are to train, on all nodes together ({PROCESSES} on a data set; on this machine one for "
        "each GPU, else one)",
    )
    add(
        "--global-batch",
        type=whole(1, 10**9),
        metavar="N",
        help="samples of a training step, of all processes together; are there enough? (--config's, else 1)",
    )
    return parser
