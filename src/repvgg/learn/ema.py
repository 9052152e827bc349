"""Averaged weights: what is validated, converted, tested and kept instead of the last step's."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights, updated after every optimiser step (Polyak and Juditsky 1992).

    ``average ← d · average + (1 − d) · weights`` with ``d = min(decay, (1 + t) / (10 + t))`` after t updates:
    TensorFlow's warm-up of the decay, without which a short run would average its random beginning. The first update
    copies.

    BatchNorm's running statistics are averaged with the same d: they are averages already, those of the averaged
    weights lie near the average of those of the weights, and no pass over the data is needed to find them, so that
    every validation converts a network whose statistics belong to its weights. ``num_batches_tracked`` is copied.

    Lightning's callback does the rest: it swaps the average in while validating, gives it to the network at the end
    of training, and saves it as a checkpoint's ``state_dict`` (what evaluation loads) beside the weights to resume
    from. List this callback before those that look at the network.

    Args:
        decay: 1/(1 − decay) steps is how far back the average reaches.

    Raises:
        ValueError: a decay outside 0 … 1, or weights in half precision, which an average cannot move.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must be at least 0 and below 1")
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self._validating = False
        self._left_out: int | None = None

    def leave_out(self, step: int) -> None:
        """The optimiser has not taken this step (from 0): there is nothing new to average."""
        self._left_out = step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every step that was taken."""
        return step_idx is not None and step_idx != self._left_out

    @torch.no_grad()
    def _average(self, averages: list[Tensor], weights: list[Tensor], _: object) -> None:
        """Tensors of one dtype in place, as AveragedModel calls it from its second update on."""
        assert self._average_model is not None
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, weights)
            return
        updates = int(self._average_model.n_averaged)  # on the CPU: reading it waits for no GPU
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average: Lightning copies the network before it has its device, and would average on the CPU."""
        dtype = next(pl_module.parameters()).dtype
        if torch.finfo(dtype).bits < 32:
            raise ValueError(
                f"an average of {str(dtype).removeprefix('torch.')} weights stands still: 1 − decay is less than their "
                "rounding. Take trainer.precision=bf16-mixed, or callbacks.ema=null"
            )
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        """For a validation and back."""
        super()._swap_models(pl_module)
        self._validating = not self._validating

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """As Lightning's, which takes one for the other while a validation has them swapped."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._validating:
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Only to resume: a test after the training would get the last step's weights instead of the average."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not yet: the last checkpoint is about to be written, and holds both as all the others do."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the network the average."""
        self._copy_average_to_current(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The network has the average by now."""
        if stage == "fit":
            self._average_model = None
