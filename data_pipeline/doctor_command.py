"""The command `lockstep doctor`: what it takes, and what it says."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import nullcontext

from data_pipeline.command_line import Parser, progress, say, usable_cores, whole


def doctor(argv: list[str]) -> int:
    """Find everything in a data set that would waste a run, 1 if anything would: `lockstep doctor`."""
    options = _doctor_parser().parse(argv)
    started = time.monotonic()
    from data_pipeline.doctor import examine, sample_count
    from data_pipeline.doctor_report import as_json, report_lines
    from data_pipeline.doctor_splits import Use

    silent = nullcontext(lambda _done: None)
    with silent if options.json else progress("checking", sample_count(options.dataset)) as advance:
        diagnosis = examine(
            options.dataset,
            Use(options.processes, options.global_batch),
            sample=options.sample,
            workers=options.workers,
            progress=advance,
        )
    if options.json:
        say(as_json(diagnosis))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in report_lines(diagnosis, width=width, seconds=time.monotonic() - started):
            say(line)
    return 1 if diagnosis.hurts else 0


def _doctor_parser() -> Parser:
    parser = Parser(
        prog="lockstep doctor",
        description="Find everything in a data set that would waste a training run: damaged files and "
        "samples, wrong labels and masks, doubles, pictures of val in train, classes without samples. "
        "Exit code 1 if anything would hurt.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder or URL of a data set; it is only read")
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
        default=8,
        metavar="N",
        help="that are to train on it, on all nodes together (%(default)s)",
    )
    add(
        "--global-batch",
        type=whole(1, 10**9),
        default=1,
        metavar="N",
        help="samples of a training step, of all processes together; are there enough?",
    )
    return parser
