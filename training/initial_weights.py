"""Where a run's first weights come from, and another run's, taken over whole.

A start looks in this order, and takes the first that there is:

1. The run's own newest checkpoint that verifies, with everything that belongs to it; of newer ones that do
   not verify it says why. The run goes on, and the three below are not looked at.
2. `--init-from`: another run's weights, head and all. Optimizer, schedule and steps begin anew.
3. `model.pretrained`: published weights or a file's, without a head that does not fit.
4. Numbers drawn from the seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.checkpoints.protocol import MANIFEST, verify
from training.checkpoints.weight_copies import MODEL_JSON
from training.command import Request
from training.networks.pretrained import LoadReport
from training.networks.torch_files import read_weights_file
from training.state import AVERAGE_FILE, MODEL_FILE, load_model, shortened

OPTION = "--init-from"
OTHER_HEAD = "use --model.pretrained {file}, which leaves the head out"


def initial_file(request: Request) -> Path | None:
    """The file with the weights that `--init-from` names; None where it names none.

    A run has weights/best or weights/last, a checkpoint the averaged weights or the weights, and anything
    else must be a .safetensors file: otherwise CONFIG. USAGE where `--fresh` would move it away, RESUME where
    the checkpoint is not whole.
    """
    if request.flags.init_from is None:
        return None
    path = Path(request.flags.init_from).expanduser()
    if request.flags.fresh and path.resolve().is_relative_to(request.run_dir.resolve()):
        what = f"{OPTION}: '{path}' is in the run directory that --fresh moves aside"
        raise UserError(what, mend="give the new run a folder of its own: --run-dir DIR", code="USAGE")
    if (path / MANIFEST).is_file():
        if fault := verify(path):
            raise _refused(f"checkpoint '{path}' is not whole ({fault})", "name another checkpoint")
        return next(file for name in (AVERAGE_FILE, MODEL_FILE) if (file := path / name).is_file())
    if path.is_dir():
        return _of_a_run(path, request.flags.weights)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    what = "is no .safetensors file" if path.is_file() else "is not there"
    mend = "name a run's directory, one of its checkpoints, or a .safetensors file"
    raise UserError(f"{OPTION}: '{path}' {what}", mend=mend, code="CONFIG")


def _of_a_run(run_dir: Path, chosen: str) -> Path:
    """`chosen` of a run's weights; where it has no best, because no score was ever defined, the last."""
    found = {path.stem: path for path in sorted((run_dir / "weights").glob("*.safetensors"))}
    for name in (chosen, *(["last"] if chosen == "best" else [])):
        if name in found:
            return found[name]
    if not found:
        what, mend = f"'{run_dir}' holds no weights", "name a run that has made a checkpoint, or a file"
    else:
        what, mend = f"'{run_dir}' has no weights {chosen!r}", f"--weights {' or '.join(found)}"
    raise UserError(f"{OPTION}: {what}", mend=mend, code="CONFIG")


def load_initial(network: torch.nn.Module, file: Path, dataset: DatasetIndex, *, task: str) -> LoadReport:
    """Copy the weights of `file` into `network`, in place, every tensor of it.

    RESUME where they are another network's, were learned for other classes, or are not all finite.
    """
    _check_purpose(file, dataset, task)
    tensors = read_weights_file(file, option=OPTION)
    broken = [
        name for name, one in tensors.items() if one.is_floating_point() and not bool(one.isfinite().all())
    ]
    if broken:
        lines = shortened([f"'{file}' holds numbers that are not finite: {name}" for name in sorted(broken)])
        raise _refused("\n".join(lines), "choose weights from before that training broke down")
    load_model(network, tensors, origin=str(file))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return LoadReport(f"'{file}'", tensors=len(tensors), loaded=len(tensors), parameters=parameters)


def _check_purpose(file: Path, dataset: DatasetIndex, task: str) -> None:
    about = _about(file)
    if about is None:
        return
    before, now = about.get("classes"), list(dataset.classes)
    mend = OTHER_HEAD.format(file=file)
    if about.get("task") != task:
        raise _refused(f"'{file}' was learned for {about.get('task')}, this run is {task}", mend)
    if not isinstance(before, list) or before == now:
        return
    if len(before) != len(now):
        raise _refused(f"'{file}' knows {len(before)} classes, the data set has {len(now)}", mend)
    pairs = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
    lines = [f"'{file}' knows the class {old!r}, where the data set has {new!r}" for old, new in pairs]
    raise _refused("\n".join(shortened(lines)), mend)


def _about(file: Path) -> dict[str, Any] | None:
    """What model.json says of the weights: beside them, or where the run of a checkpoint has it."""
    of_a_checkpoint = (file.parent / MANIFEST).is_file()
    path = (file.parent.parent.parent / "weights" if of_a_checkpoint else file.parent) / MODEL_JSON
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(f"cannot read '{path}': {error}", "mend or remove that file") from None
    return about if isinstance(about, dict) else None


def _refused(what: str, mend: str) -> UserError:
    return UserError(f"{OPTION}: {what}", mend=mend, code="RESUME")
