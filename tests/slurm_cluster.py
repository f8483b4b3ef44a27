"""A real SLURM cluster on this one machine: slurmctld, munged and a slurmd a node, from Debian's packages.

Every node has its own host name, process tree and /dev/shm (Linux namespaces), so that killing it is a power cut.
Nothing outside the given folder is written, and nothing outlives the process that started it.
By hand: `python tests/slurm_cluster.py FOLDER`, then in another shell `export SLURM_CONF=FOLDER/slurm.conf`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")
# FirstJobId: ranks meet at a port that follows from it, which two clusters on a machine must not share.
# cred_expire: a requeued job waits as long (120 s without, and without a word if below 5).
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmdTimeout=20
MessageTimeout=10
TCPTimeout=5
ReturnToService=2
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
# What a node's first process does: its own name, names of all nodes, its own shared memory.
NODE = (
    "hostname {name} && mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm"
    " && exec slurmd -D -N {name} -f {folder}/slurm.conf"
)


class Unavailable(Exception):
    """This machine can't have the cluster; says why."""


def install() -> None:
    """Bring Debian's SLURM and munge onto this machine, unless they are there.

    Raises Unavailable without root, apt or the packages.
    """
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        if os.geteuid() or not shutil.which("apt-get"):
            raise Unavailable(
                f"no {', '.join(missing)}; as root on Debian: apt-get install {' '.join(PACKAGES)}"
            )
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-q", *command], env=environ, capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    if os.geteuid() or subprocess.run(["unshare", "--uts", "--pid", "--mount", "--fork", "true"]).returncode:
        raise Unavailable("namespaces of its own for each node need root")


@dataclass(frozen=True)
class Job:
    """A submitted job: its number and its log."""

    number: int
    log: Path


class Cluster:
    """Nodes n1, n2, ...; `with Cluster(folder, 3) as cluster:` starts them and ends them all."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.names = folder.resolve(), [f"n{i + 1}" for i in range(num_nodes)]
        # Without the launcher variables that a run in this very process has left.
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        self.environ = {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self._write_configuration()
        try:
            self._start("munged", _munged(self.folder))
            wait_for((self.folder / "munge.socket").exists, "munged", self._logs)
            self._start("slurmctld", ["slurmctld", "-D", "-f", self.environ["SLURM_CONF"]])
            for name in self.names:
                self.start_node(name)
            wait_for(lambda: all(self.node_state(n) == "IDLE" for n in self.names), "all nodes", self._logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        lines = [f"127.0.0.{11 + i} {name}\n" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        ports = free_ports(1 + len(self.names))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.{11 + i} Port={port} CPUs=8 RealMemory=8000"
            for i, (name, port) in enumerate(zip(self.names, ports[1:], strict=True))
        )
        text = CONF.format(folder=self.folder, host=socket.gethostname(), ports=ports, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, command: list[str]) -> None:
        # When this process dies, so does the daemon; when a namespace's first process dies, so do all in it.
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdout=log, stderr=log, env=self.environ
            )

    def _logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))

    # ---------------------------------------------------------------------------------------- nodes

    def start_node(self, name: str) -> None:
        space = ["unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child=KILL"]
        self._start(name, [*space, "sh", "-c", NODE.format(name=name, folder=self.folder)])

    def kill_node(self, name: str) -> None:
        """Cut the power of a node: its slurmd and all that runs there are gone at once."""
        self._daemons[name].kill()
        self._daemons[name].wait()

    def node_state(self, name: str) -> str:
        """For instance IDLE, MIXED, DOWN or, while it does not answer, one of these with a *."""
        fields = self.show("node", name)
        return fields["State"].split("+")[0] if fields else ""

    # ---------------------------------------------------------------------------------------- jobs

    def command(self, *command: str, folder: Path | None = None) -> str:
        """What a client command prints, called in `folder`."""
        done = subprocess.run(
            command, cwd=folder, env=self.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def show(self, kind: str, name: str) -> dict[str, str]:
        """The first line of `scontrol show KIND NAME` as a mapping; empty while the controller does not answer."""
        command = ["scontrol", "show", kind, name, "--oneliner"]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=300)
        words = (done.stdout.splitlines() or [""])[0].split() if done.returncode == 0 else []
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def submit(self, *arguments: str, folder: Path) -> Job:
        """`sbatch ARGUMENTS` with its log in `folder`."""
        number = self.command("sbatch", "--parsable", f"--output={folder}/%j.log", *arguments, folder=folder)
        return Job(int(number), folder / f"{number}.log")

    def state(self, job: Job) -> str:
        return self.show("job", str(job.number)).get("JobState", "")

    def restarts(self, job: Job) -> int:
        return int(self.show("job", str(job.number)).get("Restarts", 0))

    def wait(self, job: Job, *states: str) -> str:
        """Wait until the job is in one of `states`; fails with its log if it ends in another. Returns the state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"} - {
            *states
        }  # NODE_FAIL comes before a requeue

        def arrived() -> bool:
            state = self.state(job)
            assert state not in ended, f"{state}, not {' or '.join(states)}\n{read(job.log)}"
            return state in states

        wait_for(arrived, f"job {job.number} {' or '.join(states)}", lambda: read(job.log))
        return self.state(job)


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    paths = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munged.log",
    }
    options = [f"--{option}={folder / name}" for option, name in paths.items()]
    return ["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *options]


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for s in sockets:
            s.bind(("", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else f"{path} does not exist"


def wait_for(arrived: Callable[[], bool], what: str, explain: Callable[[], str] = lambda: "") -> None:
    """Poll until `arrived`; what does not come in ten minutes fails, with the explanation."""
    end = time.monotonic() + 600
    while not arrived():
        assert time.monotonic() < end, f"waited ten minutes for {what}\n{explain()}"
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """A running cluster. Raises Unavailable."""
    install()
    with Cluster(folder, num_nodes) as started:
        yield started


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]), 3):
        print(f"export SLURM_CONF={Path(sys.argv[1]).resolve()}/slurm.conf; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
