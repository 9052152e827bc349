"""The starts of one run read as one history: the later start's value of each step and metric, whoever kept it."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg.learn.logging import metrics_csv
from repvgg.report.offline import read_offline_run
from repvgg.report.record import write_record
from repvgg.report.runs import Run, read_runs
from support import wandb_files
from support.disk import full_disk

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
TOP1, DEPLOY = "val/top1", "val/deploy/top1"
#: Starts, oldest first, each with its rows: step and values. A start goes back to any step.
VALUES = st.dictionaries(st.sampled_from([TOP1, DEPLOY]), st.integers(0, 100).map(lambda n: n / 100), min_size=1)
START = st.tuples(st.integers(0, 8), st.lists(VALUES, max_size=6)).map(
    lambda start: [(start[0] + i, row) for i, row in enumerate(start[1])]
)
STARTS = st.lists(START, min_size=1, max_size=4)
Start = list[tuple[int, dict[str, float]]]


def last_write_wins(starts: list[Start]) -> dict[tuple[int, str], float]:
    return {(step, name): value for start in starts for step, row in start for name, value in row.items()}


def history(run: Run) -> dict[tuple[int, str], float]:
    """Fails where a step and a metric come twice."""
    rows = list(zip(run.history["step"], run.history["metric"], run.history["value"], strict=True))
    read = {(step, name): value for step, name, value in rows}
    assert len(read) == len(rows)
    assert [step for step, _, _ in rows] == sorted(step for step, _, _ in rows)
    return read


def only(directory: Path) -> Run:
    (run,), _ = read_runs([str(directory)])
    return run


def row(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    return {**values, "epoch": step // 3, "trainer/global_step": step}


@settings(max_examples=60, deadline=None)
@given(starts=STARTS, data=st.data())
def test_wandbs_files_of_any_starts_read_as_one_history(
    tmp_path_factory: pytest.TempPathFactory, starts: list[Start], data: st.DataObject
) -> None:
    """Each online or offline, each ended or killed, and then torn somewhere in its last row."""
    directory = tmp_path_factory.mktemp("run")
    kept = []
    for number, start in enumerate(starts):
        killed, online = data.draw(st.booleans()), data.draw(st.booleans())
        file = wandb_files.write(
            directory / "wandb",
            [row(step, values) for step, values in start],
            started=BEGIN + timedelta(minutes=number),
            exit_code=None if killed else 0,
            online=online,
        )
        if killed and start and data.draw(st.booleans()):
            content = file.read_bytes()
            file.write_bytes(content[: -data.draw(st.integers(1, 20))])
            start = start[:-1]
        kept.append(start)
    run = only(directory)
    assert history(run) == last_write_wins(kept)
    assert run.ids == ("x",)


@settings(max_examples=60, deadline=None)
@given(starts=STARTS, torn=st.integers(0, 12))
def test_csv_files_of_any_starts_read_as_one_history(
    tmp_path_factory: pytest.TempPathFactory, starts: list[Start], torn: int
) -> None:
    directory = tmp_path_factory.mktemp("run")
    (directory / ".hydra").mkdir()
    (directory / "run.json").touch()
    for start in starts:
        logger = metrics_csv(str(directory))
        for step, values in start:
            logger.log_metrics({**values, "epoch": step // 3}, step)
    last = directory / "metrics.csv"
    if last.exists() and torn:
        lines = last.read_bytes().splitlines(keepends=True)
        last.write_bytes(b"".join(lines[:-1]) + lines[-1][: min(torn, len(lines[-1].rstrip()))])
        starts[-1].pop()
    assert history(only(directory)) == last_write_wins(starts)


def test_files_of_the_starts_in_several_directories_are_one_run(tmp_path: Path) -> None:
    rows = [row(step, {DEPLOY: step / 10}) for step in range(6)]
    wandb_files.write(tmp_path / "b" / "wandb", rows[:5], started=BEGIN, exit_code=None, online=True)
    later = [row(3, {DEPLOY: 0.9}), rows[5]]
    wandb_files.write(tmp_path / "a" / "wandb", later, started=BEGIN + timedelta(hours=1))
    run = only(tmp_path)
    assert history(run) == {(s, DEPLOY): v for s, v in enumerate([0, 0.1, 0.2, 0.9, 0.4, 0.5])}
    assert run.status == "finished"


def test_the_last_start_says_how_the_run_ended(tmp_path: Path) -> None:
    """Whatever the order of the directories' names: `run-` of a later start, `offline-run-` of an earlier one."""
    for number, (online, exit_code) in enumerate([(True, 0), (False, 1), (True, None)]):
        wandb_files.write(
            tmp_path / "wandb", [], started=BEGIN + timedelta(seconds=number), exit_code=exit_code, online=online
        )
        assert only(tmp_path).status == ("finished", "failed", "not finished")[number]


def test_an_attempt_that_did_not_reach_the_server_is_no_start(tmp_path: Path) -> None:
    file = wandb_files.write(tmp_path / "wandb", [row(1, {TOP1: 0.5})], started=BEGIN)
    empty = file.parents[1] / "run-20260102_000000-x" / file.name
    empty.parent.mkdir()
    empty.write_bytes(file.read_bytes()[:7])
    for _ in ("files alone", "the directory of a run"):
        run = only(tmp_path)
        assert (run.status, history(run)) == ("finished", {(1, TOP1): 0.5})
        (tmp_path / ".hydra").mkdir(exist_ok=True)


def test_long_rows_cross_blocks(tmp_path: Path) -> None:
    """Of the files made here."""
    rows = [{"text": "x" * length} for length in (10, 40_000, 32_700, 5, 100_000)]
    file = wandb_files.write(tmp_path, rows, started=BEGIN)
    assert read_offline_run(file).history["text"].str.len().tolist() == [10, 40_000, 32_700, 5, 100_000]


def test_a_record_that_the_disk_does_not_take_is_one_clear_error_or_a_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = rf"The record of the %s run, {tmp_path}/result.json, could not be written: File too large"
    arguments: dict[str, Any] = {"config": {}, "metrics": {}, "objective": None, "error": None}
    with full_disk(50):
        with pytest.raises(OSError, match=rf"{said % 'finished'}. Make room and give the same command again"):
            write_record(tmp_path, status="finished", **arguments)
        write_record(tmp_path, status="interrupted", **arguments)
    assert said % "interrupted" in caplog.text
    assert not list(tmp_path.iterdir())
