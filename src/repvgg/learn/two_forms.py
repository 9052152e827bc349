"""Validate what will be deployed: at every validation, the converted network sees the very same batches."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, SumMetric

from repvgg.learn.module import Batch, Classifier, Scores, log_scores
from repvgg.learn.throughput import Throughput
from repvgg.model import copied, equivalence, relative, to_deploy


class Disagreement(nn.Module):
    """How far the logits of two forms are apart, over all images and ranks, in the precision of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.max_abs, self.agreement = MaxMetric(), MeanMetric()
        self.difference, self.reference = SumMetric(), SumMetric()

    def update(self, a: Tensor, b: Tensor) -> None:
        """Logits of the train form and of the deploy form, N × classes each."""
        a, b = a.double(), b.double()
        self.max_abs.update((a - b).abs().max())
        self.agreement.update((a.argmax(1) == b.argmax(1)).double())
        self.difference.update((a - b).square().sum())
        self.reference.update(a.square().sum())

    def compute(self) -> dict[str, Tensor]:
        """Then start afresh."""
        values = {
            "reparam/max_abs_logit_diff": self.max_abs.compute(),
            "reparam/rel_l2_diff": relative(self.difference.compute(), self.reference.compute()).sqrt(),
            "reparam/top1_agreement": self.agreement.compute(),
        }
        for metric in (self.max_abs, self.agreement, self.difference, self.reference):
            metric.reset()
        return values


class FormsDisagreeError(RuntimeError):
    """The deploy form is not the function that was trained."""


class TwoFormValidation(pl.Callback):
    """Converts at every validation and test, and logs both forms' accuracy, disagreement and throughput.

    The network that is trained is only read. Both forms are fed the same decoded batches in one pass over the data.
    Before converting, all ranks get the BatchNorm statistics that a checkpoint holds (:mod:`repvgg.learn.batchnorm`).

    Args:
        throughput: how both forms are timed, on rank 0 and after the loader has finished, while the others wait.
        tolerance: largest relative L2 difference of the logits in float32. A run of lower precision is checked on
            one batch in float32, and its ``reparam/*`` figures are of its own precision.

    Raises:
        FormsDisagreeError: a validation found more than ``tolerance``.
    """

    def __init__(self, throughput: Throughput, tolerance: float = 1e-3) -> None:
        self.throughput, self.tolerance = throughput, tolerance
        self.deploy: nn.Module | None = None
        self.scores: Scores | None = None
        self.disagreement = Disagreement()
        self.convert_seconds = 0.0
        self.full_precision = True

    def _start(self, trainer: pl.Trainer, module: Classifier) -> None:
        module.bring_statistics_together()
        # With TF32 the forms differ by about its rounding, 1e-3 relative.
        tf32 = module.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        self.full_precision = trainer.precision in ("32-true", "64-true") and not tf32
        start = time.perf_counter()
        self.deploy = to_deploy(module.net)
        self.convert_seconds = time.perf_counter() - start
        self.scores = (self.scores or Scores(module.num_classes)).to(module.device)
        self.disagreement.to(module.device)

    def _batch(self, trainer: pl.Trainer, logits: Tensor, batch: Batch, batch_idx: int, module: Classifier) -> None:
        assert self.deploy is not None
        assert self.scores is not None
        images, labels = batch
        # Lightning's autocast ends before the callbacks run.
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            deploy_logits = self.deploy(images)
        self.scores.update(deploy_logits, labels)
        self.disagreement.update(logits, deploy_logits)
        if batch_idx == 0 and not self.full_precision:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                self._check(equivalence(module.net, self.deploy, images, dtype=torch.float32).rel_l2)

    def _finish(self, trainer: pl.Trainer, module: Classifier, prefix: str) -> None:
        assert self.deploy is not None
        assert self.scores is not None
        log_scores(module, self.scores.compute(f"{prefix}/deploy"))
        values = {**self.disagreement.compute(), "reparam/convert_s": torch.tensor(self.convert_seconds)}
        if prefix == "val":
            module.log_dict(values)
            if self.throughput.is_due(trainer.current_epoch):
                module.log_dict(self._measure(trainer, module))
        self.deploy = None
        if self.full_precision:
            self._check(float(values["reparam/rel_l2_diff"]))

    def _measure(self, trainer: pl.Trainer, module: Classifier) -> dict[str, float]:
        measured: dict[str, float] = {}
        if trainer.is_global_zero:
            # A copy of the train form: eager also where training is compiled, and free to change its precision.
            assert self.deploy is not None
            first_conv = next(m for m in module.net.modules() if isinstance(m, nn.Conv2d))
            forms = copied(module.net).eval(), copied(self.deploy)
            measured = self.throughput.compare(*forms, first_conv.in_channels)
        return dict(trainer.strategy.broadcast(measured))  # where the other ranks wait

    def _check(self, relative: float) -> None:
        if not relative <= self.tolerance:  # NaN too
            raise FormsDisagreeError(
                f"the deploy form's logits differ from the train form's by {relative:.3g} relative in float32, "
                f"callbacks.two_forms.tolerance={self.tolerance:g}. If it is nan, training has diverged: look at "
                "train/loss. Otherwise look at the affine() of the branches in conf/ablation's list, at a BatchNorm "
                "whose running_var is almost 0, or at a hook that changes a block's output; "
                "repvgg.model.equivalence(net, to_deploy(net), x) gives the difference in float64"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert; at this hook averaged weights are already swapped in."""
        self._start(trainer, pl_module)  # type: ignore[arg-type]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The deploy form on the batch that the train form has just seen."""
        self._batch(trainer, outputs, batch, batch_idx, pl_module)  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``val/deploy/*``, ``reparam/*`` and ``bench/*``."""
        self._finish(trainer, pl_module, "val")  # type: ignore[arg-type]

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``test/deploy/*``."""
        self._finish(trainer, pl_module, "test")  # type: ignore[arg-type]
