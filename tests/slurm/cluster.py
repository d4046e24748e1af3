"""A real SLURM on this machine: two hosts with names and addresses of their own, and what tests ask of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.slurm.claims import (
    FREEZER,
    OWNER,
    clear,
    folder_of,
    prefix,
    remember_names,
    search_path,
    with_variable,
)
from tests.slurm.cluster_files import GPUS, Node, cgroup_conf, gres_conf, hosts_text, slurm_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "unshare", "bash")
PACKAGES = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
READY = 30  # seconds for all daemons
WITHIN = 200  # seconds for anything, on a machine that is busy with others

# A process becomes a host: network, name, /etc/hosts and process numbers of its own. The shell is the first
# process there and takes in orphans; all end with it.
HOST = """
mount --bind "$1" /etc/hosts
hostname "$2"
until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
ip addr add "$3/24" dev eth0
ip link set lo up
shift 3
"$@" & wait $!
"""
ISOLATED = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def missing():
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"not installed: {', '.join(lacking)} ({PACKAGES})" if lacking else ""


def has_namespaces():
    """Whether hosts with networks of their own are possible."""
    env = {"PATH": search_path()}
    done = subprocess.run([*ISOLATED, "true"], env=env, capture_output=True, check=False, timeout=20)
    return done.returncode == 0


class Cluster:
    """Two nodes; the caller holds the claim on `number`. `up` before anything else, `down` in the end."""

    def __init__(self, number, *, isolated=True):
        self.number, self.isolated = number, isolated
        self.folder = folder_of(number)
        self.bridge = prefix(number)
        self.controller = f"198.18.{number}.254" if isolated else "127.0.0.1"
        here = socket.gethostname().partition(".")[0]
        self.nodes = {}
        for one in (1, 2):
            name = f"{self.bridge}n{one}"
            address = f"198.18.{number}.{one}" if isolated else "127.0.0.1"
            self.nodes[name] = Node(name, address, 17100 + 10 * number + one, name if isolated else here)
        self.process_tracking = "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"
        self.daemons = {}

    # Coming and going.

    def up(self):
        """Start it; the nodes are ready for jobs then. RuntimeError with the logs' ends where it is not."""
        for name in ("munge", "state", "spool", "log", "gpu"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        for number in range(GPUS):
            (self.folder / "gpu" / f"g{number}").symlink_to("/dev/null")
        nodes = list(self.nodes.values())
        texts = {
            "slurm.conf": slurm_conf(
                self.folder,
                name=self.bridge,
                controller=self.controller,
                port=17000 + self.number,
                first_job=1000 * (self.number + 1),
                nodes=nodes,
                process_tracking=self.process_tracking,
            ),
            "gres.conf": gres_conf(self.folder),
            "cgroup.conf": cgroup_conf(self.process_tracking, self._version()),
            "hosts": hosts_text(nodes, self.controller),
        }
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        if self.isolated:
            self._ip("link", "add", self.bridge, "type", "bridge")
            self._ip("addr", "add", f"{self.controller}/24", "dev", self.bridge)
            self._ip("link", "set", self.bridge, "up")
        else:
            remember_names(self.folder, f"127.0.0.1 {' '.join(self.nodes)}")
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for name in self.nodes:
            self._start_node(name)
        self._await(self._idle, within=READY)

    def down(self):
        """End it; of its processes, links, cgroups and files nothing is left."""
        clear(self.number)
        for daemon in self.daemons.values():
            daemon.wait()

    def _start_munge(self):
        names = {
            "key-file": "key",
            "socket": "socket",
            "log-file": "log",
            "pid-file": "pid",
            "seed-file": "seed",
        }
        places = [f"--{option}={self.folder}/munge/{name}" for option, name in names.items()]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *places)
        self._await((self.folder / "munge" / "socket").is_socket, within=READY)

    def _start_node(self, name):
        node = self.nodes[name]
        command = ["slurmd", "-D", "-f", self.folder / "slurm.conf", "-N", name]
        if self.isolated:
            host = [self.folder / "hosts", name, node.address]
            command = [*ISOLATED, "bash", "-c", HOST, "host", *host, *command]
        daemon = self._start(f"slurmd-{name}", *command)
        if self.isolated:
            ours = os.readlink("/proc/self/ns/net")  # noqa: PTH115 - it names no file
            space = f"/proc/{daemon.pid}/ns/net"
            self._await(lambda: os.readlink(space) != ours, within=READY)  # noqa: PTH115
            self._ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", daemon.pid)
            self._ip("link", "set", name, "master", self.bridge, "up")

    def _start(self, name, *command):
        with (self.folder / "log" / f"{name}.out").open("ab") as said:
            self.daemons[name] = subprocess.Popen(
                [str(word) for word in command],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        return self.daemons[name]

    def _version(self):
        """(22, 5) of `slurm-wlm 22.05.8`."""
        said = subprocess.run(["slurmd", "-V"], env={"PATH": search_path()}, capture_output=True, check=True)
        return tuple(map(int, re.search(rb"(\d+)\.(\d+)", said.stdout).groups()))

    def _idle(self):
        states = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False)
        return states.split() == ["idle"] * len(self.nodes)

    def rest(self):
        """Cancel what is there, and wait until all nodes have nothing to do."""
        for job in self.call("squeue", "--noheader", "--format=%A").split():
            self.call("scancel", job, check=False)
        self._await(self._idle, within=WITHIN)

    def _await(self, look, *, within):
        end = time.monotonic() + within
        while not look():
            if time.monotonic() > end:
                raise RuntimeError(f"SLURM is not ready:\n{self.logs()}")
            time.sleep(0.05)

    def _ip(self, *words):
        subprocess.run(["ip", *map(str, words)], env={"PATH": search_path()}, check=True)

    def logs(self):
        """The ends of the daemons' logs."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    # Jobs.

    def environment(self, **more):
        """What the shell that submits has, and with it every job: nothing of this machine's set-up."""
        known = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
        ours = {"SLURM_CONF": f"{self.folder}/slurm.conf", OWNER: str(self.folder), "PATH": search_path()}
        return {**known, **ours, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}

    def call(self, *words, env=None, cwd=None, check=True, within=60):
        """What a command of SLURM says."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment(**(env or {})),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words, script=None, options=(), env=None, cwd=None):
        """The number of the new job: `sbatch OPTIONS SCRIPT WORDS`."""
        middle = [] if script is None else [script]
        return self.call("sbatch", "--parsable", *options, *middle, *words, env=env, cwd=cwd).strip()

    def info(self, job):
        """What SLURM knows of a job, or of an array's task (JOB_TASK), by name."""
        said = self.call("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", said.partition("\n")[0]))

    def wait(self, job, states=ENDED, *, within=WITHIN):
        """The same once the job's state is one of `states`."""
        return self.wait_for(
            lambda: (now := self.info(job)).get("JobState") in states and now, job, within=within
        )

    def wait_for(self, look, job, *, within=WITHIN):
        """The first truthy answer of `look`; what the job said where it ends, or time does, without one."""
        end = time.monotonic() + within
        while True:
            over = self.info(job).get("JobState") in ENDED or time.monotonic() > end
            if answer := look():
                return answer
            if over:
                raise AssertionError(f"job {job}: {self.info(job)}\n{self.log(job)[-5000:]}")
            time.sleep(0.1)

    def log(self, job):
        """What all starts of a job have said so far."""
        path = Path(self.info(job).get("StdOut", "-"))
        return path.read_text(errors="replace") if path.is_file() else ""

    def processes(self, job):
        """The living processes of a job on any node: the batch step's and the ranks, and their children."""
        return with_variable(f"SLURM_JOB_ID={self.info(job)['JobId']}")

    # Misfortunes.

    def cut(self, node):
        """Pull the cable of a node."""
        self._ip("link", "set", node, "down")

    def heal(self, node):
        """Plug it in again."""
        self._ip("link", "set", node, "up")

    def crash(self, node):
        """The power of a node fails: all that runs there is gone at once."""
        assert self.isolated, "nodes that are no hosts of their own cannot fail alone"
        daemon = self.daemons[f"slurmd-{node}"]
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def revive(self, within=WITHIN):
        """Nodes that have crashed come back; ready for jobs."""
        for name in self.nodes:
            if self.daemons[f"slurmd-{name}"].poll() is not None:
                self._start_node(name)

        def whole():
            states = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False)
            return set(states.split()) <= {"idle", "mixed", "allocated", "completing"}

        self._await(whole, within=within)
