"""Where numbers go: W&B, and always a CSV file beside it."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import wandb
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repvgg import wandb_file
from repvgg.learn.safe_csv import SafeCSVLogger

log = logging.getLogger(__name__)

#: How long the start of a run waits for the W&B server; the variable WANDB_INIT_TIMEOUT changes it.
INIT_TIMEOUT_S = 30
#: How long the end of a run waits for the W&B server; the variable WANDB_FINISH_TIMEOUT changes it.
FINISH_TIMEOUT_S = 600
#: A run that is killed loses what it logged in the last second or so: W&B's file of it is flushed this often.
FLUSH_S = 1.0
#: What W&B says when it gave up waiting, in contrast to what it was told: wrong key, no permission, no such entity.
NO_ANSWER = re.compile("deadline exceeded|timed out|giving up after", re.IGNORECASE)


#: Lightning's loggers of what nobody asked for: which devices there are, that a loop has ended, what is restored.
UNASKED = ("trainer", "loops", "strategies", "accelerators")


def _asked_for(record: logging.LogRecord) -> bool:
    """Whether a message of `rank_zero_info`, which all of Lightning shares, is a callback's, such as a Timer's."""
    path = Path(record.pathname)
    return record.levelno >= logging.WARNING or (path.parent.name == "callbacks" and path.stem != "weight_averaging")


def quiet_lightning() -> None:
    """Silence what Lightning 2.6 says of itself and nobody can act on: tips, TPUs, its own deprecated calls.

    Callbacks and profilers, which somebody added, are heard.
    """
    for name in UNASKED:
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_asked_for)
    # The loader keeps the order of its first epoch.
    warnings.filterwarnings("ignore", message="You requested to overfit but enabled train dataloader shuffling")
    # Where Slurm is installed, of every training that it did not start.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
    # What is logged is summed over the ranks before; Lightning's own mean is wrong where they have unequal shares.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # After a resume it holds checkpoints, which are replaced atomically.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def metrics_csv(directory: str) -> SafeCSVLogger:
    """``directory/metrics.csv``: the record that survives whatever happens to W&B.

    Of an earlier start in the directory, it becomes ``metrics.N.csv``, to be read before this one; and ``result.json``
    becomes ``result.N.json``, since it is not how this start ends.
    """
    for name in ("metrics.csv", "result.json"):
        _set_aside(Path(directory) / name)
    return SafeCSVLogger(directory)


@rank_zero_only
def _set_aside(file: Path) -> None:
    if file.exists():
        numbers = [older.name.split(".")[-2] for older in file.parent.glob(f"{file.stem}.*{file.suffix}")]
        number = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
        file.rename(file.with_suffix(f".{number}{file.suffix}"))


class RunLogger(WandbLogger):
    """One W&B run for one job.

    Lightning makes it on rank 0 only. The mode is set for this run alone: ``offline=True`` would change the
    environment of everything that follows in the process.

    Under an id that the server has, the run goes on: new rows come after those that are there. A training that was
    killed goes back to its last checkpoint and logs some steps twice; W&B does not forget the first ones (rewinding,
    ``resume_from``, is not open to everyone). They carry the same ``trainer/global_step``, over which charts are drawn,
    and the reader of `repvgg.report` keeps the last of each step.

    Whatever the server misses while it is away stays in W&B's files on this machine. The next start under the same
    id sends these rows before its own. `wandb sync` would send the whole of a file, rows that arrived before too.

    Args:
        mode: online needs ``wandb login`` once; offline writes files that ``wandb sync`` uploads.
        project, name, group, tags, job_type, save_dir: as in ``wandb.init``.
        id: of the run; one that the server has is continued. Null: a new one, or WANDB_RUN_ID, which an agent sets.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "offline"],
        project: str,
        save_dir: str,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        job_type: str = "train",
        id: str | None = None,
    ) -> None:
        if mode not in ("online", "offline"):
            raise ValueError(f"logger.wandb.mode={mode}: choose online or offline")
        # A server that is gone must neither keep a run from beginning nor hold a finished one for ever.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_TIMEOUT_S))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_TIMEOUT_S))
        if mode == "offline":  # not even a name look-up for crash reports
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(
            name=name,
            save_dir=save_dir,
            project=project,
            mode=mode,
            group=group,
            tags=tags,
            job_type=job_type,
            id=None if "WANDB_SWEEP_ID" in os.environ else id,  # the agent's counts, and W&B would warn of another
            settings=wandb.Settings(
                quiet=True,  # where the run is, not a second copy of its numbers
                x_transaction_log_flush_interval=FLUSH_S,
                finish_timeout_raises=True,
            ),
        )
        # Lightning still passes it, wandb warns about it and will remove it.
        self._wandb_init.pop("anonymous", None)
        self._asked_for = mode
        self._gone = False
        self._begun = False

    @property
    def experiment(self) -> Any:
        """W&B's run, once something has been logged; until then Lightning's dummy.

        Lightning asks for it before it has looked at data, optimiser and schedule: a run that they refuse is none.
        """
        return super().experiment if self._begun else DummyExperiment()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Start the run, if it has not begun, and give it its config.

        A server that does not answer (for 30 s; WANDB_INIT_TIMEOUT changes it) costs a warning: the run is then
        offline, under the same id.

        Raises:
            ValueError: online without a key, or the server refused the key, the project or the entity.
        """
        self._begin()
        with self._while_it_lives():
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As Lightning's; a warning, once, where W&B's helper process is gone."""
        self._begin()
        with self._while_it_lives():
            super().log_metrics(metrics, step)

    @contextmanager
    def _while_it_lives(self) -> Iterator[None]:
        """Go on without W&B once its helper process is gone: the training has more to do than to end for it.

        Slurm sends SIGTERM to all processes of a job, and the helper ends at once.
        """
        try:
            yield
        except ConnectionError as error:
            if not self._gone:
                log.warning(
                    "W&B's helper process is gone (%s): the run goes on without it, and metrics.csv has what it lacks",
                    error,
                )
            self._gone = True

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._start()

    def _start(self) -> None:
        generated = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if "WANDB_SWEEP_ID" not in os.environ:  # so that both attempts below are one run
            self._id = self._wandb_init["id"] = self._wandb_init["id"] or generated
        before = self._directories()
        try:
            _ = self.experiment
        except (wandb.errors.UsageError, wandb.errors.CommError, TimeoutError) as error:
            reason = str(error).strip().rstrip(".")
            if not isinstance(error, TimeoutError) and not NO_ANSWER.search(reason):
                raise ValueError(f"W&B: {reason}. Or keep the run on this machine: logger=wandb_offline") from error
            log.warning("W&B does not answer, and the run is kept on this machine: %s", reason)
            wandb.teardown()  # its helper process still holds the id
            for directory in self._directories() - before:  # of the attempt that came to nothing
                shutil.rmtree(directory)
            self._wandb_init["mode"] = "offline"
            _ = self.experiment
        else:
            if self._asked_for == "online":
                self._send_what_earlier_starts_kept()

    def _directories(self) -> set[Path]:
        """Of the runs that W&B keeps under ``save_dir``."""
        return set((Path(self._wandb_init["dir"]) / "wandb").glob("*run-*"))

    def _files(self) -> list[Path]:
        """W&B's files of this run, by earlier starts and by this one, that the server may not have."""
        run = self.experiment
        directory = Path(run.settings.sync_dir).parent
        return [file for file in wandb_file.find(directory, run.id) if not wandb_file.synced_mark(file).exists()]

    def _send_what_earlier_starts_kept(self) -> None:
        run = self.experiment
        earlier = [file for file in self._files() if file.parent != Path(run.settings.sync_dir)]
        sent = 0
        for file in earlier:
            try:
                # A run that goes on counts its rows from where the server is; offline, each file from 0.
                known = 0 if wandb_file.is_offline(file) else run.starting_step
                rows = [row for row in wandb_file.rows(file) if row["_step"] >= known]
            except ValueError as damage:
                log.warning("W&B does not get what an earlier start logged: %s", damage)
                continue
            for row in rows:
                run.log({key: _without_artifact(value) for key, value in row.items() if key not in OWN})
            if rows:
                _save_media(run, file.parent / "files")
            sent += len(rows)
        if sent:
            log.info("W&B gets %d rows of earlier starts that it has not got yet", sent)
            time.sleep(2 * FLUSH_S)  # they are in this start's file before the older ones are done with
        for file in earlier:
            wandb_file.synced_mark(file).touch()

    @rank_zero_only
    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; without a connection a warning, since the run that waits for it has more to do.

        A table is an artifact, for which the client asks the server at once; everything else it keeps and sends later.
        """
        self._begin()
        try:
            with self._while_it_lives():
                super().log_table(key, *args, **kwargs)
        except wandb.errors.Error as error:
            log.warning("W&B has not got the table %s: %s", key, error)

    @rank_zero_only
    def finish(self, summary: Mapping[str, Any], exit_code: int, *, preempted: bool = False) -> None:
        """Write ``summary`` and close the run, so that the next job of the process gets a run of its own.

        ``preempted``: it will go on elsewhere; with an exit code other than 0, W&B calls it so, not failed.
        """
        if wandb.run is not None:
            with self._while_it_lives():
                self._finish(wandb.run, summary, exit_code, preempted)

    def _finish(self, run: wandb.Run, summary: Mapping[str, Any], exit_code: int, preempted: bool) -> None:
        run.summary.update(dict(summary))
        if preempted:
            run.mark_preempting()
        files = self._files()
        arrived = not run.offline
        try:
            wandb.finish(exit_code=exit_code)
        except TimeoutError:
            arrived = False
        wandb.teardown()  # waits for its helper process, which may write the end of the file only now
        if self._asked_for == "offline":
            if len(files) > 1:  # W&B names the last one
                log.info("The starts of this run, for W&B: %s", _command(files))
        elif not arrived:
            log.warning("W&B has not got all of this run. Once it answers, %s", _command(files))


#: Keys of a row that the client sets itself.
OWN = ("_step", "_runtime")


def _without_artifact(value: Any) -> Any:
    """A table as its file alone: the artifact around it is not sent again."""
    if isinstance(value, dict) and "_type" in value:
        return {key: item for key, item in value.items() if "artifact" not in key}
    return value


def _save_media(run: wandb.Run, files: Path) -> None:
    for file in (files / "media").rglob("*"):
        if file.is_file():
            run.save(str(file), base_path=str(files), policy="now")


def _command(files: list[Path]) -> str:
    """What sends the files of one run, and no row of them twice."""
    if all(wandb_file.is_offline(file) for file in files):
        return " ".join(["wandb sync", *(str(file.parent) for file in files)])
    return f"python -m repvgg.learn.deliver {files[0].parents[2]}"
