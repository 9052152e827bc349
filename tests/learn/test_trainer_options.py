"""Options of Lightning's Trainer do with this loader and these checkpoints what Lightning says of them."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer

from repvgg.learn.checkpoint import TIME_IS_OVER, Checkpoints, Interrupted
from repvgg.learn.logging import quiet_lightning
from repvgg.learn.run import train_and_test
from support.commands import heavy
from support.equal import checkpoint, different
from support.training import classifier, datamodule, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen(pl.Callback):
    """Records of the images of every training batch, by epoch; how many images were validated and tested."""

    def __init__(self) -> None:
        self.trained: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []
        self.tested = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        records = trainer.train_dataloader.batch_records(trainer.current_epoch, batch_idx)
        self.trained.setdefault(trainer.current_epoch, []).append([int(r) for r in records])

    def on_validation_start(self, trainer, pl_module) -> None:
        self.validated.append(0)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validated[-1] += len(batch[0])

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.tested += len(batch[0])


def train(directory: Path, digits: Path, *callbacks: pl.Callback, **options: Any) -> Seen:
    seen, keeper = Seen(), Checkpoints(str(directory / "checkpoints"), monitor="val/top1")
    options = {"max_epochs": 3, "limit_train_batches": 3, "enable_checkpointing": True, **options}
    train_and_test(trainer(directory, [seen, *callbacks, keeper], **options), classifier(), datamodule(digits))
    return seen


# --- which images ---


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_sees_the_same_batches_in_every_epoch(digits: Path, tmp_path: Path) -> None:
    seen = train(tmp_path, digits, overfit_batches=2)
    assert [len(batches) for batches in seen.trained.values()] == [2, 2, 2]
    assert seen.trained[0] == seen.trained[1] == seen.trained[2]
    assert seen.validated == [128] * 3
    assert seen.tested == 128


def test_without_overfitting_every_epoch_has_an_order_of_its_own(digits: Path, tmp_path: Path) -> None:
    seen = train(tmp_path, digits)
    assert seen.trained[0] != seen.trained[1]


def test_loaders_that_are_asked_for_again_are_the_same(digits: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "again", digits, reload_dataloaders_every_n_epochs=1)
    once = train(tmp_path / "once", digits)
    assert again.trained == once.trained
    assert different(checkpoint(tmp_path / "again")["state_dict"], checkpoint(tmp_path / "once")["state_dict"]) == []


@pytest.mark.parametrize(("limit", "images"), [(2, 128), (0.5, 192)])
def test_a_limit_of_the_validation_is_one_of_the_test(limit: float, images: int, digits: Path, tmp_path: Path) -> None:
    """0.5 of 6 batches of 64."""
    seen = train(tmp_path, digits, limit_val_batches=limit, max_epochs=1)
    assert (seen.validated, seen.tested) == ([images], images)


# --- the end ---


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"check_val_every_n_epoch": 5}, 1),
        ({"check_val_every_n_epoch": 2}, 2),
        ({"check_val_every_n_epoch": 3, "max_epochs": -1, "max_steps": 12}, 2),
    ],
)
def test_the_last_epoch_is_validated(options: dict[str, Any], validations: int, digits: Path, tmp_path: Path) -> None:
    seen = train(tmp_path, digits, **options)
    assert len(seen.validated) == validations
    assert seen.tested == 360
    assert checkpoint(tmp_path, "best.ckpt")["global_step"] > 0


class StopAfter(pl.Callback):
    """As a callback that looks at the training's loss does."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = True


def test_a_training_that_ends_before_its_first_validation_has_not_finished(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"at epoch 1 without a validation, .* lower trainer.check_val_every_n_epoch=2"
    ):
        train(tmp_path, digits, StopAfter(), check_val_every_n_epoch=2)


class Batches(Timer):
    """A timer by which every batch takes a second."""

    def __init__(self, seconds: int, interval: str = "step") -> None:
        super().__init__(timedelta(seconds=seconds), interval=interval)
        self.batches = 0

    def time_elapsed(self, stage: str = "train") -> float:
        return self.batches + self._offset

    def on_train_batch_end(self, trainer, *args: Any, **kwargs: Any) -> None:
        self.batches += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


@pytest.mark.parametrize(
    ("seconds", "accumulate"),
    [(4, 1), (3, 2), *(heavy(seconds, accumulate) for seconds in (1, 8) for accumulate in (1, 2))],
)
def test_a_training_whose_time_is_over_goes_on_as_if_it_had_not_stopped(
    seconds: int, accumulate: int, digits: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "limit_train_batches": 4}
    whole = train(tmp_path / "whole", digits, Batches(99), **options)
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "run", digits, Batches(seconds), **options)
    assert stopped.value.code == TIME_IS_OVER
    assert stopped.value.reason == (
        "trainer.max_time, which is over; saved, the same command with a larger trainer.max_time goes on"
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    keeper, seen = Checkpoints(str(last.parent), monitor="val/top1"), Seen()
    for limit, over in ((seconds, True), (99, False)):  # with the same limit nothing is trained
        run = trainer(tmp_path, [seen, Batches(limit), keeper], max_epochs=3, enable_checkpointing=True, **options)
        if over:
            with pytest.raises(Interrupted):
                train_and_test(run, classifier(), datamodule(digits), last)
            assert seen.trained == {}
        else:
            train_and_test(run, classifier(), datamodule(digits), last)
    trained = [batch for batches in seen.trained.values() for batch in batches]
    expected = [batch for batches in whole.trained.values() for batch in batches]
    assert trained == expected[len(expected) - len(trained) :]
    assert len(trained) == len(expected) - -(-seconds // accumulate) * accumulate
    found = checkpoint(tmp_path / "run")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert different(checkpoint(tmp_path / "whole")[key], found[key]) == [], key


def test_time_that_is_over_at_the_end_of_an_epoch_stops_there(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, digits, Batches(2, interval="epoch"))
    assert checkpoint(tmp_path)["repvgg_position"] == {"name": "complete", "epoch": 1, "batches": 0, "images": 0}


def test_time_that_is_over_with_the_training_is_no_interruption(digits: Path, tmp_path: Path) -> None:
    assert train(tmp_path, digits, Batches(9)).tested == 360


@pytest.mark.parametrize("batches", [True, 2])
def test_a_dry_run_keeps_nothing(batches: int, digits: Path, tmp_path: Path) -> None:
    seen = train(tmp_path, digits, ModelCheckpoint(tmp_path / "mine"), fast_dev_run=batches)
    images = 64 * int(batches)
    assert sum(map(len, seen.trained[0])) == images
    assert (seen.validated, seen.tested) == ([images], images)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- what is said ---


def test_what_was_asked_for_is_shown_and_nothing_else(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_lightning()
    caplog.set_level(logging.INFO)
    stop = EarlyStopping("val/loss", patience=1, min_delta=99, verbose=True)
    keeper = ModelCheckpoint(tmp_path / "mine", monitor="val/loss", save_top_k=1, verbose=True)
    train(tmp_path, digits, stop, keeper, profiler="simple")
    said = caplog.text
    assert "Metric val/loss improved" in said
    assert "Signaling Trainer to stop" in said
    assert "'val/loss' reached" in said
    assert "run_training_batch" in said  # of the profiler's table
    for unasked in ("GPU available", "Tip", "`Trainer.fit` stopped", "Loading `train_dataloader`", "weights_only"):
        assert unasked not in said
