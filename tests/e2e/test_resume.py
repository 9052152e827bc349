"""`python src/train.py` is killed, stopped or poisoned; the same command again leaves what an undisturbed run does.

`python experiments/reliability.py` does the same, and more, many times and at random.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from repvgg.learn.checkpoint import damage
from support.faults import POISON, SMALL, Differences, Start, Training, differences, events

# Trainings of a minute in all; learn/test_resume.py holds the same laws in one process.
pytestmark = pytest.mark.slow
TWO_EPOCHS = ["logger=wandb_offline", "trainer.max_epochs=2"]
NOTHING = Differences([], [])


def finished(directory: Path, *overrides: str) -> Training:
    run = Training(directory, [*TWO_EPOCHS, *overrides])
    run.finish()
    return run


@pytest.fixture(scope="module")
def data(digits: Path) -> str:
    return f"data.dir={digits}"


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return finished(tmp_path_factory.mktemp("whole") / "run", data)


@pytest.fixture(scope="module")
def whole_of_two(data: str, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return finished(tmp_path_factory.mktemp("whole") / "run", data, "trainer.devices=2")


@pytest.fixture
def run(data: str, tmp_path: Path) -> Iterator[Training]:
    yield from of_which_nothing_stays(Training(tmp_path / "run", [*TWO_EPOCHS, data]))


@pytest.fixture
def run_of_two(data: str, tmp_path: Path) -> Iterator[Training]:
    yield from of_which_nothing_stays(Training(tmp_path / "run", [*TWO_EPOCHS, data, "trainer.devices=2"]))


def of_which_nothing_stays(run: Training) -> Iterator[Training]:
    yield run
    assert not any(start.processes() for start in run.starts)


def stop(run: Training, signum: signal.Signals, what: str, times: int, rank: int = 0) -> Start:
    """Send it when the training has begun something for the n-th time, and wait until no process is left."""
    with run.started() as start:
        assert start.wait_for(lambda: len(run.since(start, what)) >= times), start.output
        os.kill(start.rank(rank), signum)
        assert not start.wait_until_all_ended(60)
    return start


def test_the_small_run_of_these_tests_has_all_that_could_be_lost(whole: Training) -> None:
    words = " ".join(SMALL)
    assert all(name in words for name in ("mixup", "RandAugment", "EMA", "log_every_n_steps=1"))
    assert {e.what for e in events(whole.directory)} == {
        *("begin", "training", "validation", "checkpoint", "test", "end")
    }
    assert len([e for e in events(whole.directory) if e.what == "training"]) == 2 * 22


def test_a_kill_in_the_training_costs_nothing(whole: Training, run: Training) -> None:
    """After the checkpoint before the first validation, in the second epoch."""
    start = stop(run, signal.SIGKILL, "training", 30)
    assert start.process.returncode == -signal.SIGKILL
    assert run.phase(start) in ("training", "checkpoint")
    run.finish()
    assert 0 < run.repeated() < 22
    found = differences(whole.directory, run.directory)
    assert (found.result, found.rows) == ([], [])  # W&B's own file may lack the last second


def test_a_finished_run_is_not_trained_again(whole: Training) -> None:
    before = len(events(whole.directory))
    assert "is finished already" in whole.finish().output
    assert len(events(whole.directory)) == before


@pytest.mark.parametrize(("what", "times"), [("begin", 1), ("checkpoint", 1), ("validation", 3), ("test", 1)])
def test_a_kill_at_any_time_costs_nothing(what: str, times: int, whole: Training, run: Training) -> None:
    stop(run, signal.SIGKILL, what, times)
    run.finish()
    found = differences(whole.directory, run.directory)
    assert (found.result, found.rows) == ([], [])


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75), ("SIGUSR2", 75)])
def test_a_signal_saves_and_leaves(name: str, code: int, whole: Training, run: Training) -> None:
    start = stop(run, signal.Signals[name], "training", 11)
    assert start.process.returncode == code
    assert run.record()["status"] == "interrupted"
    run.finish()
    assert run.repeated() == 0
    assert differences(whole.directory, run.directory) == NOTHING


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(whole: Training, run: Training) -> None:
    stop(run, signal.SIGKILL, "training", 30)
    last = run.directory / "checkpoints" / "last.ckpt"
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size // 2)
    assert damage(last)
    start = run.finish()
    assert f"{last} is damaged" in start.output
    assert "the one before it is used" in start.output
    found = differences(whole.directory, run.directory)
    assert (found.result, found.rows) == ([], [])


@pytest.mark.parametrize(
    ("rank", "signum", "code"), [(0, signal.SIGKILL, -9), (1, signal.SIGKILL, 76), (1, signal.SIGTERM, 143)]
)
def test_what_happens_to_one_rank_ends_both_and_costs_nothing(
    rank: int, signum: signal.Signals, code: int, whole_of_two: Training, run_of_two: Training
) -> None:
    start = stop(run_of_two, signum, "training", 30, rank)
    assert start.process.returncode == code, start.output
    run_of_two.finish()
    found = differences(whole_of_two.directory, run_of_two.directory)
    assert (found.result, found.rows) == ([], [])


def test_a_step_that_was_poisoned_is_named_and_once_put_right_costs_nothing(whole: Training, run: Training) -> None:
    run.environment = {POISON: '{"step": 27}'}
    with run.started() as start:
        assert start.wait() == 1
    assert "the loss is not finite at step 27 (epoch 1" in start.output
    assert (run.directory / "nonfinite_step_27.json").exists()
    run.environment = {}
    run.finish()
    found = differences(whole.directory, run.directory)
    assert (found.result, found.rows) == ([], [])


def test_the_comparison_sees_a_bit_and_a_row(whole: Training, tmp_path: Path) -> None:
    """Of a copy nothing differs; of one with another weight, or a row less, that does."""
    copy = Path(shutil.copytree(whole.directory, tmp_path / "run"))
    assert differences(whole.directory, copy) == NOTHING
    last = copy / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    name, weight = next(iter(content["state_dict"].items()))
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(content, last)
    lines = (copy / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "metrics.csv").write_text("".join(lines[:3] + lines[4:]))
    found = differences(whole.directory, copy)
    assert found.result == [f"last.ckpt/state_dict/{name}"]
    assert found.rows
    assert all(row.startswith("metrics.csv: ") and " is None, not " in row for row in found.rows)
