"""`metrics.csv`: rows are there at once, whole after a kill, and wait in memory while the disk is full."""

import csv
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg.learn.logging import metrics_csv
from repvgg.report.record import read_history
from support.disk import full_disk

ROWS = [{"train/loss": 0.5}, {"val/top1": 0.25, "epoch": 0}, {"train/loss": 0.25}, {"a": 1.0, "z": 2.0}]


def rows_of(directory: Path) -> list[dict[str, str]]:
    """What is not blank."""
    with (directory / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def written(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{**{key: str(value) for key, value in row.items()}, "step": str(step)} for step, row in enumerate(rows)]


def test_a_row_is_in_the_file_when_it_was_logged(tmp_path: Path) -> None:
    logger = metrics_csv(str(tmp_path))
    for step, row in enumerate(ROWS):
        logger.log_metrics({key: torch.tensor(value) for key, value in row.items()}, step)
        assert rows_of(tmp_path) == written(ROWS[: step + 1])
    logger.finalize("success")
    assert rows_of(tmp_path) == written(ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_the_files_of_earlier_starts_stay_and_no_number_is_used_twice(tmp_path: Path) -> None:
    for start in range(3):
        metrics_csv(str(tmp_path)).log_metrics({"start": float(start)}, step=1)
    (tmp_path / "metrics.1.csv").unlink()
    metrics_csv(str(tmp_path)).log_metrics({"start": 3.0}, step=1)
    starts = {path.name: path.read_text().split()[1] for path in tmp_path.iterdir()}
    assert starts == {"metrics.2.csv": "1.0,1", "metrics.3.csv": "2.0,1", "metrics.csv": "3.0,1"}


def test_the_record_of_an_earlier_start_is_not_this_ones(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("interrupted")
    metrics_csv(str(tmp_path))
    assert (tmp_path / "result.1.json").read_text() == "interrupted"
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("column", ["train/loss", "new"])
def test_a_full_disk_costs_a_warning_and_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str) -> None:
    logger = metrics_csv(str(tmp_path))
    logger.log_metrics({"train/loss": 0.0}, step=0)
    whole = (tmp_path / "metrics.csv").read_bytes()
    with full_disk(len(whole) + 3), caplog.at_level(logging.INFO):  # half of a row fits
        for step in range(1, 4):
            logger.log_metrics({column: float(step)}, step=step)
        logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_bytes().startswith(whole)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"{tmp_path}/metrics.csv: File too large. Its rows are kept in memory" in warnings[0]
    assert "lacks the last 3 rows" in caplog.text
    assert read_history(tmp_path)["step"].tolist() == [0]
    logger.log_metrics({column: 4.0}, step=4)
    assert rows_of(tmp_path) == [
        {"train/loss": "0.0", "step": "0"},
        *({column: f"{step}.0", "step": str(step)} for step in range(1, 5)),
    ]
    assert "metrics.csv is written again; no row is missing" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    with full_disk(len(whole)):
        logger.log_metrics({column: 5.0}, step=5)
    assert caplog.text.count("File too large") == 2  # a second incident


COLUMNS = st.dictionaries(st.sampled_from("abcd"), st.floats(allow_nan=False), min_size=1)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(COLUMNS, st.booleans()), min_size=1, max_size=12), room=st.integers(0, 40))
def test_whatever_the_disk_did_all_rows_are_there_in_the_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[dict[str, float], bool]], room: int
) -> None:
    directory = tmp_path_factory.mktemp("csv")
    logger = metrics_csv(str(directory))
    file = directory / "metrics.csv"
    for step, (row, full) in enumerate(rows):
        if full:
            with full_disk((file.stat().st_size if file.exists() else 0) + room):
                logger.log_metrics(row, step)
        else:
            logger.log_metrics(row, step)
    logger.finalize("success")
    assert rows_of(directory) == written([row for row, _ in rows])


KILLED = """
import os, sys
from repvgg.learn.logging import metrics_csv
logger = metrics_csv(sys.argv[1])
for step in range(1_000_000):
    logger.log_metrics({"loss": float(step), f"column/{step // 7}": 1.0}, step)
    os.write(1, b"%d\\n" % step)
"""


@pytest.mark.slow
def test_a_killed_process_keeps_every_row_that_it_logged(tmp_path: Path) -> None:
    """With a new column at every seventh row, so that most kills come while the file is made anew."""
    for attempt, after in enumerate((30, 75, 130)):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        command = [sys.executable, "-c", KILLED, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == after:
                    break
            process.kill()
            last = int([str(after), *process.stdout.read().split()][-1])
        steps = read_history(directory).query("metric == 'loss'")["step"].tolist()
        assert steps[: last + 1] == list(range(last + 1))
        assert len(steps) <= last + 2


HELPER_KILLED = """
import os, signal, subprocess, sys, time
from repvgg.learn.logging import RunLogger

logger = RunLogger(mode="offline", project="p", save_dir=sys.argv[1])
logger.log_hyperparams({"a": 1})
logger.log_metrics({"x": 1.0}, step=0)
children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
helpers = [int(pid) for pid in children if "wandb-core" in open(f"/proc/{pid}/cmdline").read()]
assert helpers
for pid in helpers:
    os.kill(pid, signal.SIGTERM)
time.sleep(1)
for step in range(1, 4):
    logger.log_metrics({"x": 2.0}, step=step)
logger.log_table("t", ["a"], [[1]])
logger.finish({"s": 1}, 75, preempted=True)
print("went on")
"""


@pytest.mark.slow
def test_a_run_goes_on_without_its_helper_process(tmp_path: Path) -> None:
    """As after `scancel`, which sends SIGTERM to all processes of a job."""
    script = tmp_path / "script.py"
    script.write_text(HELPER_KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stdout
    assert done.stderr.count("helper process is gone") == 1
