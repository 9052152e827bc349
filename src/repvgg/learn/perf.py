"""How fast training goes, and what it waits for."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)


class PerfMonitor(pl.Callback):
    """Logs, for every training epoch, ``perf/images_per_s``, ``perf/data_wait_share`` and ``perf/gpu_mem_peak_gib``.

    images/s counts the images of all ranks; the wait is the share of rank 0's time between one batch's end and the
    next one's start; the memory is rank 0's peak, 0 on a CPU.

    Args:
        warn_share: rank 0 warns, with remedies, after an epoch that waited for more than this share of its time. The
            first batch of the run does not count: until it is there, files are opened and buffers filled. The next
            warning comes when the share has grown by as much again.

    Raises:
        ValueError: a share that is not one.
    """

    def __init__(self, warn_share: float = 0.1) -> None:
        if not 0 < warn_share <= 1:
            raise ValueError(f"callbacks.perf.warn_share={warn_share} must be above 0 and at most 1, which never warns")
        self.warn_share = self.warn_above = warn_share
        self.start_up: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.began = self.batch_ended = time.perf_counter()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new run may warn anew."""
        self.warn_above, self.start_up = self.warn_share, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here: what passed since the last one ended was waiting."""
        waited = time.perf_counter() - self.batch_ended
        self.waited += waited
        if self.start_up is None:
            self.start_up = waited

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
        self._warn(trainer, elapsed)
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

    def _warn(self, trainer: pl.Trainer, elapsed: float) -> None:
        assert self.start_up is not None
        share = (self.waited - self.start_up) / max(elapsed - self.start_up, 1e-9)
        rate = self.images * trainer.world_size / max(elapsed - self.start_up, 1e-9)
        self.start_up = 0.0
        if trainer.is_global_zero and share > self.warn_above:
            self.warn_above = share + self.warn_share
            log.warning(
                "training waited for data during %.0f %% of epoch %d, at %.0f images/s. What helps, in this order: %s",
                100 * share,
                trainer.current_epoch,
                rate,
                "; ".join(f"({i}) {remedy}" for i, remedy in enumerate(_remedies(trainer), 1)),
            )


def _remedies(trainer: pl.Trainer) -> list[str]:
    """What still can be changed, most effective first, as overrides."""
    data = getattr(trainer, "datamodule", None)
    options: dict[str, Any] = getattr(data, "loader_options", {})
    cores, processes = len(os.sched_getaffinity(0)), trainer.num_devices
    share = max(1, cores // processes)
    threads = getattr(data, "num_threads", None) or share
    remedies = []
    if threads < share:
        remedies.append(f"data.num_threads=null, which is {share} per process here instead of {threads}")
    remedies += [
        f"more CPU cores per GPU: {cores} are allowed to {processes} process{'es' if processes > 1 else ''}",
        "smaller stored images, which decode faster: write the files again with write.short_side=256",
        f"data.batches_ahead={2 * options.get('batches_ahead', 3)}, if only some batches are late",
    ]
    if not options.get("os_cache", True):
        remedies.append("data.os_cache=true, if the file fits into memory")
    else:
        remedies.append("data.os_cache=false, if the file does not fit into memory")
    return remedies
