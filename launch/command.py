"""Which programs start a job: Topology and the arguments of training/run.py to argv and variables; pure."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.topology import Topology
from training.config import UserError


@dataclass(frozen=True)
class Command:
    """A program's arguments, and the variables that it needs beside the environment."""

    argv: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The same as typed into a shell."""
        set_before = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*set_before, shlex.join(self.argv)])


def process_commands(topology: Topology, program: str, words: Sequence[str]) -> list[Command]:
    """One for each process of this node; what torchrun would set is set."""
    argv = (sys.executable, program, *words)
    return [Command(argv, topology.variables(local)) for local in range(topology.local)]


def accelerate_command(topology: Topology, program: str, words: Sequence[str]) -> Command:
    """`accelerate launch` of this node's processes.

    It takes --num_processes for processes only with --multi_gpu, also where there is no GPU. USAGE where
    nodes have different numbers of processes, which it cannot be told.
    """
    if len(set(topology.processes)) > 1:
        counts = " + ".join(map(str, topology.processes))
        raise UserError(
            f"accelerate starts as many processes on each node, not {counts}",
            mend="give all nodes the same --processes-per-node, or leave out --with accelerate",
            code="USAGE",
        )
    argv = [sys.executable, "-m", "accelerate.commands.launch"]
    if topology.world > 1:
        argv += ["--multi_gpu", "--num_machines", str(topology.nodes), "--num_processes", str(topology.world)]
        argv += ["--machine_rank", str(topology.node_rank), "--main_process_port", str(topology.port)]
        argv += ["--same_network", "--main_process_ip", topology.address] if topology.nodes > 1 else []
    else:
        argv += ["--num_processes", "1"] + (["--cpu"] if topology.cpu else [])
    # Said explicitly, or it warns of its defaults; precision is a matter of the run's configuration.
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return Command((*argv, program, *words), _agent_variables(topology))


def torchrun_command(topology: Topology, program: str, words: Sequence[str]) -> Command:
    """`torchrun` of this node's processes."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(topology.local)]
    argv += ["--nnodes", str(topology.nodes), "--node_rank", str(topology.node_rank)]
    argv += ["--master_addr", topology.address, "--master_port", str(topology.port)]
    return Command((*argv, program, *words), _agent_variables(topology))


def _agent_variables(topology: Topology) -> dict[str, str]:
    """What makes torchrun, also inside of accelerate, pass signals on and wait for the last checkpoint.

    By itself it dies of SIGUSR1, and kills its processes 30 seconds after SIGTERM.
    """
    variables = {
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    }
    variables |= {"ACCELERATE_USE_CPU": "true"} if topology.cpu else {}
    return variables


def srun_command(topology: Topology, program: str, words: Sequence[str]) -> Command:
    """`srun` of one process a task, on all nodes of the job at once.

    Without an agent in between, signals reach the processes and exit codes come back. SLURM hands
    --cpus-per-task of the job not on to its steps, so it is said again.
    """
    argv = ["srun", "--nodes", str(topology.nodes), "--ntasks", str(topology.world)]
    if len(set(topology.processes)) == 1:
        argv += ["--ntasks-per-node", str(topology.local)]
    cores = topology.cores or 0
    argv += ["--cpus-per-task", str(cores)] if cores else ["--overcommit"]
    argv += ["--gres", f"gpu:{topology.gpus}"] if topology.gpus else []
    argv += ["--kill-on-bad-exit=1", "--export=ALL", "--input=none"]
    # Not srun's --unbuffered: that gives each process a terminal, and the log what is drawn on one.
    variables = {"PYTHONUNBUFFERED": "1"} | ({"ACCELERATE_USE_CPU": "true"} if topology.cpu else {})
    return Command((*argv, sys.executable, program, *words), variables)


Make = Callable[[Topology, str, Sequence[str]], Command]

# What `lockstep launch --with NAME` starts instead of the processes themselves.
LAUNCHERS: dict[str, Make] = {
    "accelerate": accelerate_command,
    "torchrun": torchrun_command,
    "srun": srun_command,
}
