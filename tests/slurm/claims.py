"""Which of the clusters that this machine has room for is ours, and the end of what a dead owner left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MOST = 16  # clusters side by side
OWNER = "LOCKSTEP_SLURM_CLUSTER"  # in the environment of all processes of a cluster: its folder
FREEZER = Path("/sys/fs/cgroup/freezer")
NETWORK = Path("/sys/class/net")
HOSTS = Path("/etc/hosts")


def claim():
    """The number of a cluster that nobody has, and what holds the claim; what dead owners left is removed.

    None where all are taken. The claim is a name that goes with the process that holds it, however that ends.
    """
    ours = None
    for number in range(MOST):
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0lockstep-slurm-{number}")
        except OSError:
            holder.close()
            continue
        clear(number)
        if ours is None:
            ours = (number, holder)
        else:
            holder.close()
    return ours


def search_path():
    """PATH with the programs of this virtual environment first, and the daemons' folder."""
    given = os.environ.get("PATH", os.defpath)
    return os.pathsep.join([str(Path(sys.executable).parent), given, "/usr/sbin", "/sbin"])


def folder_of(number):
    """Where a cluster has its files: bridges, cgroups and ports are the machine's, so this is no TMPDIR."""
    return Path(f"/run/lockstep-slurm-{number}")


def prefix(number):
    """What all names of a cluster that the machine knows begin with."""
    return f"ls{number}"


def clear(number):
    """End all processes of a cluster and remove its bridge, cgroups and files; by its owner only."""
    folder = folder_of(number)
    if not folder.exists():
        return
    kill(f"{OWNER}={folder}")
    for link in [*NETWORK.glob(f"{prefix(number)}n*"), *NETWORK.glob(prefix(number))]:
        # One that hangs in a node's namespace goes with that, now or in a moment.
        command = ["ip", "link", "del", link.name]
        subprocess.run(command, env={"PATH": search_path()}, capture_output=True, check=False)
    for group in FREEZER.glob(f"slurm_{prefix(number)}n*"):
        _remove_group(group)
    forget_names(folder)
    shutil.rmtree(folder)


def with_variable(setting):
    """Every living process, on any node, that was started with NAME=VALUE in its environment."""
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [number for number in numbers if setting.encode() in _environment(number)]


def _environment(number):
    """The variables of a process; none of one that is gone or dead."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            return Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    return []


def kill(setting, *, within=10):
    """SIGKILL to all processes with NAME=VALUE in their environment, until there are none.

    A process is looked at through a handle that cannot come to mean another one of the same number.
    """
    end = time.monotonic() + within
    while found := with_variable(setting):
        assert time.monotonic() < end, f"processes that SIGKILL does not end: {found}"
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(number)
                try:
                    if setting.encode() in _environment(number):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                        select.select([handle], [], [], 1)
                finally:
                    os.close(handle)


def _remove_group(group):
    """A cgroup's folder goes once its last process is reaped."""
    inner = [path for path in group.rglob("*") if path.is_dir()]
    for folder in [*sorted(inner, reverse=True), group]:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)


def remember_names(folder, line):
    """Add a line to this machine's /etc/hosts, where nodes cannot have one of their own."""
    with _hosts() as file:
        text = file.read()
        file.write(("" if text.endswith("\n") else "\n") + f"{line} # {folder}\n")


def forget_names(folder):
    """Take it out again."""
    with _hosts() as file:
        lines = file.read().splitlines(keepends=True)
        kept = [line for line in lines if not line.endswith(f" # {folder}\n")]
        if kept != lines:
            # In place: in containers it is mounted, and cannot be replaced.
            file.seek(0)
            file.write("".join(kept))
            file.truncate()


@contextlib.contextmanager
def _hosts():
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
