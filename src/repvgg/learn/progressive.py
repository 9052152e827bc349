"""Progressive resizing: small training images first."""

from __future__ import annotations

import pytorch_lightning as pl

from repvgg.data.transforms import PadCrop
from repvgg.learn.datamodule import ImageDataModule


class ProgressiveResize(pl.Callback):
    """Trains on images that grow from ``start`` to ``end`` pixels; validation keeps its own size.

    Linear between two points of the training and constant outside, rounded to ``multiple`` (ffcv-imagenet's
    ``get_resolution``). The size is a function of the epoch alone, so a resumed run continues with the right one.
    Logs ``perf/train_px``.

    With ``compile=true`` every size is compiled when it first occurs, and never again; from the ninth on (validation's
    counted too, ``torch._dynamo.config.recompile_limit``) torch would run eagerly.

    Args:
        start, end: pixels.
        begin, finish: where the ramp begins and ends, as fractions of the epochs.
        multiple: sizes are multiples of this; 32 is the network's total stride.

    Raises:
        ValueError: values out of range, no number of epochs, or data that cannot change its size.
    """

    def __init__(self, start: int, end: int, begin: float, finish: float, multiple: int = 32) -> None:
        if multiple < 1 or start < 1 or end < 1 or start % multiple or end % multiple:
            raise ValueError(
                f"callbacks.resize: start={start} and end={end} must be positive multiples of multiple={multiple}"
            )
        if not 0 <= begin <= finish <= 1:
            raise ValueError(f"callbacks.resize: 0 ≤ begin ≤ finish ≤ 1 must hold, got begin={begin} finish={finish}")
        self.start, self.end, self.begin, self.finish, self.multiple = start, end, begin, finish, multiple

    def size(self, epoch: int, epochs: int) -> int:
        """Pixels in ``epoch`` (from 0) of ``epochs``."""
        begin, finish = self.begin * epochs, self.finish * epochs
        if epoch >= finish:
            return self.end
        share = max(0.0, epoch - begin) / (finish - begin) if finish > begin else 0.0
        return round((self.start + share * (self.end - self.start)) / self.multiple) * self.multiple

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say before the training what would stop it."""
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError(
                "callbacks.resize needs repvgg's ImageDataModule; switch it off with callbacks.resize=null"
            )
        if isinstance(data.transforms["train"], PadCrop):
            raise ValueError(
                "callbacks.resize: the training images are cut by PadCrop, and PadCrop cannot change its size: "
                "switch resizing off with callbacks.resize=null"
            )
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(f"callbacks.resize needs a number of epochs, trainer.max_epochs={trainer.max_epochs}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the epoch's first batch is asked for."""
        assert trainer.max_epochs is not None
        size = self.size(trainer.current_epoch, trainer.max_epochs)
        trainer.datamodule.set_train_size(size)  # type: ignore[attr-defined]
        pl_module.log("perf/train_px", float(size), on_step=False, on_epoch=True)
