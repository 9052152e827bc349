"""`torchrun src/train.py`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from support.commands import assert_same_training, begun, only_run, record, small, start, wait_until

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "src/train.py"]


def test_a_stopped_torchrun_goes_on(digits: Path, tmp_path: Path) -> None:
    overrides = small(digits, tmp_path, "trainer.devices=2", epochs=4)
    stopped = start([*TORCHRUN, *overrides], tmp_path / "stopped.log")
    try:
        wait_until(lambda: begun(tmp_path), "the first epoch", 120)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(60) != 0
    finally:
        stopped.kill()
        stopped.wait()
    run = only_run(tmp_path)
    assert record(run)["status"] == "interrupted"
    assert record(run)["config"]["world_size"] == 2

    again = start([*TORCHRUN, *overrides], tmp_path / "again.log")
    assert again.wait(150) == 0, (tmp_path / "again.log").read_text()[-2000:]
    assert "goes on in epoch" in (tmp_path / "again.log").read_text()
    assert record(run)["status"] == "finished"

    whole = tmp_path / "whole"
    whole.mkdir()
    alone = start([*TORCHRUN, *small(digits, whole, "trainer.devices=2", epochs=4)], whole / "log")
    assert alone.wait(150) == 0
    assert_same_training(run, only_run(whole))


def test_another_number_of_processes_than_ranks_is_an_error(digits: Path, tmp_path: Path) -> None:
    wrong = start([*TORCHRUN, *small(digits, tmp_path, "trainer.devices=1")], tmp_path / "log")
    assert wrong.wait(60) != 0
    assert (
        "error: torchrun started 2 processes here and 2 in all, and trainer.devices=1" in (tmp_path / "log").read_text()
    )
