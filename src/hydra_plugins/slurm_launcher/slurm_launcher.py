"""`hydra/launcher: submitit_slurm`: the jobs of a multirun are tasks of a Slurm job array, by Hydra's submitit plugin.

What the plugin does with a job is left as it is. Around it:

- the configuration is that of `conf/hydra/launcher/submitit_slurm.yaml`, resolved for every job: jobs that ask for
  different resources (`trainer.devices=1,8`) are in different arrays;
- the directory of the sweep is worked out once, where the sweep is typed;
- a job that fails costs no other: the rest is waited for, the callbacks write their summary, then every failed job is
  named and the sweep exits with 1;
- Ctrl-C ends the waiting, not the jobs, and says how to cancel them.
"""

# No `from __future__ import annotations`: see the process launcher.
import logging
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

log = logging.getLogger(__name__)

SWEEP_DIR = "hydra.sweep.dir"
# Seconds between two questions to Slurm, and those that a file may need to appear on another machine.
POLL_S = 5.0
FILE_SYSTEM_S = 10.0
GPU = ("gpu", "cuda")
# Options of sbatch that ask for GPUs in another way than gpus_per_node.
OTHER_GPU_OPTIONS = ("gres", "gpus_per_task", "mem_per_gpu")


class OwnConfiguration(SearchPathPlugin):
    """Makes the file of conf/ stand alone.

    Hydra validates a file with the plugin's own configuration of the same name, and warns that this is deprecated.
    Search paths are made when all plugins have been loaded.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
        launchers.pop("submitit_slurm.yaml", None)


class SlurmLauncherError(CompactHydraException):
    """Hydra prints the message alone."""


class SlurmLauncher(Launcher):
    def __init__(self, **parameters: Any) -> None:
        # Resolved per job, later.
        self.names = list(parameters)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        try:
            import hydra_plugins.hydra_submitit_launcher  # noqa: F401
            import submitit  # noqa: F401
        except ImportError as error:
            raise SlurmLauncherError(
                f"hydra/launcher=submitit_slurm needs {error.name}: pip install -e '.[slurm]'. "
                "Without Slurm: hydra/launcher=process"
            ) from error
        if shutil.which("sbatch") is None:
            raise SlurmLauncherError(
                "hydra/launcher=submitit_slurm: there is no sbatch here. Type this on a machine that submits jobs to "
                "Slurm, or train on this one with hydra/launcher=process"
            )
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        sweep_dir.mkdir(parents=True, exist_ok=True)
        config = _with_directory(self.config, sweep_dir)
        parameters = [self._parameters(config, list(overrides)) for overrides in job_overrides]
        jobs: dict[int, Any] = {}
        for array in _alike(parameters):
            numbers = [initial_job_idx + i for i in array]
            submitted = self._submit(config, parameters[array[0]], numbers, [list(job_overrides[i]) for i in array])
            jobs |= dict(zip(array, submitted, strict=True))
        for i, overrides in enumerate(job_overrides):
            log.info(f"#{initial_job_idx + i} : {' '.join(filter_overrides(overrides))}, Slurm's job {jobs[i].job_id}")
        log.info(f"{len(jobs)} jobs, in {sweep_dir}; Ctrl-C ends the waiting, not the jobs")
        returns = self._results([jobs[i] for i in range(len(jobs))], job_overrides, initial_job_idx)
        if any(each.status is JobStatus.FAILED for each in returns):
            # Hydra calls them after a sweep without failures only.
            self.hydra_context.callbacks.on_multirun_end(
                config=self.config, config_name=self.config.hydra.job.config_name
            )
        return returns

    def _parameters(self, sweep: DictConfig, overrides: list[str]) -> dict[str, Any]:
        """Of sbatch and submitit for one job."""
        config = self.hydra_context.config_loader.load_sweep_config(sweep, overrides)
        outer = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            given = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        finally:
            HydraConfig.instance().cfg = outer
        assert isinstance(given, dict)
        parameters = {str(key): value for key, value in given.items() if key != "_target_"}
        for key in ("tasks_per_node", "nodes"):
            if not isinstance(parameters[key], int) or parameters[key] < 1:
                raise SlurmLauncherError(
                    f"hydra.launcher.{key}={parameters[key]}: Slurm has to know a number. "
                    "Give trainer.devices=N and trainer.num_nodes=N, of which it is made"
                )
        # What is sent to all of a job, as with `scancel --full`, must not end the script in which the training runs.
        parameters["setup"] = ["trap : USR1 USR2", *(parameters["setup"] or [])]
        if parameters["signal_delay_s"] >= 60 * parameters["timeout_min"]:
            raise SlurmLauncherError(
                f"hydra.launcher.signal_delay_s={parameters['signal_delay_s']} is not less than "
                f"hydra.launcher.timeout_min={parameters['timeout_min']}: every job would be requeued before it begins"
            )
        asks_for_gpus = any(parameters.get(name) is not None for name in ("gpus_per_node", *OTHER_GPU_OPTIONS))
        if config.trainer.accelerator in GPU and not asks_for_gpus:
            parameters["gpus_per_node"] = parameters["tasks_per_node"]
        return parameters

    def _submit(
        self, config: DictConfig, parameters: dict[str, Any], numbers: list[int], job_overrides: list[list[str]]
    ) -> list[Any]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit

        job = Submitit(**parameters)
        job.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=config)
        common = set(OmegaConf.structured(BaseQueueConf).keys())
        executor = submitit.AutoExecutor(
            cluster="slurm",
            folder=parameters.pop("submitit_folder"),
            slurm_max_num_timeout=parameters.pop("max_num_timeout"),
        )
        executor.update_parameters(
            **{key if key in common else f"slurm_{key}": value for key, value in parameters.items()}
        )
        state = [Singleton.get_state() for _ in numbers]
        with _without_a_job(), _multirun_dir(str(config.hydra.sweep.dir)):
            submitted: list[Any] = executor.map_array(
                job, job_overrides, [SWEEP_DIR] * len(numbers), numbers, [f"job_id_for_{n}" for n in numbers], state
            )
        return submitted

    def _results(self, jobs: list[Any], overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        returns: list[JobReturn] = []
        failures: list[str] = []
        try:
            _wait(jobs)
        except KeyboardInterrupt:
            log.error(f"waiting no more; the jobs go on. To end them: scancel {' '.join(_arrays(jobs))}")
            raise SystemExit(130) from None
        deadline = time.monotonic() + FILE_SYSTEM_S
        while not all(_result_file(job).exists() for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.5)
        for i, job in enumerate(jobs):
            result, problem = _result(job)
            returns.append(result or JobReturn(overrides=list(overrides[i])))
            if problem is not None:
                returns[-1].status = JobStatus.FAILED
                what = " ".join(filter_overrides(overrides[i]))
                failures.append(f"#{initial_job_idx + i} : {what}: {problem}; see {job.task(0).paths.stderr}")
                log.error(f"failed, {failures[-1]}")
        if failures:
            # Sweepers read the values in order and stop at the first failed one: it has to speak for all.
            message = "\n".join([f"{len(failures)} of {len(jobs)} jobs failed:", *failures])
            for each in returns:
                if each.status is JobStatus.FAILED:
                    each.return_value = SlurmLauncherError(message)
        return returns


def _wait(jobs: list[Any]) -> None:
    """Until Slurm knows none of the jobs any more, or all have left a result.

    Submitit's own waiting needs Slurm's accounting to learn that a job ended without a result; without it, it waits
    for ever.
    """
    gone: set[str] = set()
    while True:
        waiting = [job for job in jobs if job.job_id not in gone and not _result_file(job).exists()]
        if not waiting:
            return
        time.sleep(POLL_S)
        active = _active(waiting)
        if active is not None:
            gone |= {job.job_id for job in waiting if job.job_id not in active}


def _active(jobs: list[Any]) -> set[str] | None:
    """Ids of those that wait, run, or are between the two; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(_arrays(jobs))}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        log.debug(f"squeue: {asked.stderr.strip()}")
        return None
    return set(asked.stdout.split())


def _arrays(jobs: list[Any]) -> list[str]:
    return sorted({job.job_id.partition("_")[0] for job in jobs}, key=int)


def _result_file(job: Any) -> Path:
    """Rank 0's."""
    return Path(job.task(0).paths.result_pickle)


def _result(job: Any) -> tuple[JobReturn | None, str | None]:
    """What a job that is over has returned, and what went wrong if anything did."""
    file = _result_file(job)
    if not file.exists():
        return None, "it ended without a result"
    with file.open("rb") as content:
        outcome, value = pickle.load(content)
    if outcome == "error":  # the traceback, as text
        return None, str(value).strip().splitlines()[-1]
    assert isinstance(value, JobReturn)
    failed = value.status is not JobStatus.COMPLETED
    return value, f"{type(value._return_value).__name__}: {value._return_value}" if failed else None


def _alike(parameters: list[dict[str, Any]]) -> list[list[int]]:
    """Indices of the jobs of every array, in order."""
    arrays: list[list[int]] = []
    for i, each in enumerate(parameters):
        same = next((array for array in arrays if parameters[array[0]] == each), None)
        if same is None:
            arrays.append([i])
        else:
            same.append(i)
    return arrays


def _with_directory(config: DictConfig, sweep_dir: Path) -> DictConfig:
    """Every job composes its config anew, where what was typed is that job's: it needs the directory as an override."""
    fixed = config.copy()
    parser = OverridesParser.create()
    given = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    assert isinstance(given, list)
    kept = [line for line in given if parser.parse_override(line).key_or_group != SWEEP_DIR]
    with read_write(fixed), open_dict(fixed):
        directory = QuotedString(str(sweep_dir), Quote.single).with_quotes()
        fixed.hydra.overrides.hydra = [*kept, f"{SWEEP_DIR}={directory}"]
        fixed.hydra.sweep.dir = str(sweep_dir)
    return fixed


@contextmanager
def _multirun_dir(directory: str) -> Iterator[None]:
    """Jobs inherit the environment."""
    outer = os.environ.get("MULTIRUN_DIR")
    os.environ["MULTIRUN_DIR"] = directory
    try:
        yield
    finally:
        if outer is None:
            del os.environ["MULTIRUN_DIR"]
        else:
            os.environ["MULTIRUN_DIR"] = outer


@contextmanager
def _without_a_job() -> Iterator[None]:
    """Of a job in which the sweep itself is typed, nothing is for the new jobs."""
    keep = ("SLURM_CONF",)
    taken = {n: os.environ.pop(n) for n in list(os.environ) if n.startswith("SLURM_") and n not in keep}
    try:
        yield
    finally:
        os.environ.update(taken)
