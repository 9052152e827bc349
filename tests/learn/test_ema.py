"""Averaged weights: the average itself, what is validated, converted and kept, and resuming."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from repvgg.learn.ema import EMA
from repvgg.learn.run import train_and_test
from repvgg.model import to_deploy
from support.networks import tiny
from support.training import classifier, datamodule, trainer, two_forms

DECAY = 0.6  # reached after 5 updates, so that warm-up and constant decay both occur


class Weights(pl.Callback):
    """The network's state after every step, and what a validation found it to be."""

    def __init__(self) -> None:
        self.after_step: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.after_step.append(state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            self.validated.append(state(pl_module))


def state(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.net.state_dict().items()}  # type: ignore[union-attr]


def averaged(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By hand: the first state, then d · average + (1 − d) · state with d = min(decay, (1 + t) / (10 + t))."""
    average = dict(states[0])
    for t, current in enumerate(states[1:], 1):
        d = min(DECAY, (1 + t) / (10 + t))
        for name, value in current.items():
            average[name] = d * average[name] + (1 - d) * value if value.is_floating_point() else value
    return average


def test_the_average_is_the_formulas_and_is_validated_and_kept(digits: Path, tmp_path: Path) -> None:
    """In float64: weights and BatchNorm statistics, at both validations, at the end, in best.ckpt and in the test."""
    seen = Weights()
    best = ModelCheckpoint(dirpath=tmp_path / "c", filename="best", monitor="val/deploy/top1", mode="max")
    module = classifier().double()
    run = trainer(
        tmp_path, [EMA(DECAY), two_forms(), seen, best], max_epochs=2, precision="64-true", enable_checkpointing=True
    )
    data = datamodule(digits)
    metrics = train_and_test(run, module, data)
    assert len(seen.after_step) == 10
    for number, validated in enumerate(seen.validated):
        expected = averaged(seen.after_step[: 5 * (number + 1)])
        for name, value in expected.items():
            torch.testing.assert_close(validated[name], value, rtol=1e-12, atol=1e-14, msg=name)
    assert seen.validated[-1]["stem.branches.0.bn.num_batches_tracked"] == 10
    last, average = seen.after_step[-1], averaged(seen.after_step)
    assert any((last[k] - average[k]).abs().max() > 1e-3 for k in average)  # training went on with its own weights
    assert any(not torch.equal(seen.validated[0][k], seen.after_step[5][k]) for k in average)

    kept = torch.load(best.best_model_path, weights_only=True)
    epoch = kept["epoch"]
    of_best = averaged(seen.after_step[: 5 * (epoch + 1)])
    for name, value in of_best.items():
        torch.testing.assert_close(kept["state_dict"][f"net.{name}"], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(kept["current_model_state"][f"net.{name}"], seen.after_step[5 * epoch + 4][name])

    # The test that follows the training loads the average, and both forms of it score what they scored then.
    for name, value in of_best.items():
        torch.testing.assert_close(state(module)[name], value, rtol=1e-12, atol=1e-14)
    data.trainer = run
    images, labels = (torch.cat(parts) for parts in zip(*[
        data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()
    ], strict=True))  # fmt: skip
    net = tiny(num_classes=10, strides=(1, 2, 2, 2, 1)).double()
    net.load_state_dict(of_best)
    for key, form in (("test/top1", net.eval()), ("test/deploy/top1", to_deploy(net))):
        with torch.no_grad():
            right = (form(images).argmax(1) == labels).double().mean().item()
        assert metrics[key] == pytest.approx(right, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_equals_never_having_stopped(digits: Path, tmp_path: Path) -> None:
    def fit(ckpt: str | None = None) -> pl.Trainer:
        kept = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        run = trainer(tmp_path, [EMA(0.9), kept], max_epochs=3, enable_checkpointing=True, limit_val_batches=1)
        run.fit(classifier(), datamodule=datamodule(digits), ckpt_path=ckpt, weights_only=True)
        return run

    def files() -> dict:
        return torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)

    whole, kept = fit(), files()
    (tmp_path / "epoch=2.ckpt").unlink()
    resumed, again = fit(str(tmp_path / "epoch=0.ckpt")), files()
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert kept[part].keys() == again[part].keys()
        assert all(torch.equal(value, again[part][name]) for name, value in kept[part].items()), part
    assert kept["averaging_state"]["n_averaged"] == 15
    end = (state(run.lightning_module) for run in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in end), strict=True))


def test_accumulated_batches_are_one_update(digits: Path, tmp_path: Path) -> None:
    ema = EMA(0.9)
    counts = []

    class Count(pl.Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            counts.append(int(ema._average_model.n_averaged))

    run = trainer(tmp_path, [ema, Count()], limit_train_batches=4, accumulate_grad_batches=2, limit_val_batches=0)
    run.fit(classifier(), datamodule=datamodule(digits))
    assert counts == [2]


def test_what_cannot_be_averaged_is_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay=1 must be"):
        EMA(1)
    with pytest.raises(ValueError, match="an average of bfloat16 weights stands still"):
        trainer(tmp_path, [EMA()], precision="bf16-true").fit(classifier(), datamodule=datamodule(digits))


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from repvgg.learn.ema import EMA
from support.training import classifier, datamodule, trainer, two_forms

files, out = Path(sys.argv[1]), Path(sys.argv[2])
module = classifier()
run = trainer(out, [EMA(0.9), two_forms()], devices=2)
run.fit(module, datamodule=datamodule(files, batch_size=32))
result = {"weights": module.net.state_dict(), "logged": dict(run.callback_metrics)}
torch.save(result, out / f"rank{run.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_have_one_average(digits: Path, tmp_path: Path) -> None:
    from learn.test_ddp import run

    run(textwrap.dedent(TWO_RANKS), tmp_path, digits, tmp_path)
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    assert a["logged"]["val/deploy/top1"] == b["logged"]["val/deploy/top1"]
    assert a["logged"]["reparam/rel_l2_diff"] < 1e-4
