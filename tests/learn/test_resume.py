"""A run that was stopped, wherever, and its resumption equal a run that was not, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from repvgg.learn.augment import RandAugment
from repvgg.learn.checkpoint import AtomicCheckpointIO, Checkpoints, Interrupted, newest_whole
from repvgg.learn.ema import EMA
from repvgg.learn.health import Health
from repvgg.learn.interrupt import Interruption, Signals
from repvgg.learn.logging import metrics_csv
from repvgg.learn.perf import PerfMonitor
from support.equal import checkpoint, different, logged
from support.training import classifier, datamodule, two_forms

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")
EPOCHS, BATCHES = 3, 6


class Noise(pl.Callback):
    """Draws from every global generator at every batch, as dropout would, and adds it to a weight."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            weight = next(module.parameters())
            weight += 1e-4 * (torch.randn(()) + random.random() + float(np.random.rand()))  # noqa: NPY002


class SignalAt(pl.Callback):
    """Sends a signal in the middle of a batch of the training, or of the validation."""

    def __init__(self, epoch: int, batch: int, validation: bool = False, signum: int = signal.SIGUSR1) -> None:
        self.at, self.validation, self.signum = (epoch, batch), validation, signum

    def on_before_zero_grad(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if not self.validation and (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.validation and (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), self.signum)


def train(directory: Path, digits: Path, *extra: pl.Callback, **options: Any) -> pl.Trainer:
    """From the newest checkpoint of the directory, if there is one."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    interruption = Interruption()
    callbacks = [interruption, EMA(0.9), two_forms(), PerfMonitor(1.0), Health(str(directory)), Noise(), *extra]
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        callbacks=[*callbacks, Checkpoints(str(directory / "checkpoints"))],
        logger=metrics_csv(str(directory)),
        default_root_dir=directory,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    data = datamodule(digits, mixup=0.2, rand_augment=RandAugment(2, 9))
    with Signals() as signals:
        interruption.signals = signals
        with signals.deferred():
            run.fit(
                classifier(warmup_epochs=1),
                datamodule=data,
                ckpt_path=newest_whole(directory / "checkpoints"),
                weights_only=True,
            )
    return run


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    train(directory, digits)
    return directory


PLACES = [(0, 0, False), (0, 3, False), (1, 5, False), (1, 0, True), (2, 2, False), (2, 1, True), (2, 5, False)]


@pytest.mark.parametrize(("epoch", "batch", "validation"), PLACES)
def test_a_signal_anywhere_costs_nothing(
    epoch: int, batch: int, validation: bool, whole: Path, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path, digits, SignalAt(epoch, batch, validation))
    assert stopped.value.code == 75
    assert stopped.value.saved
    train(tmp_path, digits)
    assert different(checkpoint(whole), checkpoint(tmp_path)) == []
    assert logged(whole) == logged(tmp_path)
    assert (whole / "health.csv").read_text() == (tmp_path / "health.csv").read_text()
