"""Where a job runs: how many processes on which nodes, and where they meet; pure.

What says so is flags, SLURM, or the variables that torchrun, accelerate and `lockstep launch` give each
process. A process learns of all of them as torchrun's variables, whoever started it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.host_list import host_names, node_counts
from training.config import UserError

LOOPBACK = "127.0.0.1"
SPECIAL_STEPS = 0xFFFFFFF0  # from here on: the batch script, or a shell of salloc

# What each process is told, by torchrun, accelerate and us alike.
PROCESS_VARIABLES = {
    "RANK": "number of this process among all, from 0",
    "WORLD_SIZE": "processes in all",
    "LOCAL_RANK": "number of this process on its node, from 0; of its GPU too",
    "LOCAL_WORLD_SIZE": "processes on this node",
    "GROUP_RANK": "number of this node, from 0",
    "MASTER_ADDR": "host of process zero, where all meet",
    "MASTER_PORT": "port there",
    "ACCELERATE_USE_CPU": "true: no GPU is used, also where there are some",
}

# What SLURM tells the batch script and a shell of salloc: all that the job was given.
JOB_VARIABLES = {
    "SLURM_JOB_ID": "number of the job",
    "SLURM_JOB_NODELIST": "its nodes: n[1-2]",
    "SLURM_JOB_CPUS_PER_NODE": "cores of each node: 8(x2)",
    "SLURM_GPUS_ON_NODE": "GPUs of this node, all nodes alike: --gpus-per-node, --gres",
    "SLURM_GPUS": "GPUs of all nodes: --gpus",
    "SLURM_GPUS_PER_NODE": "what --gpus-per-node said: a100:8",
    "SLURM_GPUS_PER_TASK": "what --gpus-per-task said: the processes are then those of SLURM_TASKS_PER_NODE",
    "SLURM_NTASKS_PER_GPU": "what --ntasks-per-gpu said, which srun takes together with nothing else",
    "SLURM_NTASKS": "processes of all nodes, where somebody said: --ntasks",
    "SLURM_NTASKS_PER_NODE": "processes of each node, where there are no GPUs: --ntasks-per-node",
    "SLURM_TASKS_PER_NODE": "processes of each node, where nodes differ: 2,1; cores, where nobody said",
}

# What SLURM tells each process that srun starts.
TASK_VARIABLES = {
    "SLURM_STEP_ID": "number of the srun within its job; the batch script has none",
    "SLURM_PROCID": "RANK",
    "SLURM_STEP_NUM_TASKS": "WORLD_SIZE",
    "SLURM_LOCALID": "LOCAL_RANK",
    "SLURM_NODEID": "GROUP_RANK",
    "SLURM_STEP_TASKS_PER_NODE": "LOCAL_WORLD_SIZE of each node: 2(x2)",
    "SLURM_STEP_NODELIST": "nodes of this srun; process zero runs on the first",
}


@dataclass(frozen=True)
class Topology:
    """Nodes and processes of a job, as one of its nodes sees them."""

    processes: tuple[int, ...]
    """processes of each node"""
    node_rank: int = 0
    """number of this node, from 0"""
    address: str = LOOPBACK
    """host of process zero, as the others reach it"""
    port: int = 0
    """port there; 0: one that is free"""
    cpu: bool = False
    """whether GPUs are left alone"""
    cores: int | None = None
    """cores of a process that a scheduler gave; None: nobody said"""
    gpus: int = 0
    """GPUs of each node that srun has to ask for, as nothing else does"""

    @property
    def nodes(self) -> int:
        """Machines."""
        return len(self.processes)

    @property
    def world(self) -> int:
        """Processes of all nodes together."""
        return sum(self.processes)

    @property
    def local(self) -> int:
        """Processes of this node."""
        return self.processes[self.node_rank]

    @property
    def first_rank(self) -> int:
        """Number of this node's first process."""
        return sum(self.processes[: self.node_rank])

    def variables(self, local_rank: int) -> dict[str, str]:
        """PROCESS_VARIABLES of one process of this node."""
        variables = {
            "RANK": str(self.first_rank + local_rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.local),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }
        return variables | ({"ACCELERATE_USE_CPU": "true"} if self.cpu else {})

    def words(self) -> str:
        """The same for a person, in a line."""
        on = ("CPU" if self.cpu else "GPU") + "s" * (self.world > 1)
        processes = f"{self.world} process{'es' * (self.world > 1)} on {on}"
        if self.nodes == 1:
            return processes
        alike = len(set(self.processes)) == 1
        share = f"{self.local} each" if alike else " + ".join(map(str, self.processes))
        return (
            f"{processes}, {self.nodes} nodes ({share}), meeting at {self.address}:{self.port or 'any port'}"
        )


def of_slurm_job(env: Mapping[str, str]) -> Topology:
    """What SLURM gave to the job whose batch script, or salloc shell, has this environment; USAGE.

    A process for each GPU, else as many as --ntasks-per-node or --ntasks says, else one for each node.
    """
    _number(env, "SLURM_JOB_ID")
    hosts = host_names(_given(env, "SLURM_JOB_NODELIST"), name="SLURM_JOB_NODELIST")
    gpus = _job_gpus(env, len(hosts))
    by_task = bool(env.get("SLURM_GPUS_PER_TASK") and env.get("SLURM_NTASKS"))
    processes = [gpus] * len(hosts) if gpus and not by_task else _job_tasks(env, len(hosts))
    cores = node_counts(_given(env, "SLURM_JOB_CPUS_PER_NODE"), name="SLURM_JOB_CPUS_PER_NODE")
    for name, each in (("SLURM_TASKS_PER_NODE", processes), ("SLURM_JOB_CPUS_PER_NODE", cores)):
        if len(each) != len(hosts) or min(each) < 1:
            raise _contradiction(env, "SLURM_JOB_NODELIST", name)
    share = min(has // runs for has, runs in zip(cores, processes, strict=True))
    # With --exclusive a job has all GPUs, its steps those that they ask for; and srun itself repeats what
    # these variables say, in the same words or not at all.
    asked = any(env.get(name) for name in ("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK"))
    return Topology(tuple(processes), address=hosts[0], cpu=not gpus, cores=share, gpus=0 if asked else gpus)


def _job_gpus(env: Mapping[str, str], nodes: int) -> int:
    """GPUs of each node."""
    total = _gpus_of(env.get("SLURM_GPUS", ""))
    if env.get("SLURM_GPUS_ON_NODE"):
        gpus = _number(env, "SLURM_GPUS_ON_NODE")
    else:  # a shell of salloc runs on no node of the job: it is told only what was asked for
        gpus = _gpus_of(env.get("SLURM_GPUS_PER_NODE", "")) or total // nodes
    if gpus and env.get("SLURM_NTASKS_PER_GPU"):
        raise UserError(
            "--ntasks-per-gpu: srun takes no other number of processes beside it",
            mend="leave it out: each GPU gets one process",
            code="USAGE",
        )
    if total and total != gpus * nodes:
        raise UserError(
            f"--gpus {env['SLURM_GPUS'][:80]}: SLURM gave {gpus} of them to the first of {nodes} nodes",
            mend="ask for the same number on each node, with --gpus-per-node",
            code="USAGE",
        )
    return gpus


def _gpus_of(text: str) -> int:
    """The number in 4, a100:4, or a100:2,v100:2."""
    return sum(int(one) for one in re.findall(r"(?:^|[,:])([0-9]{1,6})(?=,|$)", text[:1000]))


def _job_tasks(env: Mapping[str, str], nodes: int) -> list[int]:
    """Processes of each node, as --ntasks-per-node and --ntasks say."""
    total = _number(env, "SLURM_NTASKS") if env.get("SLURM_NTASKS") else 0
    if env.get("SLURM_NTASKS_PER_NODE"):
        each = _number(env, "SLURM_NTASKS_PER_NODE")
        if each < 1 or total % each:
            raise _contradiction(env, "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
        return [each] * nodes
    # SLURM_TASKS_PER_NODE is as many as there are cores, with --exclusive and no word on tasks.
    return (
        node_counts(_given(env, "SLURM_TASKS_PER_NODE"), name="SLURM_TASKS_PER_NODE")
        if total
        else [1] * nodes
    )


def by_srun(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process: no batch script, and no shell of salloc, which may be a step."""
    return bool(env.get("SLURM_STEP_ID")) and _number(env, "SLURM_STEP_ID") < SPECIAL_STEPS


def of_slurm_task(env: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like for a process that srun has started; nothing for any other process; USAGE.

    Where somebody else has set them (torchrun under srun), those hold.
    """
    if "RANK" in env or "WORLD_SIZE" in env or not by_srun(env):
        return {}
    hosts = host_names(_given(env, "SLURM_STEP_NODELIST"), name="SLURM_STEP_NODELIST")
    name = "SLURM_STEP_TASKS_PER_NODE"
    processes = node_counts(_given(env, name), name=name)
    world, rank = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    node, local = _number(env, "SLURM_NODEID"), _number(env, "SLURM_LOCALID")
    if len(processes) != len(hosts) or sum(processes) != world or rank >= world:
        raise _contradiction(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", name)
    if node >= len(hosts) or local >= processes[node]:
        raise _contradiction(env, "SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", name)
    if world == 1:
        return {}
    chosen = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") else 0
    port = chosen or step_port(_number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID"))
    address = env.get("MASTER_ADDR") or hosts[0]
    topology = Topology(tuple(processes), node, address, port)
    # SLURM may deal processes out in turns, so RANK is what it says, not what the order of nodes would give.
    return topology.variables(local) | {"RANK": str(rank)}


def step_port(job: int, step: int, *, attempt: int = 0) -> int:
    """Where the processes of one srun meet, unless it is taken: then the next attempt's port."""
    return 20000 + (job * 131 + step * 17 + attempt * 1013) % 10000


def _given(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise UserError(
            f"{name} is not set, though SLURM_JOB_ID is",
            mend="start inside of sbatch, salloc or srun, which set it",
            code="USAGE",
        )
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _given(env, name)
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UserError(
            f"{name}={text[:80]!r} is no number",
            mend="start inside of sbatch, salloc or srun, which set it",
            code="USAGE",
        )
    return int(text)


def _contradiction(env: Mapping[str, str], *names: str) -> UserError:
    said = ", ".join(f"{name}={env.get(name, '')[:80]}" for name in names)
    return UserError(
        f"what SLURM says of this job does not go together: {said}",
        mend="start inside of sbatch, salloc or srun, without setting SLURM's variables yourself",
        code="USAGE",
    )
