"""What a finished network scores: its forms on the same batches, class by class, and where they part ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix, MulticlassStatScores

from repvgg.deploy.int8 import LayerNoise, noise
from repvgg.learn.datamodule import ImageDataModule
from repvgg.learn.int8 import Quantizer, disagreement
from repvgg.learn.module import Batch, Scores
from repvgg.learn.two_forms import Disagreement
from repvgg.model import NotAffineError, count_macs, count_parameters, to_deploy

#: A form of a network, and where its numbers are logged.
PREFIX = {"train_form": "eval", "deploy": "eval/deploy", "int8": "eval/int8"}


def forms_of(
    net: nn.Module, stored: Literal["train", "deploy"], wanted: Literal["both", "train", "deploy"] | None
) -> dict[str, nn.Module]:
    """The forms to evaluate, ``train_form`` before ``deploy``.

    Args:
        net: in the form that a file has.
        stored: that form.
        wanted: None for both, or for the one that exists: a deploy form has no branches, and a branch
            that says of no convolution how it is deployed has no deploy form.

    Raises:
        ValueError: a form that does not exist.
    """
    if stored == "deploy":
        if wanted in ("both", "train"):
            raise ValueError(
                f"forms={wanted}: the file holds a deploy form, from which the branches cannot be recovered. "
                "Evaluate what there is with forms=deploy"
            )
        return {"deploy": net}
    if wanted == "train":
        return {"train_form": net}
    try:
        deploy = to_deploy(net)
    except NotAffineError as error:
        if wanted is None:
            return {"train_form": net}
        raise ValueError(f"forms={wanted}: {error}. Evaluate it as it was trained with forms=train") from error
    return {"deploy": deploy} if wanted == "deploy" else {"train_form": net, "deploy": deploy}


def counted(forms: Mapping[str, nn.Module], input_size: tuple[int, int, int]) -> dict[str, float]:
    """Parameters and multiply-adds per image of every form (``params/*``, ``macs/*``)."""
    numbers: dict[str, float] = {f"params/{name}": count_parameters(net) for name, net in forms.items()}
    return numbers | {f"macs/{name}": count_macs(net, input_size) for name, net in forms.items()}


@dataclass(frozen=True)
class ClassCounts:
    """Of every class, in the order of the labels.

    Attributes:
        images: how many there are.
        right: for every form, how many of them are recognised.
        confusion: for every form, images of a class (row) by the class they were taken for; empty unless asked for.
    """

    images: list[int]
    right: dict[str, list[int]]
    confusion: dict[str, list[list[int]]]


class FormCounts(nn.Module):
    """What is counted of one form."""

    def __init__(self, num_classes: int, confusion: bool) -> None:
        super().__init__()
        self.scores = Scores(num_classes)
        self.per_class = MulticlassStatScores(num_classes, average="none")
        self.confusion = MulticlassConfusionMatrix(num_classes) if confusion else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits N × classes, labels N."""
        self.scores.update(logits, labels)
        self.per_class.update(logits, labels)
        if self.confusion is not None:
            self.confusion.update(logits, labels)


class Agreement(nn.Module):
    """Which of two forms is right, and how far their logits are apart.

    Args:
        first, second: names of the forms.
        prefix: where it is logged, one of ``eval/forms`` and ``eval/forms_int8``.
    """

    def __init__(self, first: str, second: str, prefix: str) -> None:
        super().__init__()
        self.first, self.second, self.prefix = first, second, prefix
        self.right, self.different = BinaryConfusionMatrix(), SumMetric()
        self.distance = Disagreement()

    def update(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Logits N × classes of all forms, labels N."""
        first, second = logits[self.first], logits[self.second]
        a, b = first.argmax(1), second.argmax(1)
        self.right.update((b == labels).long(), (a == labels).long())
        self.different.update((a != b).sum())
        self.distance.update(first, second)

    def compute(self) -> dict[str, Tensor]:
        """Images under the prefix, and ``reparam/*`` or ``int8/*``."""
        (both_wrong, only_second), (only_first, both_right) = self.right.compute()
        images = {
            "both_right": both_right,
            f"only_{self.first}_right": only_first,
            f"only_{self.second}_right": only_second,
            "both_wrong": both_wrong,
            "different_answer": self.different.compute(),
        }
        apart = disagreement(self.distance) if self.second == "int8" else self.distance.compute()
        return {f"{self.prefix}/{name}": count for name, count in images.items()} | apart


class Evaluation(pl.LightningModule):
    """Feeds every batch to all forms and counts, exactly over ranks and uneven batches.

    Args:
        forms: of :func:`forms_of`.
        num_classes: of the data.
        confusion: count the whole classes × classes matrix of every form.
        channels_last: memory format of the networks.
        compile: torch.compile the forms.
        quantizer: makes a third form of the deploy form, ``int8``, on every rank and before the first batch.

    Attributes:
        classes: of the last evaluation.
        noise: what int8 does to each layer, on the first calibration images; empty without it.

    Logs:
        ``eval/loss``, ``eval/top1``, ``eval/top5`` and the same under ``eval/deploy/`` and ``eval/int8/``; of the train
        form and the deploy form together ``eval/forms/*`` (images by which of the two is right) and ``reparam/*``
        (distance of the logits, in the precision of the run); of the deploy form and int8 ``eval/forms_int8/*`` and
        ``int8/*``, with the smallest signal to noise ratio of a layer's weight and output in dB.

    Raises:
        ValueError: a quantizer without a deploy form.
    """

    def __init__(
        self,
        forms: Mapping[str, nn.Module],
        *,
        num_classes: int,
        confusion: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        if quantizer is not None and "deploy" not in forms:
            raise ValueError("int8 is made of the deploy form, and only the train form is evaluated: forms=both")
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.forms = nn.ModuleDict(
            {name: net.to(memory_format=memory_format) for name, net in forms.items()}  # type: ignore[call-overload]
        )
        if compile:
            for net in self.forms.values():
                net.compile()
        self.quantizer = quantizer
        self.noise: list[LayerNoise] = []
        names = [*forms, *(["int8"] if quantizer is not None else [])]
        self.counts = nn.ModuleDict({name: FormCounts(num_classes, confusion) for name in names})
        pairs = {("train_form", "deploy"): "eval/forms", ("deploy", "int8"): "eval/forms_int8"}
        self.agreements = nn.ModuleList(
            Agreement(*pair, prefix) for pair, prefix in pairs.items() if set(pair) <= set(names)
        )
        self.images = SumMetric()
        self.classes: ClassCounts | None = None

    def on_test_epoch_start(self) -> None:
        """Count from nothing, and quantize."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        if self.quantizer is not None:
            data = cast(ImageDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
            self.int8 = self.quantizer(self.forms["deploy"], data)
            self.noise = noise(self.forms["deploy"], self.int8, self.quantizer.calibration(data)[0])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        images, labels = batch
        logits = {name: net(images) for name, net in self.forms.items()}
        if self.quantizer is not None:
            logits["int8"] = self.int8(images)
        self.images.update(float(len(labels)))
        for name, counts in self._counts():
            counts.update(logits[name], labels)
        for agreement in self._agreements():
            agreement.update(logits, labels)

    def on_test_epoch_end(self) -> None:
        """Log the totals and keep the counts of classes."""
        values = {"eval/images": self.images.compute()}
        for name, counts in self._counts():
            values |= counts.scores.compute(PREFIX[name])
        for agreement in self._agreements():
            values |= agreement.compute()
        for quantity in ("weight_db", "output_db") if self.noise else ():
            values[f"int8/{quantity}_min"] = torch.tensor(min(getattr(layer, quantity) for layer in self.noise))
        self.log_dict({name: value.float() for name, value in values.items()})
        # Per class: true and false positives, true and false negatives, images.
        per_class = {name: counts.per_class.compute() for name, counts in self._counts()}
        self.classes = ClassCounts(
            images=next(iter(per_class.values()))[:, 4].tolist(),
            right={name: numbers[:, 0].tolist() for name, numbers in per_class.items()},
            confusion={
                name: counts.confusion.compute().tolist()
                for name, counts in self._counts()
                if counts.confusion is not None
            },
        )

    def _counts(self) -> list[tuple[str, FormCounts]]:
        return [(name, counts) for name, counts in self.counts.items() if isinstance(counts, FormCounts)]

    def _agreements(self) -> list[Agreement]:
        return [agreement for agreement in self.agreements if isinstance(agreement, Agreement)]


def evaluate(
    trainer: pl.Trainer, evaluation: Evaluation, datamodule: pl.LightningDataModule
) -> tuple[dict[str, float], ClassCounts]:
    """Run over the validation images once; the metrics as logged, and the counts of classes.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM.
    """
    trainer.limit_test_batches = trainer.limit_val_batches  # the images are the validation's
    (metrics,) = trainer.test(evaluation, datamodule=datamodule, verbose=False)
    assert evaluation.classes is not None
    return {name: float(value) for name, value in metrics.items()}, evaluation.classes
