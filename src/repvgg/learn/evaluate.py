"""What a finished network scores: both forms on the same batches, class by class, and where they part ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix, MulticlassStatScores

from repvgg.learn.module import Batch, Scores
from repvgg.learn.two_forms import Disagreement
from repvgg.model import NotAffineError, count_macs, count_parameters, to_deploy

#: A form of a network, and where its numbers are logged.
PREFIX = {"train_form": "eval", "deploy": "eval/deploy"}


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
    """Which of two forms is right, and how far their logits are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.different = BinaryConfusionMatrix(), SumMetric()
        self.distance = Disagreement()

    def update(self, train_form: Tensor, deploy: Tensor, labels: Tensor) -> None:
        """Logits N × classes of both forms, labels N."""
        a, b = train_form.argmax(1), deploy.argmax(1)
        self.right.update((b == labels).long(), (a == labels).long())
        self.different.update((a != b).sum())
        self.distance.update(train_form, deploy)

    def compute(self) -> dict[str, Tensor]:
        """``eval/forms/*`` and ``reparam/*``."""
        (both_wrong, only_deploy), (only_train_form, both_right) = self.right.compute()
        return {
            "eval/forms/both_right": both_right,
            "eval/forms/only_train_form_right": only_train_form,
            "eval/forms/only_deploy_right": only_deploy,
            "eval/forms/both_wrong": both_wrong,
            "eval/forms/different_answer": self.different.compute(),
            **self.distance.compute(),
        }


class Evaluation(pl.LightningModule):
    """Feeds every batch to all forms and counts, exactly over ranks and uneven batches.

    Args:
        forms: of :func:`forms_of`.
        num_classes: of the data.
        confusion: count the whole classes × classes matrix of every form.
        channels_last: memory format of the networks.
        compile: torch.compile the forms.

    Logs:
        ``eval/loss``, ``eval/top1``, ``eval/top5`` and the same under ``eval/deploy/``; of both forms together
        ``eval/forms/*`` (images by which of the forms is right) and ``reparam/*`` (distance of the logits, in the
        precision of the run).
    """

    def __init__(
        self,
        forms: Mapping[str, nn.Module],
        *,
        num_classes: int,
        confusion: bool = False,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.forms = nn.ModuleDict(
            {name: net.to(memory_format=memory_format) for name, net in forms.items()}  # type: ignore[call-overload]
        )
        if compile:
            for net in self.forms.values():
                net.compile()
        self.counts = nn.ModuleDict({name: FormCounts(num_classes, confusion) for name in forms})
        self.agreement = Agreement() if len(forms) == 2 else None
        self.images = SumMetric()
        self.classes: ClassCounts | None = None

    def on_test_epoch_start(self) -> None:
        """Count from nothing."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        images, labels = batch
        logits = {name: net(images) for name, net in self.forms.items()}
        self.images.update(float(len(labels)))
        for name, counts in self._counts():
            counts.update(logits[name], labels)
        if self.agreement is not None:
            self.agreement.update(logits["train_form"], logits["deploy"], labels)

    def on_test_epoch_end(self) -> None:
        """Log the totals and keep the counts of classes."""
        values = {"eval/images": self.images.compute()}
        for name, counts in self._counts():
            values |= counts.scores.compute(PREFIX[name])
        if self.agreement is not None:
            values |= self.agreement.compute()
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


def evaluate(
    trainer: pl.Trainer, evaluation: Evaluation, datamodule: pl.LightningDataModule
) -> tuple[dict[str, float], ClassCounts]:
    """Run over the validation images once; the metrics as logged, and the counts of classes.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM.
    """
    (metrics,) = trainer.test(evaluation, datamodule=datamodule, verbose=False)
    assert evaluation.classes is not None
    return {name: float(value) for name, value in metrics.items()}, evaluation.classes
