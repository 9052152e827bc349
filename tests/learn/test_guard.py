"""Losses that are no number: found on all ranks at the same step, named, never saved; or the step is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision

from learn.test_ddp import run
from repvgg.data.verify import read_records
from repvgg.learn.ema import EMA
from repvgg.learn.guard import LossGuard, NonFiniteLossError
from support.training import classifier, datamodule, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Poison(pl.Callback):
    """Makes the images of some batches infinite, as a broken sensor or decoder would."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.batches:
            batch[0].fill_(math.inf)


class LeaveOut(pl.Callback):
    """An optimiser that does not take some steps, on data that are in order: what skipping must equal.

    It knows which steps beforehand, and takes the network, the optimiser and the average back to what they were before
    the first batch of such a step.
    """

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step - 1 in self.steps and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.load_state_dict(self.before)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step in self.steps:
            for parameter in pl_module.parameters():
                parameter.grad = None


class AverageWithout(EMA):
    """The average of the steps that were taken."""

    def __init__(self, *steps: int) -> None:
        super().__init__(0.9)
        self.steps = steps

    def should_update(self, step_idx=None, epoch_idx=None) -> bool:
        return step_idx is not None and step_idx not in self.steps


class End(pl.Callback):
    """Everything that a step may change."""

    def on_train_end(self, trainer, pl_module) -> None:
        optimizer = trainer.optimizers[0]
        self.tensors = {k: v.clone() for k, v in pl_module.state_dict().items()}
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            self.tensors[f"momentum {i}"] = optimizer.state[parameter]["momentum_buffer"].clone()
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                self.tensors |= {f"average {k}": v.clone() for k, v in callback._average_model.state_dict().items()}
        self.tensors["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def fit(
    directory: Path, callbacks: list[pl.Callback], files: Path, recompute: bool = False, **options: Any
) -> pl.Trainer:
    options = {"limit_val_batches": 0, **options}
    made = trainer(directory, callbacks, **options)
    made.fit(classifier(recompute=recompute), datamodule=datamodule(files))
    return made


# --- skip ---


@pytest.mark.parametrize(("precision", "recompute"), [("32-true", False), ("bf16-mixed", False), ("32-true", True)])
@pytest.mark.parametrize(("accumulate", "batches", "steps"), [(1, (2, 3), (2, 3)), (2, (3,), (1,))])
def test_a_skipped_step_is_as_if_it_had_not_been(
    precision: str,
    recompute: bool,
    accumulate: int,
    batches: tuple[int, ...],
    steps: tuple[int, ...],
    digits: Path,
    tmp_path: Path,
) -> None:
    """Bit for bit: weights, running statistics, momenta, averaged weights, learning rate."""
    options: dict[str, Any] = {
        "recompute": recompute,
        "limit_train_batches": 6,
        "accumulate_grad_batches": accumulate,
        "precision": precision,
        "gradient_clip_val": 1.0,
    }
    guard, skipped, expected = LossGuard(str(tmp_path), "skip"), End(), End()
    fit(tmp_path, [EMA(0.9), guard, Poison(*batches), skipped], digits, **options)
    fit(tmp_path, [AverageWithout(*steps), LeaveOut(*steps), expected], digits, **options)
    assert guard.skipped == len(steps)
    assert skipped.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert torch.equal(skipped.tensors[name], value), name
    untouched = End()
    fit(tmp_path, [EMA(0.9), untouched], digits, **options)
    assert any(not torch.equal(untouched.tensors[name], value) for name, value in expected.tensors.items())


def test_an_idle_guard_changes_nothing(digits: Path, tmp_path: Path) -> None:
    ends = []
    for guards in ([], [LossGuard(str(tmp_path))], [LossGuard(str(tmp_path), "skip")]):
        end = End()
        fit(tmp_path, [*guards, end], digits)
        ends.append(end.tensors)
    for other in ends[1:]:
        assert all(torch.equal(value, other[name]) for name, value in ends[0].items())


def test_skipped_batches_are_counted_named_and_not_in_the_means(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses, clean = Losses(), Losses()
    made = fit(tmp_path, [LossGuard(str(tmp_path), "skip"), Poison(1, 3), losses], digits)
    assert made.callback_metrics["train/skipped_steps"] == 2
    finite = [loss for loss in losses.losses if math.isfinite(loss)]
    assert len(finite) == 3
    assert float(made.callback_metrics["train/loss"]) == pytest.approx(np.mean(finite), rel=1e-6)
    assert 0 <= float(made.callback_metrics["train/top1"]) <= 1
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "at step 1 (epoch 0" in warnings[0]
    assert "nan on rank 0, batch 1" in warnings[0]
    assert "1st in a row" in warnings[0]
    fit(tmp_path, [clean], digits)
    assert clean.losses[0] == losses.losses[0]


def test_too_many_in_a_row_stop(digits: Path, tmp_path: Path) -> None:
    guard = LossGuard(str(tmp_path), "skip", max_skips=2)
    with pytest.raises(NonFiniteLossError, match=r"at step 4 .* 2 steps in a row were left out before it"):
        fit(tmp_path, [guard, Poison(0, 2, 3, 4)], digits)
    assert guard.skipped == 3
    assert (tmp_path / "nonfinite_step_4.json").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_count_goes_on_after_a_resume(digits: Path, tmp_path: Path) -> None:
    def kept() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    fit(tmp_path, [LossGuard(str(tmp_path), "skip", 2), Poison(4), kept()], digits, enable_checkpointing=True)
    guard = LossGuard(str(tmp_path), "skip", 2)
    made = trainer(
        tmp_path, [guard, Poison(5, 6), kept()], max_epochs=2, limit_val_batches=0, enable_checkpointing=True
    )
    with pytest.raises(NonFiniteLossError, match="at step 6"):  # one before the resume, one after it
        made.fit(
            classifier(), datamodule=datamodule(digits), ckpt_path=str(tmp_path / "epoch=0.ckpt"), weights_only=True
        )
    assert guard.skipped == 2


# --- stop ---


class Late(LossGuard):
    """Learns of a step when the one after it has been launched, as on a GPU."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        judge, self._judge = self._judge, lambda *_, **__: None  # type: ignore[method-assign]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._judge = judge  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [LossGuard, Late])
def test_stops_and_says_where(kind: type[LossGuard], digits: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.touch()
    losses = Losses()
    with pytest.raises(NonFiniteLossError) as error:
        fit(tmp_path, [kind(str(tmp_path)), losses, Poison(2)], digits)
    message = str(error.value)
    for part in ("at step 2 (epoch 0, lr 0.0", "rank 0, batch 2", str(last), "recipe.lr", "on_nonfinite=skip"):
        assert part in message, part
    assert len(losses.losses) == (2 if kind is LossGuard else 3)
    report = json.loads((tmp_path / "nonfinite_step_2.json").read_text())
    assert report["step"] == 2
    assert report["epoch"] == 0
    assert report["checkpoint"] == str(last)
    (rank,) = report["ranks"]
    (batch,) = rank["batches"]
    assert batch["batch"] == 2
    assert batch["loss"] == "nan"


def test_a_window_of_accumulated_batches_names_the_bad_one(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"nan on rank 0, batch 2(,[^;]*)?\. All records"):
        fit(tmp_path, [LossGuard(str(tmp_path)), Poison(2)], digits, accumulate_grad_batches=4, limit_train_batches=8)
    report = json.loads((tmp_path / "nonfinite_step_0.json").read_text())
    batches = report["ranks"][0]["batches"]
    assert [b["batch"] for b in batches] == [0, 1, 2, 3]
    assert [isinstance(b["loss"], float) for b in batches] == [True, True, False, True]


def test_a_gradient_that_overflows_under_a_finite_loss_is_found(digits: Path, tmp_path: Path) -> None:
    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 1:
                weight = next(pl_module.net.parameters())
                handle = weight.register_hook(lambda g: (handle.remove(), g * 1e38 * 1e38)[1])

    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite at step 1 .* though every loss is"):
        fit(tmp_path, [LossGuard(str(tmp_path)), Overflow()], digits)


def test_a_large_gradient_is_still_a_number(digits: Path, tmp_path: Path) -> None:
    """1e25, whose square is not one in float32."""

    class Large(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            weight = next(pl_module.net.parameters())
            weight.register_hook(lambda g: torch.full_like(g, 1e25))

    made = fit(tmp_path, [LossGuard(str(tmp_path)), Large()], digits, limit_train_batches=1)
    assert made.global_step == 1


def test_an_infinite_loss_with_a_finite_gradient_counts(digits: Path, tmp_path: Path) -> None:
    """Of inf + x, the gradient is that of x."""
    module = classifier()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        step(batch, batch_idx) + (math.inf if batch_idx == 1 else 0.0)
    )
    made = trainer(tmp_path, [LossGuard(str(tmp_path))], limit_val_batches=0)
    with pytest.raises(NonFiniteLossError, match=r"at step 1 .*inf on rank 0"):
        made.fit(module, datamodule=datamodule(digits))


@pytest.mark.parametrize("kind", [LossGuard, Late])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_no_checkpoint_is_poisoned(kind: type[LossGuard], digits: Path, tmp_path: Path) -> None:
    """Also when the bad step is the last before one is written, and where nobody validates."""
    kept = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        fit(tmp_path, [kind(str(tmp_path)), Poison(3), kept], digits, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_weights_that_are_no_numbers_are_never_saved(digits: Path, tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 4:
                pl_module.net.stem.branches[0].bn.running_var[0] = math.inf

    with pytest.raises(NonFiniteLossError, match=r"stem\.branches\.0\.bn\.running_var is not finite"):
        fit(tmp_path, [LossGuard(str(tmp_path)), Spoil()], digits, limit_val_batches=1)


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.guard\.on_nonfinite=ignore: choose stop or skip"):
        LossGuard(str(tmp_path), "ignore")
    with pytest.raises(ValueError, match=r"callbacks\.guard\.max_skips=0 must be at least 1"):
        LossGuard(str(tmp_path), "skip", 0)


def test_the_records_are_those_of_the_batch(digits: Path, tmp_path: Path) -> None:
    """In the second epoch, by the labels that the network was given."""
    labels: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 8:
                labels.extend(batch[1].tolist())

    with pytest.raises(NonFiniteLossError, match=r"at step 8 \(epoch 1"):
        fit(tmp_path, [LossGuard(str(tmp_path)), Look(), Poison(8)], digits, max_epochs=2)
    report = json.loads((tmp_path / "nonfinite_step_8.json").read_text())
    (batch,) = report["ranks"][0]["batches"]
    assert batch["batch"] == 3
    assert len(set(batch["records"])) == 64
    assert read_records(digits / "train.beton").labels[batch["records"]].tolist() == labels


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scaler leaves the first steps out
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_grad_scaler_is_left_to_its_own_business(mode: str, digits: Path, tmp_path: Path) -> None:
    """Real float16: an overflow of the scaled gradient is the scaler's; a loss that is no number is the guard's."""
    guard, end, scales = LossGuard(str(tmp_path), mode), End(), []

    class Scales(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            scales.append(trainer.precision_plugin.scaler.get_scale())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # too large, which it finds out by itself
    made = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=40, limit_val_batches=0, logger=False,
        callbacks=[guard, Poison(38), Scales(), end], plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = datamodule(digits, batch_size=32)
    if mode == "stop":
        with pytest.raises(NonFiniteLossError, match=r"at step 38 .*nan on rank 0, batch 38"):
            made.fit(classifier(), datamodule=data)
    else:
        made.fit(classifier(), datamodule=data)
        assert guard.skipped == 1
        assert all(value.isfinite().all() for value in end.tensors.values())
        assert scales[38] == scales[37] / 2
    assert scales[0] == 2.0**39  # overflowed, and nobody stopped
    assert scales[37] == scales[36] < 2.0**30


# --- two ranks, of which one is hit ---

TWO_RANKS = """
import json, math, sys
from pathlib import Path
import pytorch_lightning as pl
import torch
from repvgg.learn.guard import LossGuard, NonFiniteLossError
from support.training import classifier, datamodule, trainer

files, out, mode, late = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"

class Poison(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == 1:
            batch[0].fill_(math.inf)

class Late(LossGuard):
    def on_before_optimizer_step(self, *arguments):
        judge, self._judge = self._judge, lambda *_, **__: None
        super().on_before_optimizer_step(*arguments)
        self._judge = judge

guard = (Late if late else LossGuard)(str(out), mode)
module = classifier()
made = trainer(out, [guard, Poison()], devices=2, limit_val_batches=0)
message = ""
try:
    made.fit(module, datamodule=datamodule(files, batch_size=32))
except NonFiniteLossError as error:
    message = str(error)
state = {"message": message, "skipped": guard.skipped, "steps": made.global_step, "net": module.net.state_dict()}
torch.save(state, out / f"rank{made.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "late"), [("stop", False), ("stop", True)])
def test_all_ranks_stop_together_when_one_is_hit(mode: str, late: bool, digits: Path, tmp_path: Path) -> None:
    run(TWO_RANKS, tmp_path, digits, tmp_path, mode, late)
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert a["message"] == b["message"] != ""
    assert "nan on rank 1, batch 2" in a["message"]
    assert "rank 0" not in a["message"]
    assert a["steps"] == b["steps"]
    report = json.loads((tmp_path / "nonfinite_step_2.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert isinstance(report["ranks"][0]["batches"][0]["loss"], float)
    assert report["ranks"][1]["batches"][0]["loss"] == "nan"


@pytest.mark.slow
def test_all_ranks_skip_together_when_one_is_hit(digits: Path, tmp_path: Path) -> None:
    run(TWO_RANKS, tmp_path, digits, tmp_path, "skip", False)
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert (a["skipped"], a["message"]) == (b["skipped"], b["message"]) == (1, "")
    for name, value in a["net"].items():
        assert value.isfinite().all()
        assert b["net"][name].isfinite().all()
        assert (
            torch.equal(value, b["net"][name]) or "running" in name
        )  # each rank's own until they are brought together
