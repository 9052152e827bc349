"""The runs below directories, or in a W&B project: one `Run` each, whatever it left and wherever.

A run's directory may hold `result.json`, `metrics.csv`, `hparams.yaml`, Hydra's `.hydra` and W&B's offline files. They
are merged, and what they do not say is not guessed: a run without a record of its end is not a finished one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg import wandb_file
from repvgg.identity import FILE as IDENTITY
from repvgg.report.offline import OfflineRun, read_offline_run
from repvgg.report.record import HISTORY, RECORD, RunRecord, read_history, read_record, require_config

if TYPE_CHECKING:
    import pandas as pd

#: `runs=wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/GROUP`.
ONLINE = "wandb:"
CURVES = ("val/top1", "val/deploy/top1")
LOSSES = ("train/loss", "val/loss", "val/deploy/loss")
SHARE = "health/share/"
#: Where Hydra keeps what a job was started with, and Lightning's CSVLogger the config.
HYDRA, HPARAMS = ".hydra", "hparams.yaml"
NO_RESULT, UNREADABLE = "no result", "unreadable"


def no_history() -> pd.DataFrame:
    """Of a run that logged none."""
    import pandas as pd

    columns = {"epoch": "Int64", "step": "int64", "metric": "object", "value": "float64"}
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in columns.items()})


@dataclass(frozen=True, eq=False)
class Run(RunRecord):
    """A run of any source.

    `name` is its directory, relative to what was asked for, or its name in W&B; `ids` are W&B's. `history` has the
    columns epoch, step, metric, value of `read_history`, and the metrics `CURVES`, `LOSSES` and `health/share/*` alone.
    `overrides` are those of Hydra's command line, None if they are not known. Of a run read `online`, `ended` is when
    W&B last heard of it.
    """

    name: str = ""
    ids: tuple[str, ...] = ()
    started: datetime | None = None
    overrides: tuple[str, ...] | None = None
    evaluation: bool = False
    online: bool = False
    history: pd.DataFrame = field(default_factory=no_history)

    @property
    def when(self) -> datetime | None:
        """When it ended, else when it began."""
        return self.ended or self.started


def read_runs(where: Sequence[str]) -> tuple[list[Run], list[str]]:
    """All runs below directories and in W&B projects, and a sentence for whatever a reader must know of the reading.

    Copies of one W&B run, and the files of one that was resumed under its id, are one run.

    Raises ValueError for a place that does not exist, or cannot be asked.
    """
    runs: list[Run] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for place in where:
        if place.startswith(ONLINE):
            found = read_online(place)
        else:
            root = Path(place)
            if not root.is_dir():
                raise ValueError(
                    f"runs={place}: there is no directory {root.absolute()}. Give one that holds runs at any depth, as "
                    f"runs=multirun or runs=outputs, several as runs=[a,b], or {ONLINE}ENTITY/PROJECT"
                )
            found = [run for run in _read_below(root, notes) if run.run_dir.resolve() not in seen]
            seen |= {run.run_dir.resolve() for run in found}
            if len(where) > 1:
                found = [dataclasses.replace(run, name=(root / run.name).as_posix()) for run in found]
            found = [dataclasses.replace(run, name=root.resolve().name) if run.name == "." else run for run in found]
        runs += found
    return _merge_copies(runs, notes), notes


# --- directories ----------------------------------------------------------------------------------------------------


def _read_below(root: Path, notes: list[str]) -> Iterator[Run]:
    directories, loose = _find(root)
    not_begun = []
    for directory in sorted(directories):
        run = read_directory(directory, directories[directory], notes)
        name = directory.relative_to(root).as_posix()
        if run.status == NO_RESULT and not _has_begun(run):
            not_begun.append(name)
        else:
            yield dataclasses.replace(run, name=name)
    if not_begun:
        names = ", ".join(not_begun[:5]) + (", …" if len(not_begun) > 5 else "")
        notes.append(
            f"Not counted: {len(not_begun)} folders in which nothing began, such as of refused commands: {names}."
        )
    for file in loose:  # W&B's files alone, as when they were copied from elsewhere
        run = read_directory(file.parent, [file], notes)
        yield dataclasses.replace(run, run_dir=file, name=file.relative_to(root).as_posix())


def _has_begun(run: Run) -> bool:
    """Whether a run without a result has left more than what Hydra writes about any command."""
    of_loggers = [*(run.run_dir / "wandb").glob("*"), *_csv_files(run.run_dir)]
    left = [run.run_dir / IDENTITY, *(run.run_dir / "checkpoints").glob("*"), *of_loggers]
    return any(path.exists() for path in left)


def _find(root: Path) -> tuple[dict[Path, list[Path]], list[Path]]:
    """The directories of runs with the W&B files in them, and the W&B files that are in none."""
    directories: dict[Path, list[Path]] = {}
    files: list[Path] = []
    for place, inner, names in os.walk(root):
        here = Path(place)
        files += [here / name for name in names if name.startswith("run-") and name.endswith(".wandb")]
        if HYDRA in inner or RECORD in names:
            directories[here] = []
        inner[:] = [name for name in inner if name not in (HYDRA, "checkpoints")]
    loose = []
    for file in sorted(files, key=wandb_file.age):
        owner = file.parents[2] if file.parents[1].name == "wandb" else None
        if owner in directories:
            directories[owner].append(file)
        else:
            loose.append(file)
    return directories, loose


def read_directory(directory: Path, wandb_files: Sequence[Path], notes: list[str]) -> Run:
    """One run from what is in its directory; of several W&B files, oldest first, the last is what became of it."""
    hydra = hydra_record(directory)
    record, unreadable = None, None
    try:
        record = read_record(directory)
    except FileNotFoundError:
        pass  # killed before its end, or W&B's files alone
    except (OSError, ValueError) as problem:
        unreadable = str(problem)
    tables = _csv_files(directory)
    offline: list[OfflineRun] = []
    for file in wandb_files:
        try:
            run = read_offline_run(file, history=not tables)
        except ValueError as problem:
            notes.append(f"Not read: {problem}")
        else:
            # Empty is the file of a start that did not reach the server, or was killed at once.
            if run.config or run.started or len(wandb_files) == 1:
                offline.append(run)
    last = offline[-1] if offline else None

    status, error = _status(record, last, unreadable)
    config: dict[str, Any] = {}
    try:
        config = dict((record and record.config) or (last and last.config) or _hparams(directory) or {})
        require_config(config)
        require_config(hydra)
    except ValueError as problem:
        config, hydra, status, error = {}, {}, UNREADABLE, f"the config that is logged: {problem}"
    config.setdefault("choices", hydra.get("choices", {}))
    config.setdefault("seed", hydra.get("seed"))
    if "callbacks" in hydra:  # of a run whose logged config has none
        config.setdefault("callbacks", hydra["callbacks"])
    return Run(
        run_dir=directory,
        status=status,
        config=config,
        metrics=record.metrics if record else _numbers(last.summary) if last else {},
        objective=record.objective if record else None,
        error=error,
        ended=record.ended if record else None,
        ids=tuple(dict.fromkeys(run.id for run in offline)),
        started=last.started if last else None,
        overrides=hydra.get("overrides"),
        evaluation=hydra.get("job") == "evaluate" or _is_evaluation(config, last.job_type if last else ""),
        history=_csv_history(tables, notes) if tables else joined([_long(run.history) for run in offline]),
    )


def _status(record: RunRecord | None, last: OfflineRun | None, unreadable: str | None) -> tuple[str, str | None]:
    """What is known of a run's end, and the reason where it is not a good one."""
    if last is None:
        if record is not None:
            return record.status, record.error
        if unreadable is not None:
            return UNREADABLE, unreadable
        return NO_RESULT, f"it ended, or was stopped, before it wrote {RECORD}"
    if not last.finished:
        # A record is written before W&B is waited for; an older one than the file's start is of an earlier start.
        if record is not None and record.ended and last.started and record.ended >= last.started:
            return record.status, record.error
        return "not finished", "killed, or still running: its W&B file has no record of an end"
    if last.exit_code != 0:
        if record is not None and record.status != "finished":
            return record.status, record.error
        return "failed", f"exit code {last.exit_code} in its W&B file"
    if record is not None:
        return record.status, record.error
    return "finished", None


def hydra_record(job: Path) -> dict[str, Any]:
    """Number, name, choices, overrides, seed and callbacks of a job, from what Hydra wrote when it started.

    As much of it as there is.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    found: dict[str, Any] = {}
    try:
        hydra: Any = OmegaConf.to_container(OmegaConf.load(job / HYDRA / "hydra.yaml"))
        hydra = hydra["hydra"]
        if hydra["job"]["num"] != "???":
            found["number"] = hydra["job"]["num"]
        found["job"] = hydra["job"].get("name")
        found["choices"] = hydra["runtime"]["choices"]
        found["overrides"] = tuple(hydra.get("overrides", {}).get("task", ()))
        config: Any = OmegaConf.to_container(OmegaConf.load(job / HYDRA / "config.yaml"))
        found["seed"] = config.get("seed")
        found["callbacks"] = config.get("callbacks")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, YAMLError, OmegaConfBaseException):
        pass  # hydra.output_subdir=null, or a job that died early: the name of the directory is left to go by
    return found


def _hparams(directory: Path) -> dict[str, Any] | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(directory / HPARAMS))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):  # killed before, or while it was written
        return None
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else None


def _is_evaluation(config: Mapping[str, Any], job_type: str) -> bool:
    return job_type == "eval" or ("weights" in config and "recipe" not in config)


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numbers.items() if not k.startswith("_")}


# --- histories ------------------------------------------------------------------------------------------------------


def _csv_files(directory: Path) -> list[Path]:
    """Oldest start first: metrics.1.csv, metrics.2.csv, … and metrics.csv, which a start has from its first row on."""
    older = sorted(directory.glob("metrics.*.csv"), key=lambda file: (len(file.name), file.name))
    last = directory / HISTORY
    return [*older, last] if last.exists() else older


def _csv_history(files: Sequence[Path], notes: list[str]) -> pd.DataFrame:
    parts = []
    for file in files:
        try:
            parts.append(_kept(read_history(file)))
        except (OSError, ValueError, TypeError) as error:
            if file.name != HISTORY or file.stat().st_size:  # killed before its first line
                notes.append(f"Not read: {error}")
            parts.append(no_history())
    return joined(parts)


def _kept(history: pd.DataFrame) -> pd.DataFrame:
    metric = history["metric"]
    return history[metric.isin((*CURVES, *LOSSES)) | metric.str.startswith(SHARE)].reset_index(drop=True)


def _long(wide: pd.DataFrame) -> pd.DataFrame:
    """W&B's rows in the form of `read_history`."""
    import pandas as pd

    names = [name for name in wide.columns if name in (*CURVES, *LOSSES) or name.startswith(SHARE)]
    if not names:
        return no_history()
    step = wide["trainer/global_step"] if "trainer/global_step" in wide else wide["_step"]
    epoch = wide["epoch"] if "epoch" in wide else float("nan")
    columns = {name: pd.to_numeric(wide[name], errors="coerce") for name in names}
    long = (
        pd.DataFrame({"epoch": epoch, "step": step, **columns})
        .melt(id_vars=["epoch", "step"], var_name="metric", value_name="value")
        .dropna(subset=["step", "value"])
        .drop_duplicates(["step", "metric"], keep="last")
        .sort_values(["step", "metric"], ignore_index=True)
    )
    return long.astype({"epoch": "Int64", "step": "int64", "value": "float64"})


def joined(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One history of the starts of one run, oldest first: of what was logged twice, the later start's counts.

    A start goes on from the checkpoint of an earlier one, which had got further before it was killed.
    """
    return (
        _stacked(parts)
        .drop_duplicates(["step", "metric"], keep="last")
        .sort_values(["step", "metric"], ignore_index=True)
    )


# --- copies ---------------------------------------------------------------------------------------------------------


def _merge_copies(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """One run per W&B id, in the order of first appearance."""
    merged: list[Run] = []
    for run in runs:
        same = [other for other in merged if set(other.ids) & set(run.ids)]
        if same:
            merged[merged.index(same[0])] = _merge(same[0], run, notes)
        else:
            merged.append(run)
    return merged


def _merge(a: Run, b: Run, notes: list[str]) -> Run:
    """Two copies, or two starts, of one run: what is known last counts, and what that lacks comes from the other."""

    def time(run: Run) -> datetime:
        return (run.when if a.online or b.online else run.started) or datetime.min.replace(tzinfo=UTC)

    first, last = sorted((a, b), key=lambda run: (time(run), not run.online, run.overrides is not None))
    if last.online and not first.online and first.status == last.status:
        first, last = last, first  # a directory knows more than W&B
    notes.append(f"{first.name} and {last.name} are the same W&B run, {', '.join(last.ids)}: counted once.")
    return dataclasses.replace(
        last,
        config={**first.config, **last.config},
        ids=tuple(dict.fromkeys((*first.ids, *last.ids))),
        overrides=last.overrides if last.overrides is not None else first.overrides,
        history=joined([first.history, last.history]),
    )


# --- W&B ------------------------------------------------------------------------------------------------------------


def read_online(place: str) -> list[Run]:
    """The runs of `wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/GROUP`, through W&B's API.

    Raises ValueError if the place is not of that form or W&B refuses.
    """
    entity, _, rest = place.removeprefix(ONLINE).partition("/")
    project, _, group = rest.partition("/")
    if not (entity and project):
        raise ValueError(f"runs={place}: write {ONLINE}ENTITY/PROJECT or {ONLINE}ENTITY/PROJECT/GROUP")
    import wandb

    try:
        api = wandb.Api()
        found = api.runs(f"{entity}/{project}", filters={"group": group} if group else {}, order="+created_at")
        return [_online_run(run) for run in found]
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(f"runs={place}: W&B says: {error}. `wandb login` once, or name a directory") from error


def _online_run(run: Any) -> Run:
    import pandas as pd

    needed = [["epoch", "trainer/global_step", name] for name in (*CURVES, *LOSSES)]
    parts = [pd.DataFrame(list(run.scan_history(keys=keys)), columns=keys) for keys in needed]
    config = {key: value for key, value in dict(run.config).items() if not key.startswith("_")}
    status, error = run.state, None if run.state == "finished" else f"W&B calls it {run.state}"
    try:
        require_config(config)
    except ValueError as problem:
        config, status, error = {}, UNREADABLE, f"the config that is logged: {problem}"
    return Run(
        run_dir=Path(run.name),
        status=status,
        config=config,
        metrics=_numbers(dict(run.summary)),
        error=error,
        name=run.name,
        ids=(run.id,),
        started=_utc(run.created_at),
        ended=_utc(run.heartbeat_at),
        online=True,
        evaluation=_is_evaluation(config, run.job_type or ""),
        history=_stacked(_long(part) for part in parts if not part.empty),
    )


def _utc(text: str | None) -> datetime | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _stacked(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    kept = [part for part in parts if not part.empty]
    return pd.concat(kept, ignore_index=True) if kept else no_history()
