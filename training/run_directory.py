"""The folder of a run: opened by one start at a time, resumed by default, never deleted.

config.yaml  metrics.jsonl  checkpoints/  weights/  plots/  failure.json  lock
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_pipeline.disk import fsync_file, replace_file
from data_pipeline.index import DatasetIndex
from training.checkpoints.protocol import (
    checkpoints,
    newest_verified,
    read_state,
    remove_leftovers,
    set_aside,
    step_of,
)
from training.command import Request
from training.config import Config, UserError, changed
from training.exact.machine import check_alike, check_machine, machine_facts
from training.initial_weights import initial_file
from training.process import Ended, agree
from training.state import Progress, check_plan

_locks: list[IO[str]] = []  # held until the process ends, however it ends: the kernel drops them with it


class Start(NamedTuple):
    """What this start of a run goes on from, and what there is to say about it."""

    checkpoint: Path | None
    progress: Progress
    notes: list[str]
    initialised_from: str | None = None  # the file with another run's weights that a new one begins with


def start_run(request: Request, accelerator: Accelerator, dataset: DatasetIndex) -> Start:
    """Open the run directory and choose the checkpoint to go on from; the same answer on every process.

    Process zero decides, the others read the same folder. The newest checkpoint that verifies is taken;
    RESUME where the run was about something else, CONFIG where a process was started with other flags or
    another data set than process zero.
    """
    everyone = gather_object([(request.config.model_dump(mode="json"), dataset.identity())])
    machines = gather_object([machine_facts(accelerator.device)])

    def decide() -> Start:
        _check_same_everywhere(everyone)
        if request.config.train.exact:
            check_alike(machines)
        if request.flags.fresh or not checkpoints(request.run_dir / "checkpoints"):
            initial_file(request)  # what is wrong with it is said before anything is moved or made
        notes = open_run(request)
        checkpoint = _newest(request, notes)
        if checkpoint is None:
            file = initial_file(request)
            notes += _about_weights(request, file)
            return Start(None, Progress(), notes, None if file is None else str(file))
        state = read_state(checkpoint)
        check_plan(state["plan"], request.config, dataset)
        notes += _about_resuming(request, checkpoint)
        notes += check_machine(
            state["made_by"],
            machines[0],
            exact=request.config.train.exact,
            allowed=request.flags.allow_config_change,
        )
        return Start(checkpoint, Progress.from_json(state["progress"]), notes)

    return agree(accelerator, decide)


def _newest(request: Request, notes: list[str]) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all, RESUME where none is whole.

    Newer ones that are damaged are set aside, and `notes` hears of it.
    """
    folder, faults = request.run_dir / "checkpoints", list[str]()
    checkpoint = newest_verified(folder, say=faults.append)
    if checkpoint is None and faults:
        raise UserError(
            "\n".join([f"'{folder}' has no checkpoint to go on from, though it has had some", *faults]),
            mend="put a whole one back there, or start anew: --fresh",
            code="RESUME",
        )
    notes += faults
    for path in checkpoints(folder):
        if checkpoint is not None and step_of(path) > step_of(checkpoint):
            notes.append(f"the damaged one is kept as {set_aside(path, f'aside-{path.name}.')}")
    return checkpoint


def _about_weights(request: Request, file: Path | None) -> list[str]:
    if file is None:
        return []
    notes = [f"weights from {file} (a new run: not the same as resuming it)"]
    if request.config.model.pretrained:
        notes.append("--init-from goes before model.pretrained, which is not read")
    return notes


def _about_resuming(request: Request, checkpoint: Path) -> list[str]:
    notes = []
    if request.flags.init_from:
        notes.append(f"--init-from is not read: this run goes on from its own {checkpoint.name}")
    return notes


def _check_same_everywhere(everyone: list[tuple[dict[str, Any], str]]) -> None:
    """CONFIG where a process was started with other flags or data than process zero."""
    (zero, data), *others = everyone
    differences = []
    for rank, (config, its_data) in enumerate(others, 1):
        lines = changed(zero, Config.model_validate(config))
        lines += ["it has another data set"] if its_data != data else []
        differences += [f"process {rank} differs from process 0: {line}" for line in lines]
    if differences:
        raise UserError(
            "\n".join(differences),
            mend="give every process the same options and the same data set",
            code="CONFIG",
        )


def open_run(request: Request) -> list[str]:
    """Make or take the run directory for this start; what there is to say about it. Process zero only.

    RESUME where another start holds it or the configuration decides differently; nothing is removed.
    """
    run_dir, said = request.run_dir, []
    _lock(run_dir)
    if request.flags.fresh and (run_dir / "config.yaml").exists():
        said.append(f"the old run is now {set_aside(run_dir, f'{run_dir.name}.old-')}")
        _lock(run_dir)
    (run_dir / "failure.json").unlink(missing_ok=True)
    said += _check_unchanged(request)
    text = request.config.as_yaml()
    replace_file(run_dir / "config.yaml", lambda part: part.write_text(text, encoding="utf-8"))
    for name in ("checkpoints", "weights", "plots"):
        (run_dir / name).mkdir(exist_ok=True)
    remove_leftovers(run_dir / "checkpoints")
    fsync_file(run_dir.absolute().parent)
    return said


def _lock(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        what = f"error: --run-dir: cannot write to '{run_dir}': {error.strerror}"
        raise Ended("STORAGE", what, hint="make it writable, or give another folder: --run-dir DIR") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UserError(
            f"'{run_dir}' is in use by {lock.read().strip() or 'another start'}",
            mend="wait for it, stop it, or give another folder: --run-dir DIR",
            code="RESUME",
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.append(lock)


def _check_unchanged(request: Request) -> list[str]:
    run_dir = request.run_dir
    recorded = run_dir / "config.yaml"
    # Before the first checkpoint nothing was learned that another configuration could not fit.
    if not recorded.exists() or not checkpoints(run_dir / "checkpoints"):
        return []
    before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    differences = changed(before, request.config)
    if not differences:
        return []
    if request.flags.allow_config_change:
        return [f"changed as asked for: {line}" for line in differences]
    raise UserError(
        "\n".join(f"'{run_dir}' was started with other values: {line}" for line in differences),
        mend=f"as before: --config {recorded} --run-dir {run_dir}; anew: --fresh; or --allow-config-change",
        code="RESUME",
    )
