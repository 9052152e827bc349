"""Where numbers go: W&B, and always a CSV file beside it."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

#: How long the end of a run waits for the W&B server; the variable WANDB_FINISH_TIMEOUT changes it.
FINISH_TIMEOUT_S = 600


def quiet_lightning() -> None:
    """Silence what Lightning 2.6 says of itself and nobody can act on: tips, TPUs, its own deprecated calls."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # The output directory holds Hydra's files by then, and after a resume older numbers (kept by metrics_csv) and
    # checkpoints (replaced atomically).
    warnings.filterwarnings("ignore", message="(Experiment logs|Checkpoint) directory .* exists and is not empty")


def metrics_csv(directory: str) -> CSVLogger:
    """``directory/metrics.csv``: the record that survives whatever happens to W&B.

    An older file of the same directory becomes ``metrics.N.csv``; Lightning would delete it.
    """
    path = Path(directory)
    _set_aside(path / "metrics.csv")
    return CSVLogger(save_dir=path.parent, name=path.name, version="", flush_logs_every_n_steps=20)


@rank_zero_only
def _set_aside(file: Path) -> None:
    if file.exists():
        older = len(list(file.parent.glob(f"{file.stem}.*{file.suffix}")))
        file.rename(file.with_suffix(f".{older + 1}{file.suffix}"))


class RunLogger(WandbLogger):
    """One W&B run for one job.

    Lightning makes it on rank 0 only. The mode is set for this run alone: ``offline=True`` would change the
    environment of everything that follows in the process.

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
        # A server that is gone must not hold a finished run for ever: `wandb sync` uploads what is missing.
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
            id=id,
            settings=wandb.Settings(quiet=True),  # where the run is, not a second copy of its numbers
        )
        # Lightning still passes it, wandb warns about it and will remove it.
        self._wandb_init.pop("anonymous", None)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Start the run, if it has not begun, and give it its config.

        Raises:
            ValueError: online without a key, or the server did not answer (for 90 s; WANDB_INIT_TIMEOUT changes it).
        """
        try:
            super().log_hyperparams(params)
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"W&B: {reason}. Or keep the run on this machine: logger=wandb_offline") from error

    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; without a connection a warning, since the run that waits for it has more to do.

        A table is an artifact, for which the client asks the server at once; everything else it keeps and sends later.
        """
        try:
            super().log_table(key, *args, **kwargs)
        except wandb.errors.Error as error:
            log.warning("W&B has not got the table %s: %s", key, error)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Write ``summary`` and close the run, so that the next job of the process gets a run of its own."""
        if wandb.run is not None:
            wandb.run.summary.update(dict(summary))
            wandb.finish(exit_code=exit_code)
