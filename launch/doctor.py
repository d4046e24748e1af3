"""The command `lockstep doctor`: examines a data set, this machine, or both for a recipe."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.command_line import Parser, counted, say
from data_pipeline.doctor_command import diagnose, doctor_parser
from data_pipeline.findings import HURTS
from launch.machine import Machine, look_around
from launch.machine_findings import GIB, KINDS, MachineFinding, judge
from training.command import Request, read_request

RUNS = Path("runs")


def doctor(argv: list[str]) -> int:
    """Find everything that would waste a run, 1 if anything would: `lockstep doctor`."""
    options = _parser().parse(argv)
    if options.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    request = None if options.config is None else read_request(["--config", options.config])
    dataset, processes, batch = options.dataset, options.processes, options.global_batch
    if request is not None:
        dataset = dataset or _dataset_of(request)
        batch = batch or request.config.train.global_batch
    content: dict[str, Any] = {}
    hurts = 0
    if options.dataset is None or request is not None:
        machine = look_around(request.run_dir if request else RUNS)
        processes = processes or max(1, len(machine.torch.gpus))
        found = judge(machine, request.config if request else None, processes)
        hurts = sum(one.kind.severity == HURTS for one in found)
        content = {"machine": _content_of(machine, found)}
        if not options.json:
            _print(_machine_lines(machine, found))
    if dataset is not None:
        began = time.monotonic()
        diagnosis = diagnose(options, dataset, processes=processes, global_batch=batch)
        from data_pipeline.doctor_report import content_of, report_lines

        hurts += diagnosis.hurts
        content = {**content_of(diagnosis), **content}
        if not options.json:
            _print(report_lines(diagnosis, width=_width(), seconds=time.monotonic() - began))
    if options.json:
        say(json.dumps(content, ensure_ascii=False))
    return 1 if hurts else 0


def _parser() -> Parser:
    parser = doctor_parser()
    parser.add_argument("--config", metavar="RECIPE|FILE", help="examine this machine and the data for it")
    parser.add_argument("--cpu", action="store_true", help="use no GPU, also where there are some")
    return parser


def _dataset_of(request: Request) -> str | None:
    """The data set of a configuration; None where it is the embedded one, and the first start makes it."""
    data = request.config.data
    made = data.root == data.location or (Path(data.location) / "dataset.json").exists()
    return data.location if made else None


def _machine_lines(machine: Machine, found: list[MachineFinding]) -> Iterator[str]:
    from data_pipeline.doctor_report import finding_lines, sum_of

    torch, place = machine.torch, machine.place
    words = [counted(machine.cores, "core"), f"{machine.memory / GIB:.1f} GiB of memory free"]
    words.append(counted(len(torch.gpus), "GPU") if torch.gpus else "no GPU")
    words += dict.fromkeys(gpu.name for gpu in torch.gpus)
    yield f"machine   {', '.join(words)}"
    if not torch.trouble:
        yield f"torch     {torch.version}, built for {torch.built_for or 'CPUs'}"
    if not place.trouble:
        room = f"{place.free / GIB:.1f} GiB free, {place.rate / 1e6:.0f} MB a second"
        yield f"runs      {str(place.folder)!r}: {room}"
    yield ""
    yield from finding_lines(found, KINDS, width=_width())
    yield f"this machine: {sum_of(found)}"


def _content_of(machine: Machine, found: list[MachineFinding]) -> dict[str, Any]:
    facts = {
        **machine._asdict(),
        "torch": {**machine.torch._asdict(), "gpus": [gpu._asdict() for gpu in machine.torch.gpus]},
        "place": {**machine.place._asdict(), "folder": str(machine.place.folder)},
    }
    return {**facts, "findings": [one.as_json() for one in found]}


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        say(line)


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
