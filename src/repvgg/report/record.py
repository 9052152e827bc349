"""What a run leaves in its directory: `result.json` (one record) and `metrics.csv` (one value per metric and epoch).

The record is how a sweep, a table and a sweeper learn of a run; it is there whole or not at all.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from repvgg.files import replacing

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

RECORD = "result.json"
HISTORY = "metrics.csv"

Status = Literal["finished", "failed", "interrupted", "dry run"]


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run. Accuracies are fractions of 1, throughputs images per second; `ended` is UTC, None if not known.

    `status` is one of `Status`, or what `repvgg.report.multirun` says of a job directory without a readable record.
    """

    run_dir: Path
    status: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None
    error: str | None = None
    ended: datetime | None = None

    def choice(self, group: str) -> str | None:
        """The option chosen from a Hydra config group, such as `ablation`."""
        choices = self.config.get("choices") or {}
        return None if choices.get(group) is None else str(choices[group])


def write_record(
    run_dir: str | Path,
    *,
    status: Status,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    objective: float | None,
    error: str | None,
) -> Path:
    """Writes `<run_dir>/result.json` atomically and returns its path.

    A disk that does not take it is an OSError that says so. Of a run that was stopped by another error, which is on its
    way to the user, it is a line of the log.

    JSON has no NaN and no infinity: they are written as "NaN", "Infinity" and "-Infinity", and `read_record` turns
    them back into floats in `metrics` and `objective`. What JSON does not know in `config` is written as text.
    """
    if status not in get_args(Status):
        raise ValueError(f"A run's status is one of {', '.join(get_args(Status))}, not {status!r}.")
    content = {
        "status": status,
        "objective": None if objective is None else float(objective),
        "error": error,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "config": config,
    }
    path = Path(run_dir) / RECORD
    text = json.dumps(_finite(content), indent=2, allow_nan=False, default=str)
    try:
        with replacing(path) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        problem = f"The record of the {status} run, {path}, could not be written: {error.strerror or error}"
        if status == "finished":
            raise OSError(error.errno, f"{problem}. Make room and give the same command again") from error
        log.error(problem)
    return path


def read_record(path: str | Path) -> RunRecord:
    """The record of a run directory, or of a `result.json` itself.

    Raises FileNotFoundError if there is none, another OSError if it cannot be read, and ValueError if it is not a
    record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        require_config(content["config"])
        ended = datetime.fromisoformat(content["ended"]) if content.get("ended") is not None else None
        return RunRecord(
            run_dir=path.parent,
            status=str(content["status"]),
            config=content["config"],
            metrics={name: float(value) for name, value in content["metrics"].items()},
            objective=None if content["objective"] is None else float(content["objective"]),
            error=None if content["error"] is None else str(content["error"]),
            ended=ended if ended is None or ended.tzinfo else ended.replace(tzinfo=UTC),  # records had none at first
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the record of a run ({type(error).__name__}: {error}). A record is written by write_record "
            "and holds status, config, metrics, objective and error. Run the job again, or remove the file."
        ) from error


#: What a config holds nodes under, of those that are read here.
NODES = ("choices", "net", "block", "data", "recipe", "trainer", "callbacks", "bench", "run", "git", "versions")


def require_config(config: Any) -> None:
    """Raise ValueError for what is no config of a run, from whatever file it is."""
    if not isinstance(config, Mapping):
        raise ValueError(f"its config is {type(config).__name__}, not a mapping")
    for node in NODES:
        if not isinstance(config.get(node) or {}, Mapping):
            raise ValueError(f"{node} is {config[node]!r:.40}, not a mapping")
    seed = config.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | float) or seed != seed // 1):
        raise ValueError(f"seed is {seed!r:.40}, not a whole number")


def read_history(path: str | Path) -> pd.DataFrame:
    """The metrics of a run over time, from its directory or its `metrics.csv`: columns epoch, step, metric, value.

    One row per measured value, in the order of steps; the CSVLogger's blanks are left out. `epoch` is <NA> where it
    was not logged. Of a step logged twice, after a resume, the last value counts. Raises FileNotFoundError if there
    is no such file, ValueError if it is not a CSVLogger's.
    """
    import io

    import pandas as pd

    path = Path(path)
    if path.is_dir():
        path = path / HISTORY
    text = path.read_text(encoding="utf-8")
    # The row that a killed run was writing: half a number looks like a number.
    text = text[: text.rfind("\n") + 1]
    wide = pd.read_csv(io.StringIO(text)) if text else pd.DataFrame()
    if "step" not in wide.columns:
        raise ValueError(
            f"{path} has no column `step`, so it is not Lightning's metrics.csv. It has: {[*wide.columns]}."
        )
    if "epoch" not in wide.columns:
        wide["epoch"] = float("nan")
    long = wide.melt(id_vars=["epoch", "step"], var_name="metric", value_name="value").dropna(subset="value")
    long = long.drop_duplicates(["step", "metric"], keep="last").sort_values(["step", "metric"], ignore_index=True)
    return long.astype({"epoch": "Int64", "step": "int64", "value": "float64"})


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
