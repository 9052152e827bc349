"""Reading W&B runs back from their `.wandb` files, without an account and without a server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg import wandb_file

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class OfflineRun:
    """One run as its file has it.

    `config` and `summary` are nested where the run logged nested values; a key such as `val/top1` stays one key. A
    metric declared with `define_metric(summary="max")` has the summary `{"max": value}`. `history` has one row per
    logged step in the order of the file, nested values in columns `a.b`, and W&B's own `_step`, `_runtime` and
    `_timestamp`. `started` is UTC. `finished` is False for a run that was killed, or is still running: its last seconds
    may be missing.
    """

    id: str
    name: str
    group: str
    job_type: str
    project: str
    config: dict[str, Any]
    history: pd.DataFrame
    summary: dict[str, Any]
    finished: bool
    exit_code: int | None
    started: datetime | None


def find_offline_runs(directory: str | Path) -> list[Path]:
    """The `.wandb` files under a directory, oldest run first (W&B begins their directories with the time)."""
    return wandb_file.find(directory)


def read_offline_run(path: str | Path, *, history: bool = True) -> OfflineRun:
    """Reads a `.wandb` file, or the one in a run directory; without its history, which takes longest, if so asked.

    Raises ValueError if it is not a W&B file, or if it is damaged elsewhere than at its end. An end torn by a kill
    is left out.
    """
    import pandas as pd

    file = _single_file(Path(path))
    parts = _Parts(id=file.stem.removeprefix("run-"), with_history=history)
    for record in wandb_file.records(file):
        parts.add(record)
    return OfflineRun(
        id=parts.id,
        name=parts.name,
        group=parts.group,
        job_type=parts.job_type,
        project=parts.project,
        config={key: value for key, value in parts.config.items() if key != "_wandb"},
        history=pd.DataFrame(parts.history),
        summary={key: value for key, value in parts.summary.items() if key != "_wandb"},
        finished=parts.finished,
        exit_code=parts.exit_code,
        started=parts.started,
    )


@dataclass
class _Parts:
    id: str
    with_history: bool
    name: str = ""
    group: str = ""
    job_type: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    exit_code: int | None = None
    started: datetime | None = None

    def add(self, record: Any) -> None:
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                self.id = run.run_id
                self.name, self.group, self.job_type = run.display_name, run.run_group, run.job_type
                self.project = run.project
                if run.HasField("start_time"):
                    self.started = run.start_time.ToDatetime(UTC)
                wandb_file.update(self.config, run.config)
                wandb_file.update(self.summary, run.summary)
            case "config":
                wandb_file.update(self.config, record.config)
            case "summary":
                wandb_file.update(self.summary, record.summary)
            case "history" if self.with_history:
                row = {".".join(wandb_file.key(item)): json.loads(item.value_json) for item in record.history.item}
                self.history.append(row)
            case "exit":
                self.finished = True
                self.exit_code = record.exit.exit_code


def _single_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("run-*.wandb"))
    if len(files) != 1:
        raise ValueError(
            f"{path} holds {len(files)} files run-*.wandb; a W&B run directory holds one. "
            "find_offline_runs lists the runs below a directory."
        )
    return files[0]
