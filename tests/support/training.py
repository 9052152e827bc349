"""A small real training: a tiny network on the embedded digits through FFCV."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from repvgg.data.transforms import CenterCrop, PadCrop
from repvgg.learn.checkpoint import AtomicCheckpointIO
from repvgg.learn.datamodule import ImageDataModule
from repvgg.learn.module import Classifier
from repvgg.learn.throughput import Throughput
from repvgg.learn.two_forms import TwoFormValidation
from support.networks import tiny


def datamodule(directory: Path, **options: Any) -> ImageDataModule:
    options = {"batch_size": 64, "seed": 0, **options}
    return ImageDataModule(
        train_file=str(directory / "train.beton"),
        val_file=str(directory / "val.beton"),
        num_classes=10,
        train_transform=PadCrop(32, 4),
        val_transform=CenterCrop(32, 1.0),
        mean=[78.0] * 3,
        std=[88.0] * 3,
        **options,
    )


def classifier(net: nn.Module | None = None, seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    net = tiny(num_classes=10, strides=(1, 2, 2, 2, 1)) if net is None else net
    options = {"lr": 0.1, "lr_batch": 64, "batch_size": 64, "weight_decay": 1e-4, **options}
    return Classifier(net, num_classes=10, optimizer=partial(torch.optim.SGD, momentum=0.9), **options)


def two_forms(**options: Any) -> TwoFormValidation:
    return TwoFormValidation(Throughput(resolution=32, batch=4, warmup=1, batches=3), **options)


def trainer(directory: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "limit_train_batches": 5, **options}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=directory,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
