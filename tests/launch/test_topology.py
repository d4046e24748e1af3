"""Where a job runs, as a real SLURM has told it, and as nobody should."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.host_list import MOST, host_names, node_counts
from launch.topology import (
    PROCESS_VARIABLES,
    Topology,
    by_srun,
    of_slurm_job,
    of_slurm_task,
    step_port,
)
from training.config import UserError

REAL = json.loads((Path(__file__).parent / "slurm_environments.json").read_text())
STARTS = REAL["starts"]
TASKS = [name for name in STARTS if "tasks" in STARTS[name] and name != "salloc_interactive"]

# What each of them is to start: processes of each node, cores of each, on the CPU or not, GPUs to ask for.
JOBS = {
    "plain": ((1,), 1, True, 0),
    "nodes": ((1, 1), 1, True, 0),
    "ntasks_per_node": ((2, 2), 1, True, 0),
    "ntasks_uneven": ((2, 1), 1, True, 0),
    "nodes_range": ((2,), 1, True, 0),
    "cpus_per_task": ((2, 2), 3, True, 0),
    "cpus_of_nodes_differ": ((14, 6), 1, True, 0),
    "array": ((1, 1), 1, True, 0),
    "gpus_per_node": ((2, 2), 0, False, 0),
    "gpus_per_node_typed": ((2, 2), 0, False, 0),
    "gres": ((2, 2), 0, False, 2),
    "gpus_per_task": ((2, 2), 1, False, 0),
    "gpus_per_task_uneven": ((2, 1), 1, False, 0),
    "gpus": ((3,), 0, False, 0),
    "exclusive": ((8, 8), 1, False, 8),
    "salloc": ((2, 2), 1, True, 0),
}
REFUSED = {
    "gpus_uneven": ("--gpus 3", "--gpus-per-node"),
    "n_and_per_node": ("SLURM_NTASKS=3, SLURM_NTASKS_PER_NODE=2", "sbatch"),
    "ntasks_per_gpu": ("--ntasks-per-gpu", "leave it out"),
}


def refusal(call, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert caught.value.code == "USAGE"
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 600
    return caught.value


def test_every_job_that_was_recorded_is_looked_at():
    assert {name for name in STARTS if "job" in STARTS[name]} == JOBS.keys() | REFUSED.keys()
    assert len(TASKS) > 12


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_job_starts_what_its_options_ask_for(name):
    topology = of_slurm_job(STARTS[name]["job"])
    assert (topology.processes, topology.cores, topology.cpu, topology.gpus) == JOBS[name], STARTS[name][
        "asked"
    ]
    assert topology.address == host_names(STARTS[name]["job"]["SLURM_JOB_NODELIST"], name="")[0]
    assert (topology.node_rank, topology.port) == (0, 0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_job_whose_options_mean_nothing_sure_is_refused(name):
    error = refusal(of_slurm_job, STARTS[name]["job"])
    what, mend = REFUSED[name]
    assert what in error.what
    assert mend in error.mend


@pytest.mark.parametrize("name", TASKS)
def test_processes_of_srun_are_numbered_as_slurm_has_placed_them(name):
    tasks = STARTS[name]["tasks"]
    places = [of_slurm_task(task) for task in tasks]
    if len(tasks) == 1:
        assert places == [{}]
        return
    assert [int(place["RANK"]) for place in places] == list(range(len(tasks)))
    assert {place["WORLD_SIZE"] for place in places} == {str(len(tasks))}
    assert all(place.keys() <= PROCESS_VARIABLES.keys() for place in places)
    hosts = host_names(tasks[0]["SLURM_STEP_NODELIST"], name="")
    assert [hosts[int(place["GROUP_RANK"])] for place in places] == [
        task["SLURMD_NODENAME"] for task in tasks
    ]
    on_host = Counter(task["SLURMD_NODENAME"] for task in tasks)
    for place, task in zip(places, tasks, strict=True):
        assert int(place["LOCAL_WORLD_SIZE"]) == on_host[task["SLURMD_NODENAME"]]
    assert len({(place["GROUP_RANK"], place["LOCAL_RANK"]) for place in places}) == len(tasks)
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
    assert places[0]["MASTER_ADDR"] == tasks[0]["SLURMD_NODENAME"]
    if "job" in STARTS[name]:
        assert tuple(on_host[host] for host in hosts) == of_slurm_job(STARTS[name]["job"]).processes


def test_processes_that_slurm_deals_out_in_turns_keep_its_numbers():
    places = [of_slurm_task(task) for task in STARTS["srun_cyclic"]["tasks"]]
    assert [place["GROUP_RANK"] for place in places] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("asked", "each"),
    [
        ({"SLURM_GPUS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, 2),
        ({"SLURM_GPUS": "8"}, 4),
        ({}, None),
    ],
)
def test_a_shell_of_salloc_knows_the_gpus_that_were_asked_for(asked, each):
    """It runs on none of the nodes, so SLURM_GPUS_ON_NODE is not there."""
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}
    topology = of_slurm_job({**env, **asked})
    assert (topology.processes, topology.cpu) == (((each or 1,) * 2), each is None)


def test_a_shell_of_salloc_that_is_a_step_is_not_one_of_the_processes():
    shell = STARTS["salloc_interactive"]["tasks"][0]
    assert int(shell["SLURM_STEP_ID"]) > 1 << 31
    assert of_slurm_task(shell) == {}
    assert not by_srun(shell)
    assert of_slurm_job(shell).processes == (2, 2)
    assert by_srun(STARTS["srun_block"]["tasks"][0])
    assert not by_srun(STARTS["plain"]["job"])


def test_what_another_launcher_has_set_holds():
    task = STARTS["srun_block"]["tasks"][1]
    assert of_slurm_task(task | {"RANK": "0"}) == {}
    assert of_slurm_task(task | {"WORLD_SIZE": "8"}) == {}
    chosen = of_slurm_task(task | {"MASTER_ADDR": "n9", "MASTER_PORT": "7"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("n9", "7")


HOSTILE = (
    *("", "$(touch x)", "1; touch x", "`touch x`", "-1", "1.0", "1\n", "٣", "9" * 5000, " 2", "2 ", "0x2"),
    "n1,../../etc",
)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "name",
    [
        *("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        *("SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID"),
    ],
)
def test_a_task_whose_variables_somebody_has_changed_is_refused_with_their_name(name, value):
    task = STARTS["srun_block"]["tasks"][3]
    assert name in refusal(of_slurm_task, task | {name: value}).what


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("name", ["SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE", "SLURM_JOB_ID"])
def test_a_job_whose_variables_somebody_has_changed_is_refused_with_their_name(name, value):
    assert name in refusal(of_slurm_job, STARTS["ntasks_per_node"]["job"] | {name: value}).what


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"SLURM_PROCID": "4"}, ["SLURM_PROCID=4", "SLURM_STEP_NUM_TASKS=4"]),
        ({"SLURM_NODEID": "2"}, ["SLURM_NODEID=2"]),
        ({"SLURM_LOCALID": "2"}, ["SLURM_LOCALID=2"]),
        ({"SLURM_STEP_NUM_TASKS": "5"}, ["SLURM_STEP_NUM_TASKS=5", "SLURM_STEP_TASKS_PER_NODE=2(x2)"]),
        ({"SLURM_STEP_NODELIST": "n[1-3]"}, ["SLURM_STEP_NODELIST=n[1-3]"]),
        ({"MASTER_PORT": "x"}, ["MASTER_PORT"]),
    ],
)
def test_variables_of_a_task_that_contradict_each_other_are_named(changed, names):
    error = refusal(of_slurm_task, STARTS["ntasks_per_node"]["tasks"][3] | changed)
    assert all(name in error.what for name in names)


@given(st.dictionaries(st.sampled_from(sorted(STARTS["gpus"]["job"])), st.text(max_size=30), max_size=4))
def test_whatever_a_job_is_told_it_starts_processes_or_is_refused(changed):
    try:
        topology = of_slurm_job(STARTS["gpus"]["job"] | changed)
    except UserError:
        return
    assert topology.world >= 1


def fold(hosts):
    """SLURM's short form of host names, one bracket for each run of numbers of one width."""
    parts = []
    for prefix, number in hosts:
        last = parts[-1] if parts else None
        alike = last and last[0] == prefix and len(last[2]) == len(number) and last[2][:1] != "0" * 2
        if alike and int(last[2]) + 1 == int(number):
            last[2] = number
        else:
            parts.append([prefix, number, number])
    words = [
        f"{prefix}[{first}-{last}]" if first != last else prefix + first for prefix, first, last in parts
    ]
    return ",".join(words)


PREFIXES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}[a-z_-]", fullmatch=True)
RUNS = st.tuples(PREFIXES, st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8))


@given(st.lists(RUNS, min_size=1, max_size=6))
def test_a_folded_list_of_hosts_unfolds_to_the_same_hosts(runs):
    hosts = [
        (prefix, str(number).zfill(width))
        for prefix, first, count, width in runs
        for number in range(first, first + count)
    ]
    assert host_names(fold(hosts), name="X") == [prefix + number for prefix, number in hosts]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1, max_size=8))
def test_folded_numbers_unfold_to_the_same_numbers(runs):
    text = ",".join(f"{number}(x{count})" if count > 1 else str(number) for number, count in runs)
    assert node_counts(text, name="X") == [number for number, count in runs for _ in range(count)]


@pytest.mark.parametrize("text", sorted(REAL["host_lists"]))
def test_host_lists_unfold_as_scontrol_unfolds_them(text):
    assert host_names(text, name="X") == REAL["host_lists"][text]


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE[:5],
        *("n[1-999999999999]", "n[1-999999999]", "n[3-1]", "n[3-1],m", "n[1-3", "n1-3]", "n[]", "n[1-]"),
        *("n[a-b]", "n[[1]]", "n[1]]", "n,,m", ",n", "n,", "n[1-2],", "n\n", "n m", "-n", "n[٣]", "n[1-٣]"),
        *("n[1-9][1-9][1-9][1-9][1-9]", "[1-99][1-99][1-99][1-99]", "a" * 300, "n[" + "0" * 5000 + "]"),
        *("n[1-60000]," * 3 + "m", "x" * 200 + "[1-60000]" + "[1-60000]", "[" * 3000, "n[1]" * 3000),
        *("n," * (5 << 20), "[1-9]" * (2 << 20), "1" * (10 << 20)),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_list_of_hosts_is_refused_at_once_by_the_name_of_its_variable(text):
    began = time.monotonic()
    error = refusal(host_names, text, name="SLURM_JOB_NODELIST")
    assert time.monotonic() - began < 1
    assert error.what.startswith("SLURM_JOB_NODELIST=")


@pytest.mark.parametrize(
    "text",
    [*HOSTILE[:9], "1,", "1(x0)", "1(x-1)", "1(x)", "1(x999999)", "1(x60000),2(x60000)", "1," * 9999999],
    ids=lambda text: text[:24],
)
def test_what_is_no_list_of_numbers_is_refused_at_once_by_the_name_of_its_variable(text):
    began = time.monotonic()
    assert refusal(node_counts, text, name="SLURM_TASKS_PER_NODE").what.startswith("SLURM_TASKS_PER_NODE=")
    assert time.monotonic() - began < 1


@given(st.text(alphabet="n1-3[],x()09 $\n", max_size=40))
def test_any_text_is_a_list_of_plain_names_or_refused(text):
    try:
        names = host_names(text, name="X")
    except UserError:
        return
    assert 0 < len(names) <= MOST
    assert all(name and not set(name) & set("[], $\n()") for name in names)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_variables_of_all_processes_number_them_once(processes):
    ranks = []
    for node in range(len(processes)):
        topology = Topology(tuple(processes), node)
        for local in range(topology.local):
            variables = topology.variables(local)
            assert variables.keys() == PROCESS_VARIABLES.keys() - {"ACCELERATE_USE_CPU"}
            assert variables["WORLD_SIZE"] == str(sum(processes))
            assert variables["LOCAL_WORLD_SIZE"] == str(processes[node])
            ranks.append(int(variables["RANK"]))
    assert ranks == list(range(sum(processes)))


def test_a_topology_is_told_in_a_line():
    assert Topology((1,), cpu=True).words() == "1 process on CPU"
    assert Topology((8,)).words() == "8 processes on GPUs"
    assert (
        Topology((2, 2), 1, "n1", 29400, cpu=True).words()
        == "4 processes on CPUs, 2 nodes (2 each), meeting at n1:29400"
    )
    assert Topology((2, 1), address="n1").words() == (
        "3 processes on GPUs, 2 nodes (2 + 1), meeting at n1:any port"
    )


@given(st.integers(1, 1 << 40), st.integers(0, 9999), st.integers(0, 7))
def test_the_ports_of_a_step_are_ports_and_its_attempts_differ(job, step, attempt):
    assert 20000 <= step_port(job, step, attempt=attempt) < 30000
    assert len({step_port(job, step, attempt=one) for one in range(8)}) == 8
