"""A loss or a gradient that is no number: stop with all that is needed to look into it, or leave the step out."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torchmetrics import Metric

from repvgg.files import replacing
from repvgg.learn.batchnorm import running_statistics
from repvgg.learn.ema import EMA

log = logging.getLogger(__name__)

CHOICES = ("stop", "skip")
#: How many of a batch's records a message names; the file has all.
NAMED = 8
REMEDIES = (
    "What helps: a lower recipe.lr, a longer recipe.warmup_epochs, trainer.precision=32-true; if it is one bad image, "
    "callbacks.guard.on_nonfinite=skip"
)


class NonFiniteLossError(RuntimeError):
    """Training has met a loss, a gradient or a weight that is NaN or infinite. Raised on all ranks at the same step."""

    exit_code = 1


@dataclass(frozen=True)
class _Step:
    """One step of the optimiser as this rank saw it.

    Attributes:
        epoch, number: from 0; the number is that of all optimiser steps before it.
        lr: of the first parameter group.
        batches: numbers within the epoch; several where gradients are accumulated.
        losses: their losses, on the device.
        finite: whether the gradient is; on the CPU, and final once ``copied`` has happened.
        copied: None where nothing has to be waited for.
    """

    epoch: int
    number: int
    lr: float
    batches: list[int]
    losses: list[Tensor]
    finite: Tensor
    copied: torch.cuda.Event | None

    def is_finite(self) -> bool:
        """Waits for the device."""
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.finite)


class LossGuard(pl.Callback):
    """Looks at every step's gradient after the ranks have added theirs up, so that all ranks see the same.

    A rank whose loss is not finite makes its own gradient NaN, and with it everybody's: no exchange beyond that of
    the gradients is needed. A gradient that overflows while the loss is finite is found as well. Only with a
    GradScaler (trainer.precision=16-mixed), whose business overflowing gradients are, the losses alone decide, in one
    small reduction.

    ``stop`` raises :class:`NonFiniteLossError`: on a CPU before the step is taken, on a GPU, which is never waited
    for within a step, when the one after it has been launched. ``<directory>/nonfinite_step_N.json`` then has every
    rank's batches, losses and records. No checkpoint is written with such weights, whoever asks for one.

    ``skip`` leaves the step out on all ranks: weights, momenta, averaged weights, BatchNorm statistics and the epoch's
    training metrics stay what they were before its first batch; only the schedule and the counters go on, as the
    loader does. It waits for the device at every step. Logs ``train/skipped_steps``, counted from the beginning of
    the run.

    Args:
        directory: for the file; ``checkpoints/`` in it is looked into for the last good checkpoint.
        on_nonfinite: ``stop`` or ``skip``.
        max_skips: in a row; one more stops.

    Raises:
        ValueError: another choice, or not at least one skip.
    """

    def __init__(self, directory: str, on_nonfinite: str = "stop", max_skips: int = 10) -> None:
        if on_nonfinite not in CHOICES:
            raise ValueError(f"callbacks.guard.on_nonfinite={on_nonfinite}: choose {' or '.join(CHOICES)}")
        if max_skips < 1:
            raise ValueError(
                f"callbacks.guard.max_skips={max_skips} must be at least 1; on_nonfinite=stop is what skips none"
            )
        self.directory = Path(directory)
        self.skipping = on_nonfinite == "skip"
        self.max_skips = max_skips
        self.skipped = self.in_a_row = 0
        self._begin()

    def _begin(self) -> None:
        self._batches: list[int] = []
        self._losses: list[Tensor] = []
        self._unjudged: list[_Step] = []
        self._kept: Callable[[], None] | None = None
        self._error: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The counts of skipped steps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict`."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    # --- a step ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a training before this one."""
        self._begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What a skipped step must leave as it is."""
        if self.skipping and not self._batches:
            self._kept = _keep(pl_module)
        self._batches.append(batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """A loss that is no number gives a gradient that is none, also where a part of it would be one."""
        value = loss.detach()
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(value))
        self._losses.append(value * trainer.accumulate_grad_batches / scale)
        loss.register_hook(lambda gradient: torch.where(value.isfinite(), gradient, torch.nan))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step, or remember what it will be judged by."""
        finite, copied = _to_host(self._finite(trainer, pl_module))
        lr = optimizer.param_groups[0]["lr"]
        step = _Step(trainer.current_epoch, trainer.global_step, lr, self._batches, self._losses, finite, copied)
        self._batches, self._losses = [], []
        if self.skipping:
            self._skip_unless_finite(step, trainer, pl_module)
        else:
            self._unjudged.append(step)
            if copied is None:
                self._judge(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The device has this step to do while it is asked about the one before."""
        self._judge(trainer, pl_module, but=1)

    def _finite(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """A scalar, the same on all ranks."""
        if _scaler(trainer) is None:
            return _all_finite([p.grad for p in module.parameters() if p.grad is not None])
        bad = torch.stack(self._losses).isfinite().logical_not().any().int()
        if trainer.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return bad == 0

    def _judge(self, trainer: pl.Trainer, module: pl.LightningModule, but: int = 0) -> None:
        """Of the steps that wait for it, all but the last ``but``."""
        while len(self._unjudged) > but:
            step = self._unjudged.pop(0)
            if not step.is_finite():
                self._stop(step, trainer, module)

    def _skip_unless_finite(self, step: _Step, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if step.is_finite():
            self.in_a_row = 0
            return
        if self.in_a_row == self.max_skips:
            self._stop(step, trainer, module)
        self.skipped += 1
        self.in_a_row += 1
        if _scaler(trainer) is None:  # which leaves the step out itself, and lowers its scale
            for parameter in module.parameters():
                parameter.grad = None  # torch's optimisers pass over such a parameter, momentum and decay included
        assert self._kept is not None
        self._kept()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                callback.leave_out(step.number)
        log.warning("%s The step is left out, the %s in a row.", self._describe(step, trainer)[0], _th(self.in_a_row))

    # --- before anything is kept ---

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise unless all steps so far, the weights and the running statistics are finite; all ranks must call this.

        Raises:
            NonFiniteLossError: otherwise, again and again.
        """
        if self._error is not None:
            raise NonFiniteLossError(self._error)
        self._judge(trainer, module)
        bad = _nonfinite(module)
        if not trainer.strategy.reduce_boolean_decision(not bad, all=True):
            where = ", ".join(bad[:3]) if bad else "another rank's network"
            self._error = (
                f"after step {trainer.global_step - 1} (epoch {trainer.current_epoch}), {where} is not finite, though "
                f"every gradient was. {self._last_good()} {REMEDIES}"
            )
            raise NonFiniteLossError(self._error)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing that is no number is validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also where an epoch has no validation."""
        self.check(trainer, pl_module)
        if self.skipping:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor saved, whoever asks for it."""
        if trainer.state.fn == "fit":
            self.check(trainer, pl_module)

    # --- the end ---

    def _stop(self, step: _Step, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        first = next(iter(_nonfinite(module)), None)
        summary, ranks = self._describe(step, trainer)
        file = self.directory / f"nonfinite_step_{step.number}.json"
        checkpoint = self._newest_checkpoint()
        if trainer.is_global_zero:
            report = {
                "epoch": step.epoch,
                "step": step.number,
                "lr": step.lr,
                "ranks": ranks,
                "first_nonfinite_parameter": first,
                "checkpoint": None if checkpoint is None else str(checkpoint),
            }
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(file) as out:
                out.write(json.dumps(report, indent=1, allow_nan=False).encode())
        trainer.strategy.barrier("nonfinite")  # a rank that ends takes the others with it
        skips = f" {self.in_a_row} steps in a row were left out before it." if self.in_a_row else ""
        self._error = f"{summary}{skips} All records of the batch are in {file}. {self._last_good()} {REMEDIES}"
        raise NonFiniteLossError(self._error)

    def _describe(self, step: _Step, trainer: pl.Trainer) -> tuple[str, list[dict[str, Any]]]:
        """One sentence, and of every rank its batches; every rank must call this."""
        mine: dict[str, Any] = {"rank": trainer.global_rank, "batches": []}
        for batch, loss in zip(step.batches, torch.stack(step.losses).tolist(), strict=True):
            records = _records(trainer, step.epoch, batch)
            mine["batches"].append({"batch": batch, "loss": _json_number(loss), "records": records})
        ranks: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(ranks, mine)
        else:
            ranks = [mine]
        bad = [(of["rank"], b) for of in ranks for b in of["batches"] if isinstance(b["loss"], str)]
        at = f"at step {step.number} (epoch {step.epoch}, lr {step.lr:g})"
        if not bad:
            return f"the gradient is not finite {at}, though every loss is.", ranks
        where = "; ".join(f"{b['loss']} on rank {rank}, {_named(b['batch'], b['records'])}" for rank, b in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"the loss is not finite {at}: {where}{more}.", ranks

    def _newest_checkpoint(self) -> Path | None:
        last = self.directory / "checkpoints" / "last.ckpt"
        return last if last.exists() else None

    def _last_good(self) -> str:
        newest = self._newest_checkpoint()
        return "No checkpoint was written before." if newest is None else f"The last good checkpoint is {newest}."


def _keep(module: pl.LightningModule) -> Callable[[], None]:
    """Copies of the network's buffers and of the training's metrics; what is returned puts them back."""
    net: nn.Module = module.net  # type: ignore[assignment]
    buffers = list(net.buffers())
    copies = [buffer.clone() for buffer in buffers]
    metrics = [m for m in getattr(module, "train_scores", nn.Module()).modules() if isinstance(m, Metric)]
    states: list[Mapping[str, Any]] = [
        {name: value.clone() for name, value in metric.metric_state.items() if isinstance(value, Tensor)}
        for metric in metrics
    ]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
        for metric, state in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)

    return put_back


def _all_finite(gradients: list[Tensor]) -> Tensor:
    """A scalar on their device, which is not waited for if it is a GPU."""
    if any(gradient.is_cuda for gradient in gradients):
        return get_total_norm(gradients, norm_type=math.inf).isfinite()
    # On a CPU the 2-norm takes a twentieth of the time (RepVGG-A0, one thread); but its squares may overflow alone.
    finite = get_total_norm(gradients).isfinite()
    return finite if finite else torch.stack([gradient.isfinite().all() for gradient in gradients]).all()


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that nobody waits for, and what to wait for before it is read."""
    if not flag.is_cuda:
        return flag, None
    copy = torch.empty((), dtype=flag.dtype, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


@torch.no_grad()
def _nonfinite(module: pl.LightningModule) -> list[str]:
    """Parameters and running statistics that are not finite, in the network's order."""
    net: nn.Module = module.net  # type: ignore[assignment]
    names = running_statistics(net)
    tensors = dict(net.named_parameters()) | {name: b for name, b in net.named_buffers() if name in names}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]


def _scaler(trainer: pl.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _records(trainer: pl.Trainer, epoch: int, batch: int) -> list[int] | None:
    """Numbers of this rank's images in the data file; None where the loader cannot tell."""
    loader: Any = trainer.train_dataloader
    return [int(number) for number in loader.batch_records(epoch, batch)] if hasattr(loader, "batch_records") else None


def _named(batch: int, records: list[int] | None) -> str:
    if records is None:
        return f"batch {batch}"
    more = f" … ({len(records)} in all)" if len(records) > NAMED else ""
    return f"batch {batch}, records {', '.join(map(str, records[:NAMED]))}{more}"


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)


def _th(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
