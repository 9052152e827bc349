"""At the end of a multirun: one table and one picture of all its jobs.

Configured as `hydra.callbacks.summary._target_: repvgg.report.multirun.MultirunSummary`. Hydra imports this with every
run, so pandas and matplotlib are imported when a sweep ends.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from repvgg.files import replacing
from repvgg.report.record import RECORD, RunRecord, read_record
from repvgg.report.runs import NO_RESULT, UNREADABLE, hydra_record

log = logging.getLogger(__name__)


class MultirunSummary(Callback):
    """Writes summary.md, summary.csv and summary.png into the sweep's directory and prints the table.

    Runs in the process of the sweep. Each part is written on its own: what goes wrong with one is logged with its
    reason and costs only that part, since the jobs' results are on disk and a sweep must not fail for its summary.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra after a sweep, and by the process launcher also after one that failed or was stopped."""
        summarize(Path(str(config.hydra.sweep.dir)).absolute())


def summarize(sweep_dir: Path) -> None:
    """The summary of a sweep's directory; also for one whose sweep is long over."""
    records = collect(sweep_dir)
    if not records:
        log.warning(f"No job has begun in {sweep_dir}: no summary.")
        return
    written: list[Path] = []
    try:
        from rich.console import Console

        from repvgg.report import table

        paper = table.paper_of(records)
        frame, notes = table.table(records, paper), table.notes(records, paper)
        table.print_table(frame, notes, Console())
        for name, content in (
            ("summary.md", table.to_markdown(frame, notes)),
            ("summary.csv", table.to_csv(frame)),
        ):
            with replacing(sweep_dir / name) as file:
                file.write(content.encode())
            written.append(sweep_dir / name)
    except Exception:
        log.exception(f"The table of {sweep_dir} failed; the records {sweep_dir}/*/{RECORD} are untouched.")
    try:
        from repvgg.report import picture, table

        written.append(picture.write_picture(records, table.paper_of(records), sweep_dir / "summary.png"))
    except Exception:
        log.exception(f"The picture of {sweep_dir} failed.")
    for path in written:
        print(path)


def collect(sweep_dir: Path) -> list[RunRecord]:
    """The records of all jobs of a sweep in job order; a job without a readable one is there and says so."""
    # rglob: an override with a slash in its value makes a directory more, where the name of a job holds overrides
    jobs = {path.parent for name in (RECORD, ".hydra") for path in sweep_dir.rglob(name)}
    hydra = {job: hydra_record(job) for job in jobs}

    def order(job: Path) -> tuple[float, str]:
        number = hydra[job].get("number")
        if number is None and job.name.isdecimal():  # Hydra's default name of a job's directory
            number = int(job.name)
        return (float("inf") if number is None else number, job.name)

    return [_record(job, hydra[job]) for job in sorted(jobs, key=order)]


def _record(job: Path, hydra: dict[str, Any]) -> RunRecord:
    config = {"choices": hydra.get("choices", {}), "seed": hydra.get("seed")}
    try:
        return read_record(job)
    except FileNotFoundError:
        return RunRecord(job, NO_RESULT, config, error=f"it ended, or was stopped, before it wrote {RECORD}")
    except (OSError, ValueError) as error:
        return RunRecord(job, UNREADABLE, config, error=str(error))
