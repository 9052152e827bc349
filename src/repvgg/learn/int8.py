"""The third form: what is deployed, in int8, on the same validation images."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from torch import Tensor, nn

from repvgg.data.sample import drawn_images
from repvgg.deploy.int8 import Backend, Int8Network, quantize
from repvgg.deploy.int8_options import require_int8
from repvgg.learn.datamodule import ImageDataModule
from repvgg.learn.module import Batch, Classifier, Scores, log_scores
from repvgg.learn.two_forms import Disagreement
from repvgg.model import to_deploy

#: Images that go through the network at once. Histograms depend on it, so that no option sets it.
BATCH = 64


class Quantizer:
    """Quantizes deploy forms with images of a ``.beton`` file, the same ones every time.

    Every rank does it for itself and comes to the same bits, since the images, their order and their batches are the
    same. They go through the validation's crop.

    Args:
        backend: "onnxruntime" or "torch", see :func:`repvgg.deploy.int8.quantize`.
        file: where the images are: of training, so that none is measured with what it was calibrated on.
        images: how many, drawn without replacement.
        method: how the ranges of activations are found; None for the backend's default.
        per_channel: False gives each weight tensor a single scale, for comparison.
        seed: of the draw. Not the run's, so that runs and evaluations are calibrated alike.

    Raises:
        ValueError: an unknown backend or method, a missing package, or no images.
    """

    def __init__(
        self,
        backend: str,
        *,
        file: str | Path,
        images: int = 512,
        method: str | None = None,
        per_channel: bool = True,
        seed: int = 0,
    ) -> None:
        self.method = require_int8(backend, method, method_key="quantizer.method")
        if images < 1:
            raise ValueError(f"quantizer.images={images} must be at least 1")
        self.backend = cast(Backend, backend)
        self.file, self.images, self.per_channel, self.seed = Path(file), images, per_channel, seed
        self._pixels: Tensor | None = None

    def __call__(self, deploy: nn.Module, data: ImageDataModule) -> Int8Network:
        """A deploy form in int8. It is only read.

        Raises:
            ValueError: the file holds fewer images.
        """
        batches = self.calibration(data)
        return quantize(deploy, batches, backend=self.backend, method=self.method, per_channel=self.per_channel)

    def calibration(self, data: ImageDataModule) -> list[Tensor]:
        """The images, normalised, in batches N × 3 × H × W on the CPU.

        Raises:
            ValueError: the file holds fewer.
        """
        if self._pixels is None:  # kept as bytes: 77 MB for 512 images of 224 pixels
            self._pixels = drawn_images(
                self.file,
                transform=data.transforms["val"],
                images=self.images,
                seed=self.seed,
                key="quantizer.images",
                num_threads=data.num_threads,
                **data.loader_options,
            )
        return [(images.float() - data.mean.cpu()) / data.std.cpu() for images in self._pixels.split(BATCH)]


def quantizer(backend: str | None, **options: Any) -> Quantizer | None:
    """A :class:`Quantizer`, or None without a backend."""
    return None if backend is None else Quantizer(backend, **options)


quantizer.__signature__ = inspect.signature(Quantizer)  # type: ignore[attr-defined]  # so that no other keyword is taken


def disagreement(apart: Disagreement) -> dict[str, Tensor]:
    """How far int8's logits are from the float form's, under ``int8/``; then start afresh."""
    return {name.replace("reparam/", "int8/"): value for name, value in apart.compute().items()}


class Int8Validation(pl.Callback):
    """Quantizes the deploy form and logs ``val/int8/*``, and of the best checkpoint ``test/int8/*``.

    With ``int8/rel_l2_diff`` and ``int8/top1_agreement``, against the train form's logits, which are the deploy form's
    up to ``reparam/rel_l2_diff``; and ``int8/quantize_s``, the seconds of conversion, calibration and quantization.

    Training is only looked at: random generators, weights and statistics stay as they are. It costs the calibration
    images' forward pass, the writing of the file, and a third pass over the validation images, with onnxruntime on the
    CPU also where training is on a GPU: minutes on ImageNet. So by default it is done after the last epoch alone, and
    for the best checkpoint, which is what will be deployed.

    Args:
        quantizer: what makes the int8 form.
        every_n_epochs: 0 for the last epoch only; n for every n-th and the last.
    """

    def __init__(self, quantizer: Quantizer, every_n_epochs: int = 0) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"callbacks.int8.every_n_epochs={every_n_epochs} must be 0 or more")
        self.quantizer, self.every_n_epochs = quantizer, every_n_epochs
        self.int8: Int8Network | None = None
        self.scores: Scores | None = None
        self.disagreement = Disagreement()
        self.seconds = 0.0

    def is_due(self, epoch: int, epochs: int | None) -> bool:
        """Whether the validation after an epoch (from 0) of so many is one of those."""
        return epoch + 1 == epochs or (self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Quantize before the first batch: averaged weights and all ranks' statistics are in place by then."""
        due = self.is_due(trainer.current_epoch, trainer.max_epochs) and not trainer.sanity_checking
        if batch_idx == 0:
            self.int8 = None
            if due or trainer.testing:
                self._start(trainer, pl_module)  # type: ignore[arg-type]

    on_test_batch_start = on_validation_batch_start

    def _start(self, trainer: pl.Trainer, module: Classifier) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        start = time.perf_counter()
        self.int8 = self.quantizer(to_deploy(module.net), data)
        self.seconds = time.perf_counter() - start
        self.scores = (self.scores or Scores(module.num_classes)).to(module.device)
        self.disagreement.to(module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The int8 form on the batch that the train form has just seen."""
        if self.int8 is None:
            return
        assert self.scores is not None
        images, labels = batch
        logits = self.int8(images)
        self.scores.update(logits, labels)
        self.disagreement.update(outputs, logits)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``val/int8/*`` and ``int8/*``."""
        self._finish(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``test/int8/*``."""
        self._finish(pl_module, "test")

    def _finish(self, module: pl.LightningModule, prefix: str) -> None:
        if self.int8 is None:
            return
        assert self.scores is not None
        log_scores(module, self.scores.compute(f"{prefix}/int8"))
        apart = disagreement(self.disagreement)
        if prefix == "val":
            module.log_dict({**apart, "int8/quantize_s": self.seconds})
        self.int8 = None


def validation(quantizer: Quantizer | None, every_n_epochs: int = 0) -> Int8Validation | None:
    """The callback, or None where nothing quantizes."""
    return None if quantizer is None else Int8Validation(quantizer, every_n_epochs)
