"""How fast training goes, and what it waits for."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch


class PerfMonitor(pl.Callback):
    """Logs, for every training epoch, ``perf/images_per_s``, ``perf/data_wait_share`` and ``perf/gpu_mem_peak_gib``.

    images/s counts the images of all ranks; the wait is the share of rank 0's time between one batch's end and the
    next one's start; the memory is rank 0's peak, 0 on a CPU.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.began = self.batch_ended = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here: what passed since the last one ended was waiting."""
        self.waited += time.perf_counter() - self.batch_ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self.images += len(batch[0])
        self.batch_ended = time.perf_counter()
        if trainer.is_last_batch:  # before validation, which runs inside the training epoch
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cuda = pl_module.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(pl_module.device)
        elapsed = time.perf_counter() - self.began
        peak = torch.cuda.max_memory_allocated(pl_module.device) if cuda else 0
        pl_module.log_dict(
            {
                "perf/images_per_s": self.images * trainer.world_size / elapsed,
                "perf/data_wait_share": self.waited / elapsed,
                "perf/gpu_mem_peak_gib": peak / 2**30,
            },
            on_step=False,
            on_epoch=True,
        )
