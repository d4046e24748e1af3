"""Submitting and following, with programs in SLURM's place; tests/slurm/test_manual.py has the real ones."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.options import parse
from launch.slurm import follow as following
from launch.slurm.asking import LATE, ask
from launch.slurm.records import newest_job, record_of
from launch.slurm.run_name import run_directory
from launch.slurm.script import render
from launch.slurm.submit import submit, submitting_environment
from training.command import read_request
from training.config import UserError

ROOT = Path(__file__).parent.parent.parent
# What scontrol 22.05 prints, but for the lines that nobody here reads.
RECORD = """JobId={job} JobName=JobState=FAILED Reason=x
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={ended}
   RunTime=00:00:03 TimeLimit=UNLIMITED TimeMin=N/A
   Comment=JobState=NODE_FAIL Reason=y
   WorkDir={folder}
   StdOut={folder}/a log-{job}.out
   Power=

"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(sbatch="echo 77")`: programs of SLURM that do so, the only ones there; the folder to work in."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for tool in ("cat", "sleep", "touch"):
        (programs / tool).symlink_to(shutil.which(tool, path=os.defpath))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(following, "POLL", 0.1)
    monkeypatch.setattr(following, "LOOK", 0.05)

    def put(**bodies):
        for name, body in bodies.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        return tmp_path

    return put


def record(folder, state="PENDING", reason="None", *, job="77", ended="0:0", restarts=0):
    return RECORD.format(job=job, state=state, reason=reason, ended=ended, restarts=restarts, folder=folder)


def tell(folder, *records):
    """The body of an scontrol that answers so, one after the other, and then the last for ever."""
    for number, text in enumerate(records):
        (folder / f"answer-{number}").write_text(text)
    return (
        f"n=$(cat {folder}/asked 2>/dev/null || echo 0); echo $((n + 1)) > {folder}/asked\n"
        f"[ -e {folder}/answer-$n ] || n={len(records) - 1}; cat {folder}/answer-$n"
    )


def launched(*command):
    return submit(*parse(["--slurm", *command]))


def refusal(*command):
    with pytest.raises(UserError) as error:
        launched(*command)
    assert error.value.code == "USAGE"
    return error.value


def test_a_job_is_submitted_and_all_about_it_is_said(slurm, capfd):
    folder = slurm(sbatch='echo "$@" > given; cat > script; echo "77;cluster"')
    slurm(scontrol=tell(folder, record(folder, reason="Priority")))
    command = ["--nodes", "2", "--gpus", "4", "--", "--config", "digits", "--seed", "3"]
    assert launched(*command) == 0
    said = capfd.readouterr().out
    assert said == (
        "job 77: digits, 2 nodes with 4 GPUs each, at most 12:00:00\n"
        "  run      runs/digits-77\n"
        f"  log      {folder}/a log-77.out\n"
        "  watch    lockstep launch --slurm --follow 77\n"
        "  stop     scancel 77  (it saves first, and is not queued again)\n"
        "  go on    the same command with --run-dir runs/digits-77\n"
    )
    options, words = parse(["--slurm", *command])
    assert (folder / "script").read_text() == render(options, words, name="digits")
    assert (folder / "given").read_text() == "--parsable\n"


def test_dry_run_writes_the_script_and_nothing_else_and_needs_no_slurm(tmp_path):
    words = ["--nodes", "2", "--dry-run", "--", "--run-dir", "a b"]
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "WANDB_API_KEY": "not-for-the-disk"}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "launch", "--slurm", *words],
        env=env | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    options, rest = parse(["--slurm", *words])
    assert done.stdout == render(options, rest, name="digits")
    assert "not submitted" in done.stderr
    assert "not-for-the-disk" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_slurm_it_is_said_what_to_do(slurm):
    slurm()
    error = refusal("--")
    assert error.what == "sbatch is not on PATH"
    assert "login node" in error.mend


def test_a_mistake_in_the_arguments_is_refused_before_anything_is_queued(slurm):
    folder = slurm(sbatch="touch called; echo 77")
    with pytest.raises(UserError, match="--sed"):
        launched("--", "--sed", "3")
    with pytest.raises(UserError, match="of which run"):
        launched("--", "evaluate")
    with pytest.raises(UserError, match="--time"):
        launched("--time", "soon", "--")
    assert not (folder / "called").exists()


def test_what_sbatch_refuses_is_told_in_two_lines(slurm):
    slurm(sbatch='printf "sbatch: error: invalid partition specified: x\\nsbatch: error: No\\n" >&2; exit 1')
    error = refusal("--partition", "x", "--")
    assert error.what == "SLURM refuses the job: invalid partition specified: x; No"
    assert "\n" not in error.what + error.mend


def test_a_job_that_would_wait_for_ever_is_withdrawn(slurm):
    folder = slurm(sbatch="echo 77", scancel='echo "$@" > cancelled')
    slurm(scontrol=tell(folder, record(folder), record(folder, reason="PartitionNodeLimit")))
    assert "PartitionNodeLimit" in refusal("--nodes", "9", "--").what
    assert (folder / "cancelled").read_text() == "77\n"


def test_a_controller_that_does_not_answer_is_not_waited_for(slurm):
    slurm(sbatch="exec sleep 60")
    began = time.monotonic()
    assert ask(["sbatch"], within=0.3).code == LATE
    assert time.monotonic() - began < 5


def test_a_job_starts_from_the_environment_of_the_shell_and_of_no_other_job():
    env = {
        "HOME": "/h",
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "3",
        "SLURM_NTASKS_PER_NODE": "8",
        "PATH": "/bin",
    }
    env |= {
        "SBATCH_PARTITION": "a",
        "SBATCH_ACCOUNT": "b",
        "SBATCH_SIGNAL": "B:TERM@1",
        "SBATCH_TIMELIMIT": "1",
    }
    options, _ = parse(["--slurm", "--partition", "mine", "--time", "2:00:00", "--"])
    found = submitting_environment(env, options)
    path = found.pop("PATH").split(os.pathsep)
    assert found == {"HOME": "/h", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "b"}
    # Its own programs are found, also where their environment is not activated.
    assert path == [str(Path(sys.executable).parent), "/bin"]
    assert submitting_environment({"PATH": path[0]}, options)["PATH"] == path[0]


def test_the_tasks_of_an_array_do_not_train_one_run_at_the_same_time(slurm, capfd):
    folder = slurm(sbatch="cat > script; echo 80")
    slurm(scontrol=tell(folder, record(folder, job="81")))
    error = refusal("--array", "1-3", "--", "--run-dir", "runs/a")
    assert "--array 1-3 --run-dir runs/a" in error.what
    assert "{task}" in error.mend
    assert "more than one job" in refusal("--array", "1-3", "--follow", "--", "--seed", "{task}").what
    assert launched("--array", "1-3%1", "--", "--run-dir", "runs/a") == 0
    assert "note" in capfd.readouterr().out
    assert launched("--array", "1-3", "--", "--seed", "{task}") == 0
    said = capfd.readouterr().out
    assert "runs/digits-80_1  (task 1; the others likewise)" in said
    assert "--follow 80_1" in said
    assert "note" not in said
    assert '--seed "$SLURM_ARRAY_TASK_ID"' in (folder / "script").read_text()


@pytest.mark.parametrize(
    ("words", "env", "found"),
    [
        ([], {"SLURM_JOB_ID": "7"}, "runs/digits-7"),
        (["--config", "chest_xray"], {"SLURM_JOB_ID": "7"}, "runs/chest_xray-7"),
        (
            [],
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"},
            "runs/digits-7_0",
        ),
        (["--run-dir", "a b"], {"SLURM_JOB_ID": "7"}, "a b"),
        (["evaluate", "--run-dir", "a"], {"SLURM_JOB_ID": "7"}, "a"),
    ],
)
def test_a_job_finds_its_run_again_by_its_number(words, env, found):
    request = read_request(words)
    assert request is not None
    assert run_directory(request, env) == Path(found)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"])
def test_a_number_of_a_job_that_is_none_is_refused(name):
    request = read_request([])
    assert request is not None
    with pytest.raises(UserError, match=name):
        run_directory(request, {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", name: "1; touch x"})


@pytest.mark.parametrize(
    ("state", "ended", "code"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "75:0", 75),
        ("FAILED", "0:9", 137),
        ("CANCELLED", "75:0", 75),
        ("CANCELLED", "0:15", 143),
        ("CANCELLED", "0:0", 143),
        ("NODE_FAIL", "0:0", 70),
        ("TIMEOUT", "0:0", 70),
    ],
)
def test_the_exit_code_of_a_job_is_that_of_its_script(state, ended, code, slurm):
    folder = slurm()
    slurm(scontrol=tell(folder, record(folder, state, ended=ended)))
    found = record_of("77")
    assert found is not None
    assert (found.state, found.exit_code, found.output) == (state, code, folder / "a log-77.out")


def test_a_job_is_followed_through_its_requeues_to_its_exit_code(slurm, capfd):
    folder = slurm()
    log = folder / "a log-77.out"
    states = [
        record(folder, reason="Priority"),
        record(folder, "RUNNING"),
        record(folder, "NODE_FAIL"),
        record(folder, reason="BeginTime", restarts=1),
        record(folder, "RUNNING", restarts=1),
        record(folder, "COMPLETING", ended="75:0", restarts=1),
        record(folder, "FAILED", "NonZeroExitCode", ended="75:0", restarts=1),
    ]
    slurm(scontrol=tell(folder, *states) + f'\necho "line $n" >> "{log}"')
    assert following.follow("77") == 75
    said = capfd.readouterr()
    assert said.out.splitlines()[:7] == [f"line {number}" for number in range(7)]
    assert re.findall(r"job 77: (\S+)", said.err) == [
        *("PENDING", "RUNNING", "NODE_FAIL", "PENDING", "RUNNING", "COMPLETING", "FAILED")
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("é" * 3000 + "\nlast é\n", "last é\n"), ("é" * 3000 + "xy\n", "é" * 2046 + "xy\n"), ("short", "short")],
)
def test_of_a_job_that_runs_already_the_end_is_shown_and_an_emptied_log_from_its_start(
    text, shown, slurm, capfd
):
    folder = slurm()
    log = folder / "a log-77.out"
    log.write_text(text)
    running, done = record(folder, "RUNNING"), record(folder, "COMPLETED")
    body = tell(folder, running, running, done, done)
    slurm(scontrol=f'{body}\n[ $n = 1 ] && echo new > "{log}"; exit 0')
    assert following.follow("77", tail=True) == 0
    assert capfd.readouterr().out == f"{shown}new\n"


def test_a_controller_that_stops_answering_does_not_hold_us_for_ever(slurm, capfd, monkeypatch):
    monkeypatch.setattr(following, "SILENT", 0.5)
    folder = slurm()
    body = tell(folder, record(folder, "RUNNING"))
    slurm(scontrol=f'{body} > said; read n < asked; [ "$n" = 1 ] && exec cat said; echo "Unable" >&2; exit 1')
    assert following.follow("77") == 69
    assert re.search(r"^FATAL code=RENDEZVOUS .*--follow 77", capfd.readouterr().err, re.MULTILINE)


def test_what_slurm_does_not_know_or_is_many_jobs_cannot_be_followed(slurm):
    folder = slurm(scontrol='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    with pytest.raises(UserError, match="does not know job 78"):
        following.follow("78")
    slurm(scontrol=tell(folder, record(folder) + record(folder, job="78")))
    with pytest.raises(UserError, match="array of jobs"):
        following.follow("77")
    with pytest.raises(UserError, match="no number of a job"):
        following.follow("1; touch x")


def test_alone_follow_takes_the_newest_job_and_submits_nothing(slurm, capfd):
    folder = slurm(squeue='echo "$@" > asked_for; printf "90_[1-3]\\n88\\n77\\n"', sbatch="touch called")
    slurm(scontrol=tell(folder, record(folder, "COMPLETED")))
    assert newest_job("seeds") == "88"
    assert "--name=seeds" in (folder / "asked_for").read_text()
    assert launched("--follow") == 0
    assert "job 88: COMPLETED" in capfd.readouterr().err
    assert launched("--follow", "12_3") == 0
    assert "job 12_3: COMPLETED" in capfd.readouterr().err
    for command in (["--nodes", "2", "--follow"], ["--follow", "12", "--", "--seed", "1"]):
        refusal(*command)
    assert not (folder / "called").exists()
    slurm(squeue="exit 0")
    assert "no job of yours" in refusal("--follow").what


def test_ctrl_c_leaves_the_job_alone_and_says_so(slurm):
    folder = slurm(scancel="touch cancelled")
    slurm(scontrol=tell(folder, record(folder, "RUNNING")))
    words = [sys.executable, "-m", "launch", "launch", "--slurm", "--follow", "77"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "job 77: RUNNING\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.startswith("job 77 goes on. To stop it: scancel 77")
    assert not (folder / "cancelled").exists()
