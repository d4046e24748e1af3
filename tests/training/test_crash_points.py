"""A kill, or a power cut, at every single step of saving: what was acknowledged is always there and whole.

A program saves three times for real and keeps one. Every call of the system that changes something on the
disk is counted; then the program is killed before the first of them, before the second, and so on, and in
the middle of each write. What a power cut leaves is worked out from the calls: whatever was not pushed to the
disk may be there, in part or not at all.
"""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

SAVES = 3

PROGRAM = """
import itertools, json, os, random, shutil, signal, sys, tempfile
from pathlib import Path

import torch

from training.checkpoints.protocol import checkpoints, newest_verified, read_state, read_tensors
from training.checkpoints.protocol import remove_leftovers, step_of, verify
from training.checkpoints.writer import CheckpointWriter, Plan
from training.journal import METRICS_FILE, Journal
from training.checkpoints.retention import Retention
from training.checkpoints.weight_copies import WeightCopies

torch.set_num_threads(1)
SAVES = int(sys.argv[1])
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CHANGING = ("open", "write", "fsync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir",
            "truncate", "ftruncate", "chmod", "pwrite", "sendfile", "symlink", "makedirs", "copy_file_range")
REAL = {name: getattr(os, name) for name in CHANGING}
escaped = []  # files that were opened for writing by other ways than os.open

def hook(event, arguments):
    if event == "open" and arguments[1] is not None and set(arguments[1]) & set("wax+"):
        escaped.append(str(arguments[0]))


def around(before, after=lambda name, arguments, result: None):
    # Let every call of CHANGING be seen; the ones below others (makedirs, remove) are what they call.
    def wrapped(name):
        def call(*arguments, **keywords):
            before(name, arguments)
            result = REAL[name](*arguments, **keywords)
            after(name, arguments, result)
            return result
        return call
    for name in CHANGING:
        setattr(os, name, wrapped(name))


def changes(name, arguments):
    return name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def tensors(step):
    return {MODEL: {"weight": torch.full((7, 3), float(step)), "steps": torch.tensor(step)},
            OPTIMIZER: {"mean/weight": torch.full((7, 3), -float(step))}}


def make_run(folder):
    # What an earlier start was killed in the middle of lies about as well.
    for name in ("checkpoints/.step-00000000.part", "checkpoints/.step-00000009.old", "weights"):
        (folder / name).mkdir(parents=True)
        (folder / name / ("state.json" if "step" in name else ".last.safetensors.part")).write_text("torn")


def clean(folder):
    remove_leftovers(folder / "checkpoints")
    WeightCopies(folder / "weights", MODEL).remove_leftovers()


def save_all(folder, steps, *, acknowledge):
    clean(folder)
    committed = read_state(found)["metrics_bytes"] if (found := newest(folder)) else 0
    journal = Journal(folder, active=True, committed=committed, warn=sys.exit)
    writer = CheckpointWriter(folder / "checkpoints", Retention(1))
    copies = WeightCopies(folder / "weights", MODEL)
    for step in steps:
        for half in (0, 5):
            journal.write("train", step=10 * step + half)

        def then(path):
            copies.owe(path, ["last"], about=str(step))
            return copies.pay()

        writer.save(Plan(step, {"metrics_bytes": journal.length}, None, journal.commit, then), tensors(step))
        writer.busy(None)
        outcome = writer.outcome()
        assert outcome.error is None and outcome.unpruned is None and not copies.owed, outcome
        acknowledge(step)


def newest(folder):
    said = []
    found = newest_verified(folder / "checkpoints", say=said.append)
    assert not said, said
    return found


def check(folder, acknowledged):
    # Whatever is named like a checkpoint is whole, the newest is not older than what was acknowledged, and
    # what belongs to it is there.
    assert [fault for path in checkpoints(folder / "checkpoints") if (fault := verify(path))] == []
    found = newest(folder)
    if found is None:
        assert acknowledged == 0, acknowledged
        return 0
    step, state = step_of(found), read_state(found)
    assert acknowledged <= step <= acknowledged + 1, (step, acknowledged)
    for file, one in tensors(step).items():
        read = read_tensors(found, file)
        assert read.keys() == one.keys() and all(torch.equal(read[name], one[name]) for name in one)
    records = (folder / METRICS_FILE).read_bytes()[: state["metrics_bytes"]].decode().splitlines()
    steps = [json.loads(line)["step"] for line in records]
    assert steps == [10 * one + half for one in range(1, step + 1) for half in (0, 5)], steps
    return step


def check_weights(folder, least):
    # The copy that a user takes away is of one checkpoint or the next, never of both.
    path = folder / "weights" / "last.safetensors"
    if least or path.exists():
        weights = read_tensors(path.parent, path.name)
        assert weights["steps"] in (least, least + 1) and weights["weight"].eq(weights["steps"]).all()


def names(folder):
    return sorted(path.name for path in folder.iterdir())
"""

KILLS = (
    PROGRAM
    + """

def killed_at(folder, number, half):
    # Save in a child that kills itself before call `number` (or in its middle); what it had acknowledged.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def before(name, arguments):
            if changes(name, arguments) and next(calls) == number:
                if half and name == "write":
                    REAL["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        around(before)
        try:
            tell = lambda step: REAL["write"](writing, b"%d " % step)
            save_all(folder, range(1, SAVES + 1), acknowledge=tell)
        except BaseException as error:
            REAL["write"](2, repr(error).encode())
            os._exit(3)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        acknowledged = told.read().split()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return int(acknowledged[-1]) if acknowledged else 0, code == 0


base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
kills = leftovers = between = 0
for half in (False, True):
    for number in itertools.count():
        folder = base / "run"
        make_run(folder)
        acknowledged, done = killed_at(folder, number, half)
        if done:
            assert acknowledged == SAVES
            shutil.rmtree(folder)
            break
        kills += 1
        leftovers += any(name.startswith(".") for name in names(folder / "checkpoints"))
        step = check(folder, acknowledged)
        between += step > acknowledged
        check_weights(folder, acknowledged)
        save_all(folder, [step + 1], acknowledge=lambda step: None)
        assert check(folder, step + 1) == step + 1
        check_weights(folder, step + 1)
        assert names(folder / "checkpoints") == [f"step-{step + 1:08d}"]
        assert names(folder / "weights") == ["last.safetensors", "model.json"]
        shutil.rmtree(folder)
shutil.rmtree(base)
print(json.dumps({"kills": kills, "leftovers": leftovers, "between": between}))
"""
)

POWER_CUTS = (
    PROGRAM
    + """

class Disk:
    # Files and folders by number: what they hold, what of that was pushed, and what was done since.

    def __init__(self):
        self.content, self.sure = {}, {}  # of files: bytes
        self.now, self.pushed, self.since = {}, {}, {}  # of folders: name -> number; changes in their order
        self.numbers = itertools.count()
        self.root = self.folder()

    def folder(self):
        number = next(self.numbers)
        self.now[number], self.pushed[number], self.since[number] = {}, {}, []
        return number

    def file(self, content=b""):
        number = next(self.numbers)
        self.content[number], self.sure[number] = content, b""
        return number

    def at(self, path):
        number = self.root
        for name in path.parts:
            number = self.now[number][name]
        return number

    def change(self, path, number, moved_to=None):
        # Put `number` under a name, take the name away (None), or give it another name.
        parent = self.at(path.parent)
        steps = [(path.name, number)] if moved_to is None else [(path.name, None), (moved_to.name, number)]
        self.since[parent].append(steps)
        for name, one in steps:
            self.put(self.now[parent], name, one)

    @staticmethod
    def put(names, name, number):
        names.pop(name, None) if number is None else names.__setitem__(name, number)

    def push(self, number):
        if number in self.now:
            self.pushed[number], self.since[number] = dict(self.now[number]), []
        else:
            self.sure[number] = self.content[number]

    def after_a_cut(self, folder, draws, luck):
        # Make `folder` what may be found: of each change that was not pushed, all, none or some.
        self._restore(self.root, folder, draws, luck)

    def _restore(self, number, path, draws, luck):
        path.mkdir(exist_ok=True)
        names = dict(self.pushed[number])
        kept = [steps for steps in self.since[number] if draws.random() < luck]
        for name, one in itertools.chain.from_iterable(kept):
            self.put(names, name, one)
        for name, one in names.items():
            if one in self.now:
                self._restore(one, path / name, draws, luck)
                continue
            sure, content = self.sure[one], self.content[one]
            if sure != content and draws.random() < luck:
                whole = len(sure) if content.startswith(sure) else 0  # what was pushed stays
                torn = content[: draws.randint(whole, len(content))]
                sure = draws.choice([content, torn, torn + bytes(len(content) - len(torn)), sure])
            (path / name).write_bytes(sure)


def logged(folder):
    # Save for real; every call of the system and every acknowledgement.
    calls, where = [], {}

    def after(name, arguments, result):
        if name == "open":
            path = Path(arguments[0]).relative_to(folder)
            where[result] = path
            if arguments[1] & os.O_CREAT:
                calls.append(("open", path, bool(arguments[1] & os.O_TRUNC)))
        elif name in ("write", "fsync", "ftruncate"):
            rest = bytes(arguments[1])[:result] if name == "write" else arguments[-1]
            calls.append((name, where[arguments[0]], rest))
        else:
            calls.append((name, *(Path(one).relative_to(folder) for one in arguments)))

    sys.addaudithook(hook)
    around(lambda name, arguments: None, after)
    save_all(folder, range(1, SAVES + 1), acknowledge=lambda step: calls.append(("acknowledged", step)))
    around(lambda name, arguments: None)
    assert not [path for path in escaped if path.startswith(str(folder))], escaped
    return calls


def play(disk, call):
    name, path, *rest = call
    if name == "open":
        there = disk.now[disk.at(path.parent)]
        if path.name not in there:
            disk.change(path, disk.file())
        elif rest[0]:
            disk.content[there[path.name]] = b""
    elif name == "write":
        disk.content[disk.at(path)] += rest[0]
    elif name == "ftruncate":
        disk.content[disk.at(path)] = disk.content[disk.at(path)][: rest[0]]
    elif name == "fsync":
        disk.push(disk.at(path))
    elif name == "rename":
        disk.change(path, disk.at(path), moved_to=rest[0])
    elif name == "mkdir":
        disk.change(path, disk.folder())
    else:
        assert name in ("unlink", "rmdir"), name
        disk.change(path, None)


def as_made(disk, folder):
    # What `make_run` made is on the disk.
    for path in sorted(folder.rglob("*")):
        own = path.relative_to(folder)
        disk.change(own, disk.folder() if path.is_dir() else disk.file(path.read_bytes()))
    for number in [*disk.now, *disk.content]:
        disk.push(number)


base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
make_run(base / "run")
disk, draws, acknowledged, cuts, lost = Disk(), random.Random(0), 0, 0, 0
as_made(disk, base / "run")
for call in logged(base / "run"):
    if call[0] == "acknowledged":
        acknowledged = call[1]
    else:
        play(disk, call)
    held = []
    for luck in (0.0, 1.0, 0.5, 0.5, 0.2, 0.8):
        folder = base / "cut"
        disk.after_a_cut(folder, draws, luck)
        held.append({path: path.is_file() and path.read_bytes() for path in folder.rglob("*")})
        step = check(folder, acknowledged)
        check_weights(folder, acknowledged)
        clean(folder)
        assert not [name for name in names(folder / "checkpoints") if name.startswith(".")]
        assert check(folder, acknowledged) == step
        cuts += 1
        shutil.rmtree(folder)
    lost += held[0] != held[1]
shutil.rmtree(base)
print(json.dumps({"cuts": cuts, "lost": lost, "acknowledged": acknowledged}))
"""
)


def outcome_of(script, program):
    done = script(program, SAVES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_before_or_within_any_call_leaves_what_was_acknowledged_whole(script):
    outcome = outcome_of(script, KILLS)
    assert outcome["kills"] > 200, "every write, fsync, rename and removal of three saves, twice"
    assert outcome["leftovers"] > 50, "most kills leave something half-made"
    assert outcome["between"] > 10, "some strike between a commit and its acknowledgement"


def test_a_power_cut_after_any_call_leaves_what_was_acknowledged_whole(script):
    outcome = outcome_of(script, POWER_CUTS)
    assert outcome["cuts"] > 500
    assert outcome["lost"] > 50, "most cuts must find changes that were not pushed"
    assert outcome["acknowledged"] == SAVES
