"""A real SLURM cluster on this machine, for a test session: munged, slurmctld and a slurmd for each node on ports of their
own; and a test's site on it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, metrics_of, tiny_config

STEPS = 48  # of a site's training on two ranks: long enough to be hit in the middle
# as names these resolve on every Linux machine, unlike n1 and n2: ranks find the first node as they would elsewhere
NODES = ("127.0.0.1", "127.0.0.2")
THREE_NODES = (*NODES, "127.0.0.3")
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
# nodes of two cores, whatever this machine has
SlurmdParameters=config_overrides
{nodes}
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

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"


class Cluster:
    """The cluster, and what its users do with it."""

    def __init__(self, folder: Path, nodes: tuple[str, ...] = NODES):
        self.folder, self.nodes = folder, nodes
        world = ("SLURM", "SBATCH", "SRUN", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CLUSTER_ENV")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(world)}
        self.env["PATH"] += ":/usr/sbin:/sbin"
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the daemons; return when all nodes are idle."""
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        host, ports = socket.gethostname().split(".")[0], _ports(1 + len(self.nodes))
        nodes = "\n".join(NODE.format(name=n, host=host, port=p) for n, p in zip(self.nodes, ports[1:], strict=True))
        conf = CONF.format(folder=self.folder, host=host, ports=ports, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        # --force: the socket's folder need not be open to other users
        at = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
              "seed-file": "munged.seed"}  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in at.items()))
        _wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged", self.folder / "munged.log")
        self._daemon("slurmctld", "-D", "-i")
        for node in self.nodes:
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
        tasks = [p for p in processes_with(f"SLURM_CONF={self.folder}/") if f"SLURMD_NODENAME={node}" in environ_of(p)]
        step_daemons = {parent for p in tasks for parent in _parents(p) if "slurmstepd" in command_of(parent)}
        assert tasks and step_daemons, f"nothing to kill on {node}"
        for pid in [*step_daemons, *tasks]:
            _kill(pid)
        self.daemons[node].wait()

    def kill_slurmd(self, node: str) -> None:
        """kill -9 of a node's slurmd alone: its step daemons and tasks live on, out of SLURM's reach."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until all nodes can take a job."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.nodes)

        _wait_until(idle, timeout, f"{len(self.nodes)} idle nodes", self.folder / "slurmctld.log")

    def stop(self) -> None:
        """Stop everything that was started, and whatever it left behind."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        left = set(processes_with(f"SLURM_CONF={self.folder}/"))
        left |= {parent for p in left for parent in _parents(p) if "slurmstepd" in command_of(parent)}
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


class Site:
    """A test's own settings, configuration and logs; what it submits has two nodes."""

    def __init__(self, cluster: Cluster, folder: Path, data_root: Path, **settings: str):
        self.cluster, self.folder = cluster, folder
        self.run_dir, self.logs = folder / "run", folder / "logs"
        self.config, self.settings = folder / "tiny.yaml", folder / "site.env"
        config = tiny_config(data_root, self.run_dir)
        never = 1000  # what is saved and evaluated is said by each test, or is the end
        config["train"] |= {"epochs": 100, "max_steps": STEPS}
        config |= {"eval": {"every_epochs": never}, "checkpoint": {"every_epochs": never}}
        self.config.write_text(yaml.safe_dump(config))
        lines = ["source slurm/cluster.env", f"LOG_DIR={self.logs}", 'export SBATCH_OUTPUT="$LOG_DIR/%j.log"']
        values = {"PYTHON": sys.executable, "DOCTOR": 0} | settings
        self.logs.mkdir()
        self.settings.write_text("\n".join([*lines, *(f"{k}={v}" for k, v in values.items())]) + "\n")

    def submit(self, script: str, *args: str | Path, nodes: int = 2, **env: str) -> str:
        options = [] if script == "shard" else [f"--nodes={nodes}"]
        return self.cluster.submit(self.settings, *options, f"slurm/{script}.sbatch", *args, env=env)

    def train(self, *args: str, nodes: int = 2) -> str:
        return self.submit("train", "--config", self.config, *args, nodes=nodes)

    def train_until_ready(self) -> str:
        """A job on two nodes whose ranks have both touched $READY with their rank behind it."""
        ready = self.folder / "ready"
        with open(self.settings, "a") as f:
            f.write(f"export READY={ready}\n")
        job = self.train()
        both = [ready.with_name(f"ready{rank}") for rank in range(2)]
        self.cluster.wait_for(lambda: all(f.exists() for f in both), "ranks", self.log(job))
        return job

    def log(self, job: str) -> Path:
        return self.logs / f"{job}.log"

    def read(self, job: str, script: str = "train") -> str:
        """The job's log."""
        return (self.logs / f"{script}-{job}.log").read_text()  # a link to it

    def rank_log(self, job: str, rank: int, script: str = "train", name: str = "train") -> str:
        return (self.logs / f"{script}-{job}/{name}.rank{rank}.log").read_text()

    def finished(self, job: str, script: str = "train", timeout: float = 120) -> dict[str, str]:
        return self.cluster.finished(job, self.log(job), timeout)

    def completed(self, job: str, script: str = "train", timeout: float = 120) -> dict[str, str]:
        info = self.finished(job, script, timeout)
        assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), self.read(job, script)[-3000:]
        return info

    def reach(self, job: str, step: int) -> None:
        """Wait until the training has taken so many steps."""

        def there() -> bool:
            return (self.run_dir / "metrics.jsonl").exists() and len(metrics_of(self.run_dir)) >= step

        self.cluster.wait_for(there, f"step {step}", self.log(job))


def start_cluster(folder: Path, nodes: tuple[str, ...] = NODES) -> Iterator[Cluster]:
    """The cluster for a session; skips where it can't be had, but not in continuous integration."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    reason = "needs root" if os.geteuid() else f"{', '.join(missing)} not installed" if missing else ""
    if reason:
        reason = f"no SLURM cluster: {reason} (apt-get install slurm-wlm munge)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    cluster = Cluster(folder, nodes)
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


def processes_with(variable: str) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if variable in environ_of(int(p.name))]


def environ_of(pid: int) -> str:
    return _proc(pid, "environ")


def command_of(pid: int) -> str:
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
