"""Commands whose run goes on from another's checkpoint, is cut short, or is a dry run."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest

from support.commands import ROOT, TRAIN, environment, record, small

pytestmark = pytest.mark.slow


def train(digits: Path, directory: Path, *more: str, epochs: int = 1) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, *small(digits, directory, "logger=csv", f"hydra.run.dir={directory}", *more, epochs=epochs)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=240
    )


def rates(directory: Path) -> dict[int, float]:
    with (directory / "metrics.csv").open() as rows:
        return {int(row["step"]): float(row["optim/lr"]) for row in csv.DictReader(rows) if row["optim/lr"]}


def test_a_run_goes_on_with_the_values_that_were_typed(digits: Path, tmp_path: Path) -> None:
    assert train(digits, tmp_path / "two", epochs=2).returncode == 0
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    done = train(digits, tmp_path / "on", f"ckpt_path={last}", "recipe.weight_decay=0.001", "recipe.lr=0.01", epochs=4)
    assert done.returncode == 0, done.stderr
    said = "with recipe.lr 0.005 → 0.01; recipe.weight_decay 0.0001 → 0.001; trainer.max_epochs 2 → 4"
    told = next(line for line in done.stdout.splitlines() if "goes on from" in line)
    assert all(part in told for part in said.removeprefix("with ").split("; ")), told
    assert train(digits, tmp_path / "whole", "recipe.lr=0.01", epochs=4).returncode == 0
    whole, on = rates(tmp_path / "whole"), rates(tmp_path / "on")
    assert on
    assert on == {step: rate for step, rate in whole.items() if step >= 44}
    past = train(digits, tmp_path / "past", f"ckpt_path={last}", epochs=2)
    assert past.returncode == 2
    assert "is of a training of 2 epochs, which trainer.max_epochs=2 ends before" in past.stderr
    assert not (tmp_path / "past").exists()


def test_a_run_whose_time_is_over_is_no_result_and_goes_on(digits: Path, tmp_path: Path) -> None:
    cut = train(digits, tmp_path / "run", "+trainer.max_time={seconds:1}", epochs=500)
    assert cut.returncode == 124, cut.stderr
    assert "interrupted by trainer.max_time, which is over; saved, the same command with a larger" in cut.stdout
    assert record(tmp_path / "run")["status"] == "interrupted"
    again = train(digits, tmp_path / "run", "+trainer.max_time={seconds:2}", epochs=500)
    assert again.returncode == 124, again.stderr
    assert "goes on in epoch" in again.stdout


def test_a_dry_run_counts_nowhere(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dry = train(digits, run, "+trainer.fast_dev_run=true")
    assert dry.returncode == 0, dry.stderr
    assert "was a dry run" in dry.stdout
    assert (record(run)["status"], record(run)["objective"]) == ("dry run", None)
    assert not (run / "checkpoints").exists()
    assert not (run / "run.json").exists()
    assert train(digits, run).returncode == 0  # in the same folder, which a dry run does not take
    assert record(run)["status"] == "finished"
