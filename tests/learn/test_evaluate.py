"""An evaluation counts what plain numpy counts over the same batches."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from repvgg.learn.evaluate import Evaluation, evaluate, forms_of
from repvgg.model import Branch, ConvBN, RepVGG, equivalence, to_deploy
from support.networks import randomize, tiny
from support.training import datamodule, trainer


class Batches(pl.Callback):
    """Keeps what the networks saw."""

    def __init__(self) -> None:
        self.images, self.labels = [], []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.images.append(batch[0].clone())
        self.labels.append(batch[1].clone())


def net(seed: int) -> RepVGG:
    torch.manual_seed(seed)
    return randomize(tiny(num_classes=10), seed).double().eval()


@torch.no_grad()
def fit_head(net: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Least squares on the features: a network that is often right."""
    features = torch.nn.functional.pad(net.features(x).mean((2, 3)), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(features, torch.nn.functional.one_hot(labels, 10).double()).solution
    net.head.weight.copy_(5 * solution[:-1].T)
    net.head.bias.copy_(5 * solution[-1])


def test_counts_what_numpy_counts(digits: Path, tmp_path: Path) -> None:
    """Two networks that are right about different images stand for the forms, so that no count is trivial."""
    forms = {"train_form": net(0), "deploy": to_deploy(net(3))}
    evaluation = Evaluation(forms, num_classes=10, confusion=True)
    seen = Batches()
    run = trainer(tmp_path, [seen], precision="64-true")
    evaluate(run, evaluation, datamodule(digits, batch_size=50))
    x, labels = torch.cat(seen.images), torch.cat(seen.labels)
    assert len(x) == 360
    fit_head(forms["train_form"], x, labels)
    fit_head(forms["deploy"], x[::2], labels[::2])
    metrics, classes = evaluate(run, evaluation, datamodule(digits, batch_size=50))

    labels = labels.numpy()
    answers = {}
    for name, prefix in (("train_form", "eval"), ("deploy", "eval/deploy")):
        with torch.no_grad():
            logits = forms[name](x).numpy()
        order = np.argsort(-logits, axis=1)
        answers[name] = order[:, 0]
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        loss = (log_sum - logits[np.arange(360), labels]).mean()
        assert metrics[f"{prefix}/top1"] == pytest.approx((order[:, 0] == labels).mean(), rel=1e-6)
        assert metrics[f"{prefix}/top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean(), rel=1e-6)
        assert metrics[f"{prefix}/loss"] == pytest.approx(loss, rel=1e-5)
        confusion = np.zeros((10, 10), dtype=int)
        np.add.at(confusion, (labels, order[:, 0]), 1)
        assert classes.confusion[name] == confusion.tolist()
        assert classes.right[name] == np.diag(confusion).tolist()
        assert classes.images == confusion.sum(1).tolist()
    a, b = (answers[name] == labels for name in ("train_form", "deploy"))
    expected = {
        "both_right": (a & b).sum(),
        "only_train_form_right": (a & ~b).sum(),
        "only_deploy_right": (~a & b).sum(),
        "both_wrong": (~a & ~b).sum(),
        "different_answer": (answers["train_form"] != answers["deploy"]).sum(),
    }
    assert all(5 < count < 355 for count in expected.values())
    assert {key: metrics[f"eval/forms/{key}"] for key in expected} == expected
    assert metrics["eval/images"] == 360


def test_the_forms_of_one_network_agree_and_a_second_evaluation_begins_anew(digits: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(forms_of(net(0).float(), "train", None), num_classes=10)
    run = trainer(tmp_path, [])
    first, second = (evaluate(run, evaluation, datamodule(digits)) for _ in range(2))
    assert first == second
    metrics, classes = first
    assert metrics["eval/top1"] == metrics["eval/deploy/top1"]
    assert metrics["eval/forms/different_answer"] == 0
    assert 0 < metrics["reparam/rel_l2_diff"] < 1e-4
    assert not classes.confusion


def test_the_forms_that_there_are() -> None:
    both = forms_of(net(0), "train", None)
    assert list(both) == list(forms_of(net(0), "train", "both")) == ["train_form", "deploy"]
    assert equivalence(both["train_form"], both["deploy"], torch.randn(2, 3, 32, 32)).rel_l2 < 1e-10
    assert list(forms_of(net(0), "train", "train")) == ["train_form"]
    assert list(forms_of(net(0), "train", "deploy")) == ["deploy"]
    deployed = to_deploy(net(0))
    for wanted in (None, "deploy"):
        assert forms_of(deployed, "deploy", wanted) == {"deploy": deployed}
    for wanted in ("both", "train"):
        with pytest.raises(ValueError, match=rf"forms={wanted}: .*cannot be recovered.*forms=deploy"):
            forms_of(deployed, "deploy", wanted)


class Bent(ConvBN):
    """A ReLU in the branch: no convolution equals it."""

    affine = Branch.affine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_design_without_a_deploy_form_is_evaluated_as_it_was_trained() -> None:
    bent = RepVGG((1, 1, 1, 1), 0.125, 0.0625, [Bent], num_classes=10)
    assert forms_of(bent, "train", None) == {"train_form": bent}
    with pytest.raises(ValueError, match=r"forms=both: layer 'stem.branches.0': Bent .*forms=train"):
        forms_of(bent, "train", "both")


RANKS = """
import json, sys
from pathlib import Path
import torch
from repvgg.data.sources import digits
from repvgg.data.write import WriteOptions, write_beton
from repvgg.learn.evaluate import Evaluation, evaluate
from support.images import First
from support.networks import randomize, tiny
from support.training import datamodule, trainer

if __name__ == "__main__":
    devices, directory = int(sys.argv[1]), Path(sys.argv[2])
    nets = []
    for seed in (0, 3):
        torch.manual_seed(seed)
        nets.append(randomize(tiny(num_classes=10), seed))
    evaluation = Evaluation(dict(zip(("train_form", "deploy"), nets)), num_classes=10, confusion=True)
    run = trainer(directory, [], devices=devices)
    if devices == 1:
        options = WriteOptions(write_mode="jpg", jpeg_quality=95)
        for split, count in (("train", 60), ("val", 101)):
            write_beton(First(digits(split), count), f"{directory}/{split}.beton", options=options, progress=False)
    metrics, classes = evaluate(run, evaluation, datamodule(directory, batch_size=20))
    if run.is_global_zero:
        (directory / f"{devices}.json").write_text(json.dumps([metrics, vars(classes)]))
"""


@pytest.mark.slow
def test_every_image_counts_once_over_uneven_ranks(tmp_path: Path) -> None:
    """101 images over 2 ranks."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RANKS))
    results = []
    for devices in (1, 2):
        arguments = [sys.executable, str(script), str(devices), str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((tmp_path / f"{devices}.json").read_text()))
    (one, one_classes), (two, two_classes) = results
    assert one_classes == two_classes
    assert sum(one_classes["images"]) == one["eval/images"] == 101
    for key, value in one.items():
        exact = not key.endswith(("loss", "diff"))
        assert two[key] == (value if exact else pytest.approx(value, rel=1e-5)), key
