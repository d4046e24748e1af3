"""Machines of their own, as far as network, host name and processes go, that share this one's disk.

Each is a process in namespaces of its own that ends with whoever started it; the kernel then ends all others
in there and takes the network down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SETS_AT_ONCE = 30
SPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
# The first process of a host. What it reads ends when its starter does.
FIRST = 'mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && echo ready && exec cat'


class Host(NamedTuple):
    """A machine; `number` is that of its first process."""

    name: str
    address: str
    first: subprocess.Popen
    number: int
    link: str

    def under(self, folder):
        """What stands before a command that runs on this host, in this folder."""
        inside = ["nsenter", "--target", self.number, "--net", "--uts", "--mount", "--pid", "--"]
        return [*map(str, inside), "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]

    def cut(self):
        """Pull the cable out."""
        _ip("link", "set", self.link, "down")

    def heal(self):
        """Put it back."""
        _ip("link", "set", self.link, "up")

    def crash(self):
        """All at once, as where the power fails: nobody says goodbye."""
        self.cut()
        os.kill(self.number, 9)
        self.first.wait()


def missing():
    """Why there can be no hosts here; nothing where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "namespaces need root"
    absent = [
        name for name in ("ip", "unshare", "nsenter", "mount", "hostname") if shutil.which(name) is None
    ]
    if absent:
        return f"not installed: {', '.join(absent)}"
    links = "ip link add probe type bridge && ip link add type veth"
    done = subprocess.run(
        ["unshare", *SPACES, "sh", "-c", links], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare fails"


@contextlib.contextmanager
def hosts(*names, own=None):
    """`with hosts("h1", "h2") as (h1, h2)`: that they know one another, and `own` as their own address."""
    with contextlib.ExitStack() as later, tempfile.TemporaryDirectory() as folder:
        index = _free_index(later)
        bridge, network = f"lsh{index}", f"10.{100 + index}.0"
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)  # of one that was killed
        _ip("link", "add", bridge, "type", "bridge")
        later.callback(_ip, "link", "del", bridge)
        _ip("link", "set", bridge, "up")
        addresses = {name: f"{network}.{number}" for number, name in enumerate(names, 1)}
        found = []
        for number, (name, address) in enumerate(addresses.items(), 1):
            known = addresses | ({name: own} if own else {})
            table = Path(folder) / name
            table.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {who}\n" for who, at in known.items()))
            first = _first(later, table, name)
            host = Host(name, address, first, _child(first.pid), f"{bridge}-{number}")
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", host.link)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.number)
            _ip("link", "set", host.link, "master", bridge, "up")
            inside = ("nsenter", "--target", str(host.number), "--net")
            _ip("addr", "add", f"{address}/24", "dev", "eth0", under=inside)
            _ip("link", "set", "eth0", "up", under=inside)
            found.append(host)
        yield found


def _first(later, table, name):
    command = ["unshare", *SPACES, "sh", "-c", FIRST, "host", str(table), name]
    first = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    later.callback(_end, first)
    assert first.stdout.readline() == b"ready\n", f"no host {name} came up"
    return first


def _end(first):
    first.stdin.close()
    first.wait()
    first.stdout.close()


def _child(number):
    """The process that `unshare --fork` has started."""
    (child,) = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return int(child)


def _free_index(later):
    """A number that no other test run on this machine has now; the claim goes with the process."""
    for index in range(SETS_AT_ONCE):
        claim = later.enter_context(socket.socket(socket.AF_UNIX))
        with contextlib.suppress(OSError):
            claim.bind(f"\0lockstep-hosts-{index}")
            return index
    raise AssertionError(f"{SETS_AT_ONCE} sets of hosts are there")


def _ip(*words, under=()):
    subprocess.run([*under, "ip", *map(str, words)], check=True, capture_output=True)
