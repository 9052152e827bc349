"""The LightningModule: loss, metrics, optimiser. It trains any classifier and knows nothing of deploy forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from repvgg.learn.batchnorm import bring_together, check_batchnorm, reads_statistics, running_statistics
from repvgg.learn.optim import fused_l2, parameter_groups, require_whole_epochs, scaled_lr, warmup_then_cosine
from repvgg.model import Block

Batch = tuple[Tensor, Tensor]


class MeanLoss(Metric):
    """The mean over images of what is given as the mean of each batch, summed in float64, over all ranks.

    Unlike torchmetrics' own mean it leaves out no NaN, and so does not wait for the GPU at every batch to look for one.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: int) -> None:
        """A batch's mean and size."""
        self.total += loss.double() * images
        self.images += images

    def compute(self) -> Tensor:
        """NaN before the first image."""
        return self.total / self.images


class Scores(nn.Module):
    """Loss, top-1 and top-5 of one form over one data set, exact over ranks and uneven batches.

    torchmetrics sums counts over the ranks; Lightning's own averaging of logged values is wrong when the ranks have
    different numbers of images.

    Args:
        num_classes: top-5 is top-k with fewer than 5 classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.accuracy = MetricCollection(
            {f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)},
            compute_groups=False,
        )

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits N × classes, labels N."""
        self.loss.update(F.cross_entropy(logits.float(), labels), len(labels))
        self.accuracy.update(logits, labels)

    def compute(self, prefix: str) -> dict[str, Tensor]:
        """``prefix/loss``, ``prefix/top1``, ``prefix/top5`` over all ranks, then start afresh."""
        values = {"loss": self.loss.compute(), **self.accuracy.compute()}
        self.reset()
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def reset(self) -> None:
        """Start afresh."""
        self.loss.reset()
        self.accuracy.reset()


def log_scores(module: pl.LightningModule, scores: dict[str, Tensor]) -> None:
    """Log all, and show only the validation's top-1 on the progress bar."""
    for name, value in scores.items():
        module.log(name, value, prog_bar=name.startswith("val/") and name.endswith("top1"))


def recompute_blocks(net: nn.Module, recompute: bool) -> None:
    """Let every block of ``net`` keep only its input for the backward, or all that it needs."""
    for block in net.modules():
        if isinstance(block, Block):
            block.recomputes = recompute


def steps_per_epoch(trainer: pl.Trainer) -> int:
    """Count the optimiser's steps in an epoch; the trainer must know its batches."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


class Classifier(pl.LightningModule):
    """Cross-entropy training of an image classifier.

    Args:
        net: N × C × H × W to logits N × num_classes.
        num_classes: of the data.
        optimizer: makes the optimiser from parameter groups and ``lr``.
        lr: for ``lr_batch`` images per step.
        lr_batch: see :func:`repvgg.learn.optim.scaled_lr`.
        batch_size: images per step, over all devices and accumulated batches.
        warmup_epochs: of the schedule; may be a fraction.
        weight_decay: of kernels.
        decay_identity_gamma, bias_lr_factor: see :func:`repvgg.learn.optim.parameter_groups`.
        custom_l2: decay each block's fused kernel instead of its branches' kernels, see
            :func:`repvgg.learn.optim.fused_l2`. ``train/loss`` stays the cross-entropy alone.
        label_smoothing: of the training loss only.
        channels_last: memory format of the network.
        recompute: keep only the inputs of the network's blocks for the backward, and compute the rest again there. What
            is learned is the same to the last bit, BatchNorm's statistics included.
        compile: torch.compile ``net`` in place, which keeps the names of its parameters; once for every size of a
            batch that occurs.
        batchnorm: whose running statistics count, see :mod:`repvgg.learn.batchnorm`. ``sync`` needs
            ``Trainer(sync_batchnorm=True)`` too.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        num_classes: int,
        optimizer: Callable[..., Optimizer],
        lr: float,
        lr_batch: int,
        batch_size: int,
        warmup_epochs: float = 0,
        weight_decay: float = 0.0,
        decay_identity_gamma: bool = False,
        bias_lr_factor: float = 1.0,
        custom_l2: bool = False,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
        recompute: bool = False,
        compile: bool = False,
        batchnorm: str = "rank0",
    ) -> None:
        super().__init__()
        check_batchnorm(batchnorm)
        self.batchnorm = batchnorm
        self._reads_statistics: bool | None = None
        positive = {"lr": lr, "lr_batch": lr_batch, "batch_size": batch_size, "bias_lr_factor": bias_lr_factor}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"recipe.{name}={value} must be positive")
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net: nn.Module = net.to(memory_format=memory_format)  # type: ignore[call-overload]
        if recompute and compile:
            raise ValueError(
                "compile=true decides by itself what it computes again: leave recompute=true out, or compile=true"
            )
        recompute_blocks(self.net, recompute)
        if compile:
            # One graph per image size, each as fast as it can be. By default a second size would compile a general one.
            self.net.compile(dynamic=False)
        self.num_classes = num_classes
        self.make_optimizer = optimizer
        self.lr = scaled_lr(lr, lr_batch, batch_size)
        self.warmup_epochs, self.weight_decay, self.label_smoothing = warmup_epochs, weight_decay, label_smoothing
        self.decay_identity_gamma, self.bias_lr_factor = decay_identity_gamma, bias_lr_factor
        self.custom_l2 = custom_l2
        self.train_scores = MetricCollection(
            {"loss": MeanLoss(), "top1": MulticlassAccuracy(num_classes, average="micro")}, compute_groups=False
        )
        self.scores = Scores(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N × num_classes."""
        return self.net(images)

    def bring_statistics_together(self) -> None:
        """BatchNorm's running statistics, and whatever else the network buffers, are the same on all ranks from here.

        Every rank must call this. Where averaged weights are swapped in, it is theirs.
        """
        bring_together(dict(self.net.named_buffers()), self.batchnorm, running_statistics(self.net))

    def on_fit_start(self) -> None:
        """Find out anew."""
        self._reads_statistics = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A network whose training reads running statistics reads the same on all ranks."""
        if self.trainer.world_size == 1:
            return
        if self._reads_statistics is None:
            self._reads_statistics = self.custom_l2 or reads_statistics(self.net, batch[0][:2])
        if self._reads_statistics:
            self.bring_statistics_together()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is saved is what a validation at this step would see; the file is of rank 0 as it is."""
        if self.batchnorm == "mean":
            statistics = {f"net.{name}" for name in running_statistics(self.net)}
            # These are the network's own tensors, and those of averaged weights where there are some.
            for part in ("state_dict", "current_model_state"):
                saved = {name: value for name, value in checkpoint.get(part, {}).items() if name in statistics}
                bring_together(saved, self.batchnorm, statistics)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch; its labels may be shares of the classes, N × num_classes (mixup).

        ``train/top1`` counts such an image as right when the prediction is the class with the largest share.
        """
        images, targets = batch
        logits = self.net(images)
        soft = targets.is_floating_point()
        # Shares keep their precision where logits are bfloat16.
        scores = logits.to(torch.promote_types(logits.dtype, targets.dtype)) if soft else logits
        loss = F.cross_entropy(scores, targets, label_smoothing=self.label_smoothing)
        labels = targets.argmax(1) if soft else targets
        self.train_scores["loss"].update(loss.detach(), len(labels))
        self.train_scores["top1"].update(logits.detach(), labels)
        self.log("train/loss_step", loss.detach(), prog_bar=True)
        # Not LearningRateMonitor: it makes a key for each parameter group, and they share one schedule.
        self.log("optim/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss + 0.5 * self.weight_decay * fused_l2(self.net) if self.custom_l2 else loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss and top-1, over all ranks."""
        self.log_dict({f"train/{name}": value for name, value in self.train_scores.compute().items()})
        self.train_scores.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The logits, N × num_classes, which the callbacks compare with the deploy form's."""
        images, labels = batch
        logits = self.net(images)
        self.scores.update(logits, labels)
        return logits

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Every rank validates one network, with or without a deploy form beside it."""
        self.bring_statistics_together()
        self.scores.reset()  # a checkpoint that was written during a validation has begun to count

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the train form's scores."""
        log_scores(self, self.scores.compute("val"))

    def on_test_epoch_end(self) -> None:
        """Log the train form's scores."""
        log_scores(self, self.scores.compute("test"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The network's, see :func:`repvgg.learn.optim.parameter_groups`."""
        return parameter_groups(
            self.net,
            self.weight_decay,
            lr=self.lr,
            decay_identity_gamma=self.decay_identity_gamma,
            bias_lr_factor=self.bias_lr_factor,
            custom_l2=self.custom_l2,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD or what the recipe says, with the learning rate of every iteration."""
        optimizer = self.make_optimizer(self.parameter_groups(), lr=self.lr)
        self.trainer.fit_loop.setup_data()  # without a number of epochs, the next line would not know its batches
        steps = int(self.trainer.estimated_stepping_batches)
        in_epoch = steps_per_epoch(self.trainer)
        require_whole_epochs(self.trainer.max_steps, in_epoch)
        warmup = round(self.warmup_epochs * in_epoch)
        schedule = warmup_then_cosine(optimizer, steps, warmup)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "optim/lr"},
        }
