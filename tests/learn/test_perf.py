"""The warning about a loader that is too slow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from repvgg.learn.perf import PerfMonitor
from support.networks import tiny
from support.training import classifier, datamodule, trainer


class Clock:
    """Seconds that pass when a test says so: no test here waits, and none depends on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(TensorDataset):
    """Lets time pass before chosen items."""

    def __init__(self, seconds: dict[int, float], clock: Clock) -> None:
        super().__init__(torch.randn(12, 3, 32, 32), torch.arange(12) % 10)
        self.seconds, self.clock, self.asked = seconds, clock, 0

    def __getitem__(self, index: int):
        self.clock.now += self.seconds.get(self.asked, 0.0)
        self.asked += 1
        return super().__getitem__(index)


class Work(pl.Callback):
    """Every step takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.clock.now += 1


Fit = Callable[..., list[str]]


@pytest.fixture
def fit(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Train with these waits, in seconds by item number, and return the warnings."""

    def fit(seconds: dict[int, float], epochs: int, **options: float) -> list[str]:
        clock = Clock()
        monkeypatch.setattr("repvgg.learn.perf.time", clock)
        loader = DataLoader(Slow(seconds, clock), batch_size=2)
        callbacks = [PerfMonitor(**options), Work(clock)]
        run = trainer(tmp_path, callbacks, max_epochs=epochs, limit_train_batches=6, limit_val_batches=0)
        with caplog.at_level(logging.WARNING, "repvgg.learn.perf"):
            run.fit(classifier(tiny(num_classes=10)), loader, loader)
        return [record.getMessage() for record in caplog.records if record.name == "repvgg.learn.perf"]

    return fit


def every(seconds: float, epochs: range) -> dict[int, float]:
    """Wait so long before every batch of these epochs: 6 batches of two items."""
    return {12 * epoch + 2 * i: seconds for epoch in epochs for i in range(6)}


def test_a_slow_loader_is_named_once_with_remedies(fit: Fit) -> None:
    (message,) = fit(every(1.0, range(3)), 3)
    # 5 waits, the first batch's left out, and 6 steps of a second, two images each.
    assert message.startswith(
        "training waited for data during 45 % of epoch 0, at 1 images/s. What helps, in this order"
    )
    order = ["CPU cores per GPU", "write.short_side=256", "data.batches_ahead=6", "data.os_cache=false"]
    assert [message.index(words) for words in order] == sorted(message.index(words) for words in order)


def test_it_warns_again_when_it_gets_worse(fit: Fit) -> None:
    """Half of the time, as much again, three quarters and nine tenths of it."""
    waits = {**every(1.0, range(2)), **every(3.0, range(2, 4)), **every(9.0, range(4, 5))}
    messages = fit(waits, 5, warn_share=0.2)
    assert [m.split("during ")[1].split(",")[0] for m in messages] == ["45 % of epoch 0", "75 % of epoch 2"]


def test_the_first_batch_of_a_run_may_take_its_time(fit: Fit) -> None:
    assert fit({0: 100.0}, 2) == []
    assert len(fit({12: 100.0}, 2)) == 1  # but not that of the second epoch


def test_the_threshold_is_the_options(fit: Fit) -> None:
    assert fit(every(1.0, range(2)), 2, warn_share=0.6) == []
    assert len(fit(every(1.0, range(2)), 2, warn_share=0.4)) == 1


def test_remedies_are_those_that_apply(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(2)))
    run = trainer(tmp_path, [PerfMonitor(warn_share=1e-9)], limit_val_batches=0)
    data = datamodule(digits, num_threads=1, batches_ahead=4, os_cache=False)
    with caplog.at_level(logging.WARNING, "repvgg.learn.perf"):
        run.fit(classifier(), datamodule=data)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "repvgg.learn.perf"]
    assert "(1) data.num_threads=null, which is 2 per process here instead of 1" in message
    assert "2 are allowed to 1 process" in message
    assert "data.batches_ahead=8" in message
    assert "data.os_cache=true" in message


def test_a_share_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.perf\.warn_share=0 must be above 0"):
        PerfMonitor(warn_share=0)
