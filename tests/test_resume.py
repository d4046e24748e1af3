"""Runs that are stopped anywhere and go on, on as many processes as there then are; and how others begin.

Most starts here share a process: `PROGRAM` makes one after the other, each with the real run directory,
checkpoints and signals, because loading torch costs more than a run of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.marked_processes import MARK, living, wait_until
from training.checkpoints.protocol import checkpoints, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
RUN = ROOT / "training" / "run.py"
TORCHRUN = Path(sys.executable).parent / "torchrun"
DEADLINE = 120  # seconds for any program here, on a machine that is busy with others

# A network that stops its own process: in the forward pass that `strikes` names, as (step) or (step, batch).
NETWORK = """
import os, signal, timm, torch

place, strikes, scored = None, None, 0

class Network(torch.nn.Module):
    def __init__(self, channels, outputs, plain=None):
        super().__init__()
        if plain is not None:
            self.layers = timm.create_model(plain, in_chans=channels, num_classes=outputs)
            return
        pool = torch.nn.AdaptiveAvgPool2d(8)
        norm = torch.nn.BatchNorm1d(16)
        head = torch.nn.Linear(16, outputs)
        first = torch.nn.Linear(64 * channels, 16)
        self.layers = torch.nn.Sequential(pool, torch.nn.Flatten(), first, norm, torch.nn.Dropout(0.2), head)

    def forward(self, images):
        global scored
        scored = 0 if self.training else scored + 1
        at = None if place is None else (place.step, scored)
        if strikes is not None and at == tuple(strikes):
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layers(images)
"""

PROGRAM = """
import contextlib, json, os, sys
from pathlib import Path
from data_pipeline import torchvision_cpu
torchvision_cpu.declare_missing_operators()
import network
from data_pipeline.fault import UserError
from training import assembly, loop, process, reading, run_directory
from training.command import read_request

RANK = int(os.environ.get("RANK", "0"))

def start(words, strike=None):
    request = read_request(words)
    place = process.Place(request.run_dir)
    network.place, network.strikes, network.scored = place, strike, 0
    dataset = reading.open_dataset(request.config, learning=True)
    accelerator = assembly.join(request.config)
    place.joined(accelerator.process_index)
    try:
        begun = run_directory.start_run(request, accelerator, dataset)
        arguments = {"checkpoint": begun.checkpoint, "progress": begun.progress, "place": place}
        job = assembly.assemble(request, accelerator, dataset, **arguments)
        loop.train(job, begun)
        return ["DONE", ""]
    except (process.Ended, UserError) as ended:
        return [ended.code, ended.what]
    finally:
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        while run_directory._locks:  # as the end of the process would
            run_directory._locks.pop().close()

told = []
for words, strike in json.loads(Path("starts.json").read_text()):
    here = strike is not None and (len(strike) < 3 or strike[2] == RANK)
    told.append(start(words, strike[:2] if here else None))
if RANK == 0:
    Path("told.json").write_text(json.dumps(told))
sys.stdout.flush()
os._exit(0)
"""

EPOCH, STEPS, BATCH = 4, 8, 350  # steps of an epoch, of the runs in PROGRAM, samples of a step


@pytest.fixture(scope="session")
def flags(digits):
    """The options of the runs that PROGRAM makes: everything that has state."""
    options = {
        "--data.root": digits,
        "--data.workers": 0,
        "--model.name": "network:Network",
        "--train.global-batch": BATCH,
        "--train.epochs": STEPS // EPOCH,
        "--train.ema": 0.9,
        "--optim.clip-norm": 1,
        "--eval.batch": 50,
        "--checkpoint.every-steps": 5,
        "--debug.batch-digest": "pixels",
    }
    return [str(word) for pair in options.items() for word in pair]


def environment(mark=""):
    """Nothing of this machine's set-up, and a mark by which its processes are known."""
    known = {key: os.environ[key] for key in ("PATH", "TMPDIR", "LANG") if key in os.environ}
    clean = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), MARK: mark}
    return {**known, **clean, "HOME": "/nonexistent"}


def launcher(processes):
    return [sys.executable] if processes == 1 else [str(TORCHRUN), f"--nproc_per_node={processes}"]


def execute(command, folder):
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=DEADLINE
    )


def starts(folder, what, *, processes):
    """What became of each of the starts `what`, (options, where it is struck), one after the other."""
    folder.mkdir(exist_ok=True)
    (folder / "network.py").write_text(NETWORK)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "starts.json").write_text(json.dumps(what))
    done = execute([*launcher(processes), folder / "program.py"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return [tuple(one) for one in json.loads((folder / "told.json").read_text())]


def records(run_dir, kind=None):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if kind in (None, one["kind"])]


def results(run_dir):
    """All records but those of starts, without seconds."""
    found = [one for one in records(run_dir) if one["kind"] != "start"]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def state_of(run_dir):
    """The digests of the newest checkpoint's tensors, and of what a user takes away; and the progress."""
    newest = checkpoints(run_dir / "checkpoints")[0]
    files = [*sorted(newest.glob("*.safetensors")), *sorted((run_dir / "weights").glob("*.safetensors"))]
    tensors = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    progress = json.loads((newest / "state.json").read_text())["progress"]
    return tensors, {name: value for name, value in progress.items() if name != "metrics_bytes"}


@pytest.fixture(scope="session")
def swept(once, flags):
    """`swept(processes)`: a run that nothing disturbs, in whole/, and one for each place in which a signal
    stopped it, and which then went on; and what each start said."""

    def get(processes):
        # In the forward pass of a step, and in the second and last batch of the evaluation behind an epoch.
        # Every process is struck, or only the one whose number comes last.
        alone = [(0, 0), (4, 0), (STEPS - 2, 0), (STEPS - 1, 0), (EPOCH - 1, 2), (EPOCH - 1, 8)]
        places = alone if processes == 1 else [(2, 0), (1, 0, 1), (EPOCH - 1, 2), (EPOCH - 1, 2, 1)]

        def make(folder):
            what = [([*flags, "--run-dir", "whole"], None)]
            for number, place in enumerate(places):
                words = [*flags, "--run-dir", f"run{number}"]
                what += [(words, place), (words, None)]
            what.append(([*flags, "--run-dir", "run0"], None))  # which is done
            said = starts(folder / "runs", what, processes=processes)
            (folder / "said.json").write_text(json.dumps(said))

        folder = once(f"swept-{processes}", make)
        said = json.loads((folder / "said.json").read_text())
        pairs = list(zip(said[1:-1:2], said[2:-1:2], strict=True))
        return folder / "runs", [(place, *pair) for place, pair in zip(places, pairs, strict=True)], said[-1]

    return get


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bits(swept, processes):
    folder, cases, again = swept(processes)
    reference, stops = state_of(folder / "whole"), set()
    assert [one["step"] for one in records(folder / "whole", "train")] == list(range(1, STEPS + 1))
    for number, (place, stopped, resumed) in enumerate(cases):
        run_dir = folder / f"run{number}"
        assert stopped[0] == "STOPPED", (place, stopped)
        assert stopped[1].startswith("stopped on SIGTERM, after step "), stopped
        assert resumed == ["DONE", ""]
        first, second = records(run_dir, "start")[:2]
        assert (first["resumed_from"], second["step"]) == (None, int(second["resumed_from"][5:]))
        assert stopped[1].split()[5].rstrip(",") == str(second["step"])
        stops.add(second["step"])
        assert results(run_dir) == results(folder / "whole"), place
        tensors, progress = state_of(run_dir)
        assert tensors == reference[0], place
        if second["step"] < STEPS:  # else the last evaluation is behind the last checkpoint
            assert progress == reference[1], place
    if processes == 1:
        assert stops == {EPOCH - 1, EPOCH, EPOCH + 1, STEPS - 1, STEPS}
    assert again == ["DONE", ""]
    assert len(records(folder / "run0", "start")) == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_is_broken_off_counts_for_nothing_and_is_owed(swept, processes):
    _, cases, _ = swept(processes)
    said = {place: stopped[1] for place, stopped, _ in cases}
    whole = {(STEPS - 1, 0), (EPOCH - 1, 2)} if processes == 1 else {(EPOCH - 1, 2), (EPOCH - 1, 2, 1)}
    for place in whole:
        step = place[0] + 1
        owed = "before the evaluation that belongs behind it"
        assert said[place] == f"stopped on SIGTERM, after step {step}, {owed}"
    assert processes > 1 or said[EPOCH - 1, 8] == f"stopped on SIGTERM, after step {EPOCH + 1}"


# The second proof, where nothing asks for equal bits: no BatchNorm and no dropout, which see a share.


def test_a_run_goes_on_with_any_number_of_processes_on_the_same_path(flags, tmp_path):
    """Stopped at random steps, and continued with other processes, readers and micro-batches."""
    epochs, folder = 5, tmp_path / "runs"
    arguments = ["--model.arguments", "{plain: test_convnext}", "--train.epochs", str(epochs)]
    draw = random.Random(5)
    strikes = [epoch * EPOCH + draw.randrange(EPOCH) for epoch in range(epochs - 2)]
    basis = [*flags, *arguments, "--run-dir"]
    told = starts(folder, [([*basis, "whole"], None), ([*basis, "run"], (strikes[0], 0))], processes=1)
    topologies = [(2, 1, "none", "threads"), (3, 2, 17, "threads"), (1, 1, 60, "processes")]
    for (processes, workers, micro_batch, kind), strike in zip(topologies, [*strikes[1:], None], strict=True):
        other = ["--data.workers", str(workers), "--data.worker-kind", kind]
        words = [*basis, "run", *other, "--train.micro-batch", str(micro_batch)]
        told += starts(folder, [(words, strike and (strike, 0))], processes=processes)
    assert [code for code, _ in told] == ["DONE", "STOPPED", "STOPPED", "STOPPED", "DONE"]
    assert [one["processes"] for one in records(folder / "run", "start")] == [1, 2, 3, 1]
    steps = [one["step"] for one in records(folder / "run", "start")]
    assert sorted(set(steps)) == steps, "each start took a part of the way"
    whole, run = (records(folder / name, "train") for name in ("whole", "run"))
    assert [one["step"] for one in run] == list(range(1, epochs * EPOCH + 1))
    for name in ("step", "epoch", "samples", "lr", "batch_digest"):
        assert [one[name] for one in run] == [one[name] for one in whole], name
    assert [one["loss"] for one in run] == pytest.approx([one["loss"] for one in whole], rel=1e-4)
    scores = [[one["metrics"]["loss"] for one in records(folder / name, "eval")] for name in ("whole", "run")]
    assert len(scores[0]) == epochs
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


# What else ends a run or begins one.


@pytest.fixture(scope="session")
def told(once, flags, swept):
    """Starts in one process: their answers by name, what was printed, and the folder."""

    def make(folder):
        source = swept(1)[0] / "whole"
        early = [*flags, "--train.epochs", "4", "--optim.warmup", "0", "--run-dir", "early"]
        spec = "{patience: PATIENCE, metric: loss, threshold: 100}"
        saving = ["--checkpoint.every-minutes", "0.0001", "--checkpoint.keep", "100"]
        new = [*flags, "--run-dir", "new", "--train.max-steps", "2"]
        new += ["--model.pretrained", "nowhere.safetensors"]
        what = {
            "stopped early": [*early, "--train.early-stop", spec.replace("PATIENCE", "1")],
            "again": [*early, "--train.early-stop", spec.replace("PATIENCE", "1")],
            "more patience": [*early, "--train.early-stop", spec.replace("PATIENCE", "2")],
            "no early stop": early,
            "undisturbed": [*early[:-1], "undisturbed"],
            "unknown score": [*early[:-1], "unknown", "--train.early-stop", "{patience: 1, metric: beauty}"],
            "by the clock": [*flags, "--run-dir", "clock", *saving, "--checkpoint.every-steps", "none"],
            "new": [*new, "--init-from", str(source)],
            "resumed": [*new, "--train.max-steps", "3", "--init-from", "gone"],
            "gone": [*flags, "--run-dir", "never", "--init-from", "gone"],
            "itself": [*new, "--fresh", "--init-from", "new"],
            "other network": [
                *flags,
                *("--run-dir", "never2", "--init-from", str(source)),
                *("--model.arguments", "{plain: test_convnext}"),
            ],
        }
        said = starts(folder / "runs", [(words, None) for words in what.values()], processes=1)
        (folder / "said.json").write_text(json.dumps(dict(zip(what, said, strict=True))))

    folder = once("told", make)
    said = json.loads((folder / "said.json").read_text())
    return {name: tuple(one) for name, one in said.items()}, folder / "runs"


def test_a_run_without_progress_ends_early_as_done_and_goes_on_with_more_patience(told):
    said, folder = told
    names = ["stopped early", "again", "more patience", "no early stop", "undisturbed"]
    assert [said[name] for name in names] == [("DONE", "")] * 5
    begun = [one["step"] for one in records(folder / "early", "start")]
    assert begun == [0, 2 * EPOCH, 3 * EPOCH], "the first evaluation is progress"
    assert results(folder / "early") == results(folder / "undisturbed")
    assert state_of(folder / "early")[0] == state_of(folder / "undisturbed")[0]
    printed = (folder / "printed.txt").read_text()
    why = "complete  loss has not got better by more than 100 in 1 evaluations (train.early_stop); it is "
    assert printed.count(why) == 2
    assert printed.count("by more than 100 in 2 evaluations") == 1
    assert said["unknown score"][0] == "CONFIG"
    assert "'beauty' is no score of this run" in said["unknown score"][1]


def test_checkpoints_are_made_by_the_clock_too(told):
    _, folder = told
    steps = {int(path.name[5:]) for path in checkpoints(folder / "clock" / "checkpoints")}
    assert steps > {EPOCH, STEPS}


def test_a_new_run_begins_with_anothers_weights_and_goes_on_from_its_own(told, swept):
    said, folder = told
    best = swept(1)[0] / "whole" / "weights" / "best.safetensors"
    assert (said["new"], said["resumed"]) == (("DONE", ""), ("DONE", ""))
    first, second = records(folder / "new", "start")
    assert (first["initialised_from"], first["resumed_from"]) == (str(best), None)
    assert (second["initialised_from"], second["resumed_from"]) == (None, "step-00000002")
    printed = (folder / "printed.txt").read_text()
    assert f"weights from {best} (a new run: not the same as resuming it)" in printed
    assert "--init-from goes before model.pretrained, which is not read" in printed
    assert "--init-from is not read: this run goes on from its own step-00000002" in printed
    codes = {name: said[name][0] for name in ("gone", "itself", "other network")}
    assert codes == {"gone": "CONFIG", "itself": "USAGE", "other network": "RESUME"}
    assert len(said["other network"][1].splitlines()) == 11
    assert said["other network"][1].endswith(" more")
    assert not (folder / "never").exists(), "refused before anything is made"
    assert len(records(folder / "new", "start")) == 2, "refused before anything is moved"


def test_a_run_whose_minutes_are_over_saves_and_says_so(digits, tmp_path):
    words = ["--data.root", digits, "--model.name", "test_resnet", "--run-dir", "run"]
    words += ["--train.max-minutes", "0.01"]
    done = execute([sys.executable, RUN, *words], tmp_path)
    assert done.returncode == 75, done.stderr
    what, fatal = done.stderr.strip().splitlines()
    assert what == "stopped after 0.01 minutes as asked, after step 2"
    assert fatal.startswith("FATAL code=STOPPED rank=0 ")
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["code"] == "STOPPED"
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


# In its seventh step, a lock that is never given up holds it inside a library, where Python hears no signal.
STUCK = """
import ctypes, pathlib, network

steps = 0

class Network(network.Network):
    def forward(self, images):
        global steps
        steps += self.training
        if steps > 6:
            pathlib.Path("stuck").touch()
            lock = ctypes.create_string_buffer(64)
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(lock)
        return super().forward(images)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_interrupt_ends_all_processes_at_once(flags, processes, tmp_path):
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "stuck_network.py").write_text(STUCK)
    words = [*flags, "--model.name", "stuck_network:Network", "--checkpoint.every-steps", "2"]
    command = [*launcher(processes), str(RUN), *words, "--run-dir", "run"]
    mark = uuid.uuid4().hex
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(
            command, cwd=tmp_path, env=environment(mark), stdout=said, stderr=said, start_new_session=True
        )
    try:
        newest = tmp_path / "run" / "checkpoints" / "step-00000004"
        assert wait_until(lambda: (tmp_path / "stuck").exists() and newest.exists(), within=60)
        for _ in range(2):
            time.sleep(0.3)
            running.send_signal(signal.SIGINT)
        asked = time.monotonic()
        assert wait_until(lambda: not living(mark) and running.poll() is not None, within=20)
        assert time.monotonic() - asked < 5, (tmp_path / "said").read_text()
    finally:
        for number in living(mark):
            os.kill(number, signal.SIGKILL)
        running.wait()
    assert processes > 1 or running.returncode == 130  # torchrun has exit codes of its own
    assert verify(newest) is None
