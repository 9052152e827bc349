"""`hydra/launcher: process`: every job of a multirun is a fresh `python <script> <overrides>`, one after another.

Hydra's own launcher runs the jobs inside one process. Lightning's DDP then starts its other ranks by repeating the
command line of that process, `-m` and all, so that each rank runs the whole sweep again; with jobs that differ
in their number of devices the wrong thing is trained without an error, and one failed rank deadlocks the rest
(Lightning issues 2727, 11300, 18175; Hydra issue 2070). A job that is a plain single run has none of this.

What holds for every job:

- its directory is `<hydra.sweep.dir>/<hydra.sweep.subdir>`, passed on as `hydra.run.dir`;
- it sees MULTIRUN_DIR, the absolute directory of the sweep, and none of the variables a distributed run leaves behind;
- it writes to the terminal directly, and reads nothing from it;
- its value for the sweeper is the key `objective` of its `result.json`;
- if it fails, the others still run; the sweep then names every failed job and exits with 1;
- SIGINT, SIGTERM or SIGHUP to the sweep stops it and starts no other; the sweep exits with 128 + the signal's number.
"""

# No `from __future__ import annotations`: Hydra's plugin scanner executes this module before it is in sys.modules,
# where dataclasses would look up annotations that are strings.
import argparse
import copy
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

log = logging.getLogger(__name__)


@dataclass
class ProcessLauncherConf:
    _target_: str = "hydra_plugins.process_launcher.process_launcher.ProcessLauncher"
    # seconds between asking a job to stop and killing its process group
    grace_s: float = 30.0


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessLauncherConf, provider="repvgg")

# Set by torchrun, by Lightning for its ranks, or left in the shell by an earlier run: not for a single run.
DISTRIBUTED_VARIABLES = frozenset(
    ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# seconds that processes left behind by an ended job get to end by themselves
LEFTOVER_GRACE_S = 3.0


class JobFailedError(CompactHydraException):
    """One or more jobs failed. Hydra prints the message alone: the job's own traceback is above and in its log."""


@dataclass
class Job:
    number: int
    overrides: list[str]
    directory: Path
    config: DictConfig

    def __str__(self) -> str:
        return f"#{self.number} : {' '.join(filter_overrides(self.overrides))}"

    @property
    def record(self) -> Path:
        return self.directory / "result.json"

    @property
    def log(self) -> Path:
        """Where to look after a failure: Hydra's log of the job, or its directory if it never got that far."""
        file = self.directory / f"{self.config.hydra.job.name}.log"
        return file if file.exists() else self.directory


class ProcessLauncher(Launcher):
    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        # hydra.sweep.dir may hold ${now:...}; Hydra caches that, so every job and the callbacks see one directory.
        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        sweep_dir.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED_VARIABLES}
        environment["MULTIRUN_DIR"] = str(sweep_dir)

        jobs = [self._job(sweep_dir, initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        log.info(f"{len(jobs)} jobs, one process each, in {sweep_dir}")
        returns: list[JobReturn] = []
        failures: list[str] = []
        started = 0
        with _StoppableProcess(self.grace_s) as process:
            for job in jobs:
                if process.stop_requested():
                    break
                started += 1
                log.info(str(job))
                before = _stamp(job.record)
                exit_code = process.run([*_command(), *job.overrides, *self._hydra_overrides(job)], environment)
                if exit_code != 0 and before is not None and _stamp(job.record) == before:
                    # An earlier run into this directory left its record; this one died without writing its own.
                    job.record.replace(job.record.with_name("result.stale.json"))
                if process.stop_requested():
                    break
                value, failure = _outcome(job, exit_code)
                returns.append(_job_return(job, value))
                if failure is not None:
                    log.error(f"failed, {failure}")
                    failures.append(failure)
                    returns[-1].status = JobStatus.FAILED
        if failures or process.stopped_by is not None:
            # Hydra calls the callbacks at the end of a successful sweep only, and a table of the jobs that did run
            # matters most after the other kind. A sweeper that goes on after a failure makes this happen again later.
            self.hydra_context.callbacks.on_multirun_end(
                config=self.config, config_name=self.config.hydra.job.config_name
            )
        if process.stopped_by is not None:
            name = signal.Signals(process.stopped_by).name
            log.error(f"{name}: the sweep ends here; {len(jobs) - started} of {len(jobs)} jobs not started")
            raise SystemExit(128 + process.stopped_by)
        if failures:
            # Sweepers read the values in order and stop at the first failed one: it has to speak for all.
            message = "\n".join([f"{len(failures)} of {len(jobs)} jobs failed:", *failures])
            for ret in returns:
                if ret.status is JobStatus.FAILED:
                    ret.return_value = JobFailedError(message)
        return returns

    def _job(self, sweep_dir: Path, number: int, overrides: list[str]) -> Job:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        # A subdir such as ${hydra:job.num} is resolved through Hydra's global config.
        outer = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            directory = sweep_dir / str(config.hydra.sweep.subdir)
        finally:
            HydraConfig.instance().cfg = outer
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(directory)
        return Job(number, overrides, directory, config)

    def _hydra_overrides(self, job: Job) -> list[str]:
        """What the user said about Hydra itself, less what belongs to the sweep, and where and how this job runs."""
        # resolve=False: values such as '${now:%H}' are for the job to resolve.
        given = OmegaConf.to_container(self.config.hydra.overrides.hydra, resolve=False)
        assert isinstance(given, list)
        parser = OverridesParser.create()
        kept = [line for line in given if not _of_the_sweep(parser.parse_override(line).key_or_group)]
        quoted = QuotedString(str(job.directory), Quote.single).with_quotes()
        # The mode is explicit since the config itself may say MULTIRUN, and the job would be a sweep again.
        return [*kept, "hydra.mode=RUN", f"hydra.job.num={job.number}", f"hydra.run.dir={quoted}"]


def _of_the_sweep(key: str) -> bool:
    parts = key.replace("/", ".").split(".")
    return parts[1:2] in (["launcher"], ["sweep"], ["sweeper"], ["mode"]) or parts[1:3] in (
        ["run", "dir"],
        ["job", "num"],
        ["job", "config"],
    )


def _command() -> list[str]:
    """The interpreter, the entry point as it was started, and Hydra's options that choose the config."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # `python -m package.module` puts the working directory on the path, the file's own name would not
    entry = [sys.argv[0]] if spec is None else ["-m", spec.name]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-dir", "-cd")
    options, _ = parser.parse_known_args(sys.argv[1:])
    chosen = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value is not None]
    return [sys.executable, *entry, *chosen]


class _StoppableProcess:
    """Runs one command at a time; while the context is open, a stop signal ends the command with all its descendants.

    The command gets a session of its own. So Ctrl-C reaches it through here only, once; and its process group can be
    killed without killing the sweep. The first signal goes to the command alone, since a trainer that stops in order
    needs its data workers and ranks for that; the group is killed after the grace time or at a second signal.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.stopped_by: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> "_StoppableProcess":
        # An ignored signal stays ignored: `nohup`, or a job in the background of a script.
        self._outer = {s: signal.getsignal(s) for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        for s in self._outer:
            signal.signal(s, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._outer.items():
            signal.signal(s, handler)

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Exit code of the command; minus the signal's number if a signal ended it."""
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._child = child
        if self.stopped_by is not None:  # arrived before there was a child to pass it on to
            self._stop(child, self.stopped_by)
        # The trainer answers a stop signal with exit code 0 if it ended in order: `stopped_by` remembers what happened.
        exit_code = child.wait()
        self._child = None
        for timer in self._timers:
            timer.cancel()
        _end_group(child.pid)
        return exit_code

    def stop_requested(self) -> bool:
        return self.stopped_by is not None

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        again = self.stopped_by is not None
        if not again:
            self.stopped_by = signum
        if self._child is not None:
            if again:
                _signal_group(self._child.pid, signal.SIGKILL)
            else:
                self._stop(self._child, signum)

    def _stop(self, child: "subprocess.Popen[bytes]", signum: int) -> None:
        child.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)
        timer = threading.Timer(self.grace_s, _signal_group, (child.pid, signal.SIGKILL))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _signal_group(group: int, signum: int) -> bool:
    """False if the group has no process left."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    return True


def _end_group(group: int) -> None:
    """Ends what an ended job left running in its group: ranks of a crashed DDP run hold devices and ports."""
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    alive = _signal_group(group, 0)
    if alive:
        alive = _signal_group(group, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = _signal_group(group, 0)
    if alive:
        _signal_group(group, signal.SIGKILL)


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _outcome(job: Job, exit_code: int) -> tuple[float | None, str | None]:
    """The job's value for the sweeper, and what went wrong if anything did."""
    result: dict[str, Any] = {}
    problem = None
    if exit_code != 0:
        problem = f"exit code {exit_code}" if exit_code > 0 else f"killed by {signal.Signals(-exit_code).name}"
    try:
        result = json.loads(job.record.read_text()) if job.record.exists() else {}
    except ValueError as error:
        problem = problem or f"{job.record.name} is not JSON ({error})"
    if problem is None and result.get("status", "finished") not in ("finished", "dry run"):
        # Lightning ends with exit code 0 after a SIGTERM that was sent to the job alone.
        problem = f"it recorded itself as {result['status']}"
    if problem is not None:
        reason = f" ({result['error']})" if result.get("error") else ""
        return None, f"{job}: {problem}{reason}; see {job.log}"
    objective = result.get("objective")
    return None if objective is None else float(objective), None


def _job_return(job: Job, value: float | None) -> JobReturn:
    task_config = copy.deepcopy(job.config)
    with read_write(task_config), open_dict(task_config):
        del task_config["hydra"]
    overrides = OmegaConf.to_container(job.config.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return JobReturn(
        overrides=overrides,
        cfg=task_config,
        hydra_cfg=OmegaConf.create({"hydra": job.config.hydra}),
        working_dir=str(job.directory),
        task_name=job.config.hydra.job.name,
        status=JobStatus.COMPLETED,
        _return_value=value,
    )
