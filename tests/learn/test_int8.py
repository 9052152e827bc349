"""The third form, validated and evaluated."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from repvgg.data.loader import make_loader
from repvgg.data.transforms import CenterCrop
from repvgg.learn.evaluate import Evaluation, evaluate, forms_of
from repvgg.learn.int8 import Int8Validation, Quantizer, quantizer, validation
from repvgg.model import to_deploy
from support.networks import randomize, tiny
from support.training import classifier, datamodule, trainer, two_forms

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ["onnxruntime", "torch"]
#: Where one backend will do for most commits: an export to ONNX takes seconds.
MOSTLY_TORCH = [pytest.param("onnxruntime", marks=pytest.mark.slow), "torch"]
NAMES = ("loss", "top1", "top5")


def quantizing(digits: Path, backend: str = "torch", **options: int) -> Quantizer:
    return Quantizer(backend, file=digits / "train.beton", **{"images": 96, **options})


def validation_images(run: pl.Trainer, digits: Path) -> tuple[Tensor, Tensor]:
    data = datamodule(digits, batch_size=360)
    data.trainer = run
    return data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_logs_what_a_plain_computation_gives(backend: str, digits: Path, tmp_path: Path) -> None:
    module = classifier()
    made = quantizing(digits, backend)
    run = trainer(tmp_path, [two_forms(), Int8Validation(made)])
    data = datamodule(digits)
    run.fit(module, datamodule=data)
    logged = dict(run.callback_metrics)
    assert logged.keys() >= {f"val/int8/{name}" for name in NAMES} | {f"val/deploy/{name}" for name in NAMES}
    images, labels = validation_images(run, digits)
    with torch.no_grad():
        logits = made(to_deploy(module.net), data)(images)
        exact = module.net.eval()(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert logged["val/int8/top1"] == pytest.approx((ranks < 1).double().mean().item(), abs=1e-6)
    assert logged["val/int8/top5"] == pytest.approx((ranks < 5).double().mean().item(), abs=1e-6)
    assert logged["val/int8/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert logged["int8/rel_l2_diff"] == pytest.approx(((logits - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert 1e-4 < logged["int8/rel_l2_diff"] < 0.5
    agreement = (logits.argmax(1) == exact.argmax(1)).double().mean().item()
    assert logged["int8/top1_agreement"] == pytest.approx(agreement, abs=1e-6)
    assert logged["int8/quantize_s"] > 0

    (tested,) = run.test(module, datamodule=data, verbose=False)
    for name in NAMES:
        assert tested[f"test/int8/{name}"] == pytest.approx(float(logged[f"val/int8/{name}"]), rel=1e-6)
    assert not any(key.startswith("int8/") for key in tested)  # the last epoch's stay the last epoch's


def everything(module: pl.LightningModule, run: pl.Trainer) -> dict[str, Tensor]:
    momenta = run.optimizers[0].state_dict()["state"]
    return {
        **{name: value.clone() for name, value in module.state_dict().items()},
        **{f"momentum {number}": state["momentum_buffer"] for number, state in momenta.items()},
        "generator": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].copy()),  # noqa: NPY002
    }


def fitted(digits: Path, directory: Path, callbacks: list[pl.Callback], epochs: int = 2, **options: object) -> dict:
    module = classifier()
    pl.seed_everything(1, verbose=False)
    run = trainer(directory, callbacks, max_epochs=epochs)
    run.fit(module, datamodule=datamodule(digits), **options)
    run.save_checkpoint(directory / "end.ckpt")
    return everything(module, run)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_training_is_the_same_bit_for_bit_with_and_without(backend: str, digits: Path, tmp_path: Path) -> None:
    callback = Int8Validation(quantizing(digits, backend), every_n_epochs=1)
    without, beside = (fitted(digits, tmp_path / str(len(c)), c) for c in ([], [callback]))
    assert without.keys() == beside.keys()
    assert not [name for name, value in without.items() if not torch.equal(value, beside[name])]


class Middle(pl.Callback):
    """A checkpoint after the first epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")


def test_a_resumed_run_ends_with_the_same_bits(digits: Path, tmp_path: Path) -> None:
    def callback() -> Int8Validation:
        return Int8Validation(quantizing(digits), every_n_epochs=1)

    whole = fitted(digits, tmp_path, [callback(), Middle()])
    assert not any("Int8" in name for name in torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"])
    again = fitted(digits, tmp_path, [callback()], ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    trained = [name for name in whole if name.startswith(("net.", "momentum"))]
    assert len(trained) > 50
    assert not [name for name in trained if not torch.equal(whole[name], again[name])]


def test_it_is_due_after_the_last_epoch_and_every_nth(digits: Path) -> None:
    def due(every: int, epochs: int | None = 6) -> list[int]:
        callback = Int8Validation(quantizing(digits), every_n_epochs=every)
        return [epoch for epoch in range(6) if callback.is_due(epoch, epochs)]

    assert due(0) == [5]
    assert due(2) == [1, 3, 5]
    assert due(4) == [3, 5]
    assert due(0, None) == []
    with pytest.raises(ValueError, match=r"callbacks\.int8\.every_n_epochs=-1 must be 0 or more"):
        Int8Validation(quantizing(digits), every_n_epochs=-1)


def test_an_epoch_that_is_not_due_has_no_int8(digits: Path, tmp_path: Path) -> None:
    class Seen(pl.Callback):
        def __init__(self) -> None:
            self.keys: list[bool] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.keys.append("val/int8/top1" in trainer.callback_metrics)

    seen = Seen()
    run = trainer(tmp_path, [Int8Validation(quantizing(digits)), seen], max_epochs=2, limit_train_batches=1)
    run.fit(classifier(), datamodule=datamodule(digits))
    assert seen.keys == [False, True]


def test_calibration_images_are_training_images_as_validation_sees_them(digits: Path) -> None:
    data = datamodule(digits)
    batches = quantizing(digits, images=100).calibration(data)
    assert [len(batch) for batch in batches] == [64, 36]
    loader = make_loader(digits / "train.beton", transform=CenterCrop(32, 1.0), batch_size=500, train=False)
    every = torch.cat([images.float() for images, _ in loader])
    chosen = np.sort(np.random.default_rng(0).choice(len(every), 100, replace=False))
    assert torch.equal(torch.cat(batches), (every[chosen] - 78) / 88)
    other = torch.cat(quantizing(digits, images=100, seed=1).calibration(data))
    assert not torch.equal(other, torch.cat(batches))


def test_wrong_numbers_of_images(digits: Path) -> None:
    with pytest.raises(ValueError, match=r"quantizer\.images=0 must be at least 1"):
        quantizing(digits, images=0)
    with pytest.raises(
        ValueError, match=r"quantizer\.images=1438, but .*train\.beton holds 1437: quantizer\.images=1437"
    ):
        quantizing(digits, images=1438).calibration(datamodule(digits))


def test_without_a_backend_there_is_nothing(digits: Path) -> None:
    assert quantizer(None, file="nowhere", images=512) is None
    assert validation(None) is None
    assert isinstance(validation(quantizer("torch", file=digits)), Int8Validation)


# --- evaluation


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomize(tiny(num_classes=10), seed).eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_evaluation_counts_the_third_form(backend: str, digits: Path, tmp_path: Path) -> None:
    trained = net()
    run = trainer(tmp_path, [])
    images, labels = datamodule_images(run, digits)
    forms = forms_of(trained, "train", None)
    made = quantizing(digits, backend)
    evaluation = Evaluation(forms, num_classes=10, confusion=True, quantizer=made)
    metrics, classes = evaluate(run, evaluation, datamodule(digits, batch_size=50))
    with torch.no_grad():
        logits = made(forms["deploy"], datamodule(digits))(images)
        answers, exact = logits.argmax(1), forms["deploy"](images).argmax(1)
    right, of_deploy = answers == labels, exact == labels
    assert metrics["eval/int8/top1"] == pytest.approx(right.double().mean().item(), abs=1e-6)
    expected = {
        "both_right": right & of_deploy,
        "only_deploy_right": of_deploy & ~right,
        "only_int8_right": right & ~of_deploy,
        "both_wrong": ~right & ~of_deploy,
        "different_answer": answers != exact,
    }
    assert {key: metrics[f"eval/forms_int8/{key}"] for key in expected} == {
        k: int(v.sum()) for k, v in expected.items()
    }
    assert list(classes.right) == list(classes.confusion) == ["train_form", "deploy", "int8"]
    assert sum(classes.right["int8"]) == int(right.sum())
    assert metrics["reparam/rel_l2_diff"] < 1e-4 < metrics["int8/rel_l2_diff"]
    assert metrics["int8/output_db_min"] == pytest.approx(min(layer.output_db for layer in evaluation.noise))
    assert [layer.name for layer in evaluation.noise][:2] == ["stem.conv", "stages.0.0.conv"]


def datamodule_images(run: pl.Trainer, digits: Path) -> tuple[Tensor, Tensor]:
    """As :func:`validation_images`, for a trainer that has not trained."""
    run.strategy.connect(classifier())
    return validation_images(run, digits)


def test_a_file_that_has_only_a_deploy_form_has_an_int8_form_too(digits: Path, tmp_path: Path) -> None:
    evaluation = Evaluation({"deploy": to_deploy(net())}, num_classes=10, quantizer=quantizing(digits))
    metrics, classes = evaluate(trainer(tmp_path, []), evaluation, datamodule(digits))
    assert {"eval/deploy/top1", "eval/int8/top1", "eval/forms_int8/both_right"} <= metrics.keys()
    assert not any(key.startswith(("eval/forms/", "reparam/")) for key in metrics)
    assert list(classes.right) == ["deploy", "int8"]


def test_the_train_form_alone_cannot_be_quantized(digits: Path) -> None:
    with pytest.raises(ValueError, match=r"int8 is made of the deploy form.*forms=both"):
        Evaluation({"train_form": net()}, num_classes=10, quantizer=quantizing(digits))


RANKS = """
import json, sys
from pathlib import Path
import torch
from repvgg.learn.int8 import Int8Validation, Quantizer
from support.training import classifier, datamodule, trainer, two_forms

if __name__ == "__main__":
    devices, digits, directory = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    for backend in ("torch", "onnxruntime"):
        quantizer = Quantizer(backend, file=digits / "train.beton", images=96)
        run = trainer(directory, [two_forms(), Int8Validation(quantizer)], devices=devices)
        (tested,) = run.test(classifier(), datamodule=datamodule(digits, batch_size=30 // devices), verbose=False)
        if run.is_global_zero:
            (directory / f"{devices}-{backend}.json").write_text(json.dumps(tested))
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(digits: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RANKS))
    for devices in (1, 2):
        arguments = [sys.executable, str(script), str(devices), str(digits), str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    for backend in BACKENDS:
        one, two = (json.loads((tmp_path / f"{devices}-{backend}.json").read_text()) for devices in (1, 2))
        assert one.keys() == two.keys() >= {"test/int8/top1", "test/int8/loss"}
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-5), name
