"""A real SLURM cluster on this machine, for a test session: munged, slurmctld and two slurmd on ports of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# as names these resolve on every Linux machine, unlike n1 and n2: ranks find the first node as they would elsewhere
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# two nodes of two cores, whatever this machine has
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
JobRequeue=1
ReturnToService=2
# what takes minutes on a real cluster takes seconds here
SlurmdTimeout=5
KillWait=4
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/%n.log
SlurmctldLogFile={folder}/slurmctld.log
"""


class Cluster:
    """The cluster, and what its users do with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        world = ("SLURM", "SBATCH", "SRUN", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CLUSTER_ENV")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(world)}
        self.env["PATH"] += ":/usr/sbin:/sbin"
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the daemons; return when both nodes are idle."""
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        conf = CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], ports=_ports(3), nodes=NODES)
        (self.folder / "slurm.conf").write_text(conf)
        # --force: the socket's folder need not be open to other users
        at = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
              "seed-file": "munged.seed"}  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in at.items()))
        _wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged", self.folder / "munged.log")
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def _daemon(self, name: str, *args: str, key: str = "") -> None:
        with open(self.folder / f"{key or name}.out", "ab") as out:
            self.daemons[key or name] = subprocess.Popen(
                [name, *args], env=self.env, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, the first time or after `kill_node`."""
        self._daemon("slurmd", "-D", "-N", node, key=node)

    def kill_node(self, node: str) -> None:
        """kill -9 of all that a node runs, as a power cut would: slurmd, its step daemons, then the tasks."""
        self.daemons[node].kill()
        tasks = [p for p in _processes_with(f"SLURM_CONF={self.folder}/") if f"SLURMD_NODENAME={node}" in _environ(p)]
        step_daemons = {parent for p in tasks for parent in _parents(p) if "slurmstepd" in _command(parent)}
        assert tasks and step_daemons, f"nothing to kill on {node}"
        for pid in [*step_daemons, *tasks]:
            _kill(pid)
        self.daemons[node].wait()

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until both nodes can take a job."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES)

        _wait_until(idle, timeout, "two idle nodes", self.folder / "slurmctld.log")

    def stop(self) -> None:
        """Stop everything that was started, and whatever it left behind."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        left = set(_processes_with(f"SLURM_CONF={self.folder}/"))
        left |= {parent for p in left for parent in _parents(p) if "slurmstepd" in _command(parent)}
        for pid in left - {os.getpid()}:
            _kill(pid)

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Run one of SLURM's commands; return what it printed."""
        done = subprocess.run(command, cwd=ROOT, env=self.env | (env or {}), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, settings: Path, *args: str | Path, env: dict[str, str] | None = None) -> str:
        """`source SETTINGS && sbatch ARGS`, as the README says; return the job's number."""
        command = 'source "$CLUSTER_ENV" && exec sbatch --parsable "$@"'
        out = self.run("bash", "-c", command, "-", *map(str, args), env={"CLUSTER_ENV": str(settings)} | (env or {}))
        return out.splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finished(self, job: str, log: Path, timeout: float = 120) -> dict[str, str]:
        """Wait for a job's end; return `scontrol`'s last word. A hang is cancelled and fails the test."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            info = self.job(job)
            if info["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"):
                return info
            self.restart(job)
            time.sleep(0.3)
        self.run("scancel", job)
        raise AssertionError(f"job {job} is {info['JobState']} after {timeout} s:\n{_tail(log)}")

    def restart(self, job: str) -> bool:
        """If the job was requeued, start it, which SLURM would do in two minutes; tell whether it was."""
        info = self.job(job)
        if (info["JobState"], info["Reason"]) != ("PENDING", "BeginTime"):
            return False
        time.sleep(2)  # a job that starts in the second in which it was requeued is taken for a revoked one
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        return True

    def wait_for(self, condition, what: str, log: Path, timeout: float = 60) -> None:
        """Wait until something is so in a running job; a hang fails the test with the job's log."""
        _wait_until(condition, timeout, what, log)


def start_cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster for a session; skips where it can't be had, but not in continuous integration."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    reason = "needs root" if os.geteuid() else f"{', '.join(missing)} not installed" if missing else ""
    if reason:
        reason = f"no SLURM cluster: {reason} (apt-get install slurm-wlm munge)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _wait_until(condition, timeout: float, what: str, log: Path) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} after {timeout} s:\n{_tail(log)}"
        time.sleep(0.1)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else f"({log} does not exist)"


def _processes_with(variable: str) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if variable in _environ(int(p.name))]


def _environ(pid: int) -> str:
    return _proc(pid, "environ")


def _command(pid: int) -> str:
    return _proc(pid, "cmdline")


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def _parents(pid: int) -> Iterator[int]:
    while pid > 1:
        stat = _proc(pid, "stat")
        if not stat:
            return
        pid = int(stat.rpartition(")")[2].split()[1])
        yield pid


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
