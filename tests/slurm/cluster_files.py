"""The files that a SLURM of our own reads: what is said in them, and why."""

from __future__ import annotations

import socket
from typing import NamedTuple

CPUS, MEMORY, GPUS = 16, 8000, 8  # that each node claims to have
KILL_WAIT = 10  # seconds from SIGTERM to SIGKILL


class Node(NamedTuple):
    """A host of the cluster."""

    name: str
    address: str
    port: int
    host: str  # what `hostname` says there


def slurm_conf(folder, *, name, controller, port, first_job, nodes, process_tracking):
    """The text of slurm.conf."""
    # A requeued job waits for cred_expire, 120 seconds by default. A job that sleeps until a node is back, or
    # waits for a lost one, is found by pings every third of SlurmdTimeout.
    lines = f"""
        ClusterName={name}
        SlurmctldHost={socket.gethostname().partition(".")[0]}({controller})
        SlurmctldPort={port}
        SlurmUser=root
        SlurmdUser=root
        AuthType=auth/munge
        AuthInfo=socket={folder}/munge/socket,cred_expire=5
        CredType=cred/munge
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool/%n
        SlurmctldPidFile={folder}/spool/slurmctld.pid
        SlurmdPidFile={folder}/spool/slurmd-%n.pid
        SlurmctldLogFile={folder}/log/slurmctld.log
        SlurmdLogFile={folder}/log/slurmd-%n.log
        SlurmctldDebug=verbose
        SlurmdDebug=verbose
        MailProg=/bin/true
        ProctrackType=proctrack/{process_tracking}
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        AccountingStorageType=accounting_storage/none
        MpiDefault=none
        SwitchType=switch/none
        SchedulerType=sched/backfill
        SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        PreemptType=preempt/partition_prio
        PreemptMode=REQUEUE
        JobRequeue=1
        FirstJobId={first_job}
        KillWait={KILL_WAIT}
        CompleteWait=0
        MinJobAge=3600
        InactiveLimit=0
        SlurmctldTimeout=30
        SlurmdTimeout=10
        ReturnToService=2
        SlurmdParameters=config_overrides
        GresTypes=gpu
    """
    lines = [line.strip() for line in lines.strip().splitlines()]
    hardware = f"CPUs={CPUS} RealMemory={MEMORY} Gres=gpu:{GPUS} State=UNKNOWN"
    for node in nodes:
        where = f"NodeAddr={node.address} NodeHostname={node.host} Port={node.port}"
        lines.append(f"NodeName={node.name} {where} {hardware}")
    everywhere = f"Nodes={','.join(node.name for node in nodes)} MaxTime=INFINITE State=UP"
    lines += [
        f"PartitionName=low {everywhere} Default=YES PriorityTier=1 GraceTime=0",
        f"PartitionName=grace {everywhere} Default=NO PriorityTier=1 GraceTime=15",
        f"PartitionName=high {everywhere} Default=NO PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(folder):
    """GPUs that are none: slurmd wants character devices, and links to /dev/null are such."""
    return f"Name=gpu File={folder}/gpu/g[0-{GPUS - 1}]\n"


def cgroup_conf(process_tracking, version):
    """slurmd looks for cgroups also where they track no processes, and ends where it finds none.

    Naming the plug-in spares it that look; from 23.11 on it can be turned off.
    """
    if process_tracking != "cgroup" and version >= (23, 11):
        return "CgroupPlugin=disabled\n"
    return "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def hosts_text(nodes, controller):
    """The nodes' /etc/hosts."""
    names = [f"{node.address} {node.name}" for node in nodes]
    here = socket.gethostname()
    controller_line = f"{controller} {' '.join(dict.fromkeys([here, here.partition('.')[0]]))}"
    return "\n".join(["127.0.0.1 localhost", controller_line, *names]) + "\n"
