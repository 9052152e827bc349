"""A Slurm of two nodes on this machine, as root, that leaves nothing behind: its state is in one directory."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.commands import environment, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm munge"
NODES = ("one", "two")

# Both nodes are this machine, and say that they have more processors than it has: jobs share what there is.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller_port}
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/controller.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/controller.log
SlurmdLogFile={state}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,requeue_delay=1
MpiDefault=none
JobRequeue=1
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=node_reg_mem_percent=0
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What keeps Slurm from running here, and what to do; None if nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: {PACKAGES}"
    return None if os.geteuid() == 0 else "Slurm's daemons start jobs as any user: run these tests as root"


class Slurm:
    """Commands of a running Slurm."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(state / "slurm.conf")

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, timeout: float = 200, **more: str) -> str:
        """What it printed; ``more`` are variables of its environment."""
        done = subprocess.run(
            command,
            env={**self.environment, **more},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}"
        return done.stdout + done.stderr

    def submit(self, script: str, *options: str, output: Path, cwd: Path) -> str:
        """The job's id."""
        file = self.state / f"{secrets.token_hex(4)}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", f"--output={output}", *options, str(file), cwd=cwd).splitlines()[-1]

    def jobs(self) -> dict[str, dict[str, str]]:
        """Of every job or task of an array that Slurm still knows: what `scontrol show job` says."""
        found = {}
        for line in self.run("scontrol", "--oneliner", "show", "jobs").splitlines():
            fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
            if "JobId" in fields:
                array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
                found[f"{array}_{task}" if array else fields["JobId"]] = fields
        return found

    def state_of(self, job: str) -> str:
        return self.jobs()[job]["JobState"]

    def wait(self, job: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """The job, once it is in one of the states."""
        wait_until(lambda: self.state_of(job) in states, f"job {job} to be {states}", timeout)
        return self.jobs()[job]

    def stop_jobs(self) -> None:
        """Cancel all; their processes are gone when it returns."""
        for job in [name for name, fields in self.jobs().items() if fields["JobState"] in ("RUNNING", "PENDING")]:
            self.run("scancel", job, check=False)
        wait_until(lambda: not self.run("squeue", "--noheader").strip(), "no job to be left", 60)


@contextmanager
def running(state: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and a slurmd per node; end them, and every job, at the end of the block."""
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    (state / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host, state=state, controller_port=ports[0], nodes="\n".join(nodes), names=",".join(NODES)
        )
    )
    (state / "controller").mkdir()
    for name in NODES:
        (state / name).mkdir()
    key = state / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    slurm = Slurm(state)
    daemons = []

    def start(*command: str) -> None:
        with (state / f"{Path(command[0]).name}.{len(daemons)}.out").open("wb") as output:
            daemons.append(
                subprocess.Popen(
                    command, env=slurm.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            )

    try:
        files = {name: state / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
        # --force: of a directory of the tests, whose parents others may write.
        start(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--{option}={path}" for option, path in files.items()),
        )
        wait_until((state / "munge.socket").exists, "munged", 20)
        start("slurmctld", "-D", "-c")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        wait_until(lambda: _idle(slurm) == len(NODES), "idle nodes", 30)
        yield slurm
    finally:
        try:
            if len(daemons) > 1:
                slurm.stop_jobs()
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def _idle(slurm: Slurm) -> int:
    return slurm.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split().count("idle")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
