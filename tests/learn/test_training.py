"""Training itself: loss falls, seeds fix everything, resuming equals never having stopped."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning_fabric.plugins.precision import precision
from pytorch_lightning.callbacks import ModelCheckpoint

from repvgg.cli import ROOT, prepare_environment
from repvgg.inputs import PRECISIONS
from repvgg.learn.checkpoint import AtomicCheckpointIO
from repvgg.learn.devices import BF16_UNITS, require_devices, set_tf32, slow_bf16
from repvgg.learn.perf import PerfMonitor
from support.training import classifier, datamodule, trainer, two_forms


def fit(directory: Path, digits: Path, *, seed: int = 0, ckpt: str | None = None, **options) -> pl.Trainer:
    module = classifier(seed=seed)
    options = {"max_epochs": 2, "limit_train_batches": None, **options}
    run = trainer(directory, [PerfMonitor(), *options.pop("callbacks", [])], **options)
    run.fit(module, datamodule=datamodule(digits, seed=seed), ckpt_path=ckpt, weights_only=True)
    return run


def state(run: pl.Trainer) -> dict[str, torch.Tensor]:
    return dict(run.lightning_module.state_dict())


def test_learns_and_reports_its_speed(digits: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, digits, max_epochs=6)
    assert run.callback_metrics["train/top1"] > 0.5
    assert run.callback_metrics["val/top1"] > 0.5
    assert run.callback_metrics["perf/images_per_s"] > 0
    assert 0 <= run.callback_metrics["perf/data_wait_share"] < 1
    assert run.callback_metrics["perf/gpu_mem_peak_gib"] == 0
    assert run.callback_metrics["optim/lr"] < 0.01  # of the last step: the cosine has come down


def test_a_seed_fixes_everything(digits: Path, tmp_path: Path) -> None:
    first, second, other = (fit(tmp_path, digits, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(v, state(second)[k]) for k, v in state(first).items())
    assert first.callback_metrics["train/loss"] == second.callback_metrics["train/loss"]
    assert any(not torch.equal(v, state(other)[k]) for k, v in state(first).items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_at_an_epoch_equals_never_having_stopped(digits: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", digits, max_epochs=3)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    # The schedule must know the full length, so the first part is stopped rather than planned shorter.
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)

    options = {"max_epochs": 3, "enable_checkpointing": True}
    with pytest.raises(SystemExit):
        fit(tmp_path, digits, callbacks=[keep(), Stop()], **options)
    resumed = fit(tmp_path, digits, callbacks=[keep()], ckpt=str(tmp_path / "last.ckpt"), **options)
    assert resumed.global_step == whole.global_step
    assert all(torch.equal(v, state(resumed)[k]) for k, v in state(whole).items())
    for a, b in zip(whole.optimizers[0].state.values(), resumed.optimizers[0].state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert whole.callback_metrics["train/loss"] == resumed.callback_metrics["train/loss"]


def test_accumulated_batches_make_fewer_steps(digits: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, digits, max_epochs=1, accumulate_grad_batches=2)
    assert run.global_step == 11  # 1437 // 64 = 22 batches


def test_wrong_number_of_classes_is_found_before_training(digits: Path, tmp_path: Path) -> None:
    data = datamodule(digits)
    data.num_classes = 11
    with pytest.raises(ValueError, match=r"10 classes, data\.num_classes=11: set data\.num_classes=10"):
        trainer(tmp_path, [two_forms()]).fit(classifier(), datamodule=data)


def test_recipe_values_are_checked() -> None:
    with pytest.raises(ValueError, match=r"recipe\.lr=-1 must be positive"):
        classifier(lr=-1)


def test_precisions_are_lightnings() -> None:
    literals = (precision._PRECISION_INPUT_STR, precision._PRECISION_INPUT_STR_ALIAS)
    assert sorted(PRECISIONS) == sorted(name for literal in literals for name in get_args(literal))
    assert {str(number) for number in get_args(precision._PRECISION_INPUT_INT)} <= set(PRECISIONS)


@pytest.mark.parametrize("unit", [None, *BF16_UNITS])
@pytest.mark.parametrize("onednn", [True, False])
def test_bfloat16_on_a_processor_without_units_for_it_is_said(
    unit: str | None, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False, unit: True})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    asked = {"trainer.precision": "bf16-mixed", "bench.dtype": "bfloat16"}
    if unit is not None and onednn:
        assert slow_bf16(asked) is None
    else:
        line = slow_bf16(asked)
        assert line is not None
        assert line.startswith("trainer.precision=bf16-mixed, bench.dtype=bfloat16: this processor (")
        assert line.endswith("has no units for bfloat16 (AVX512-BF16, AMX), so float32 is likely to be faster")
    assert slow_bf16({"trainer.precision": "32-true", "bench.dtype": "float32"}) is None
    assert slow_bf16(asked, "gpu") is None


def test_torch_says_what_this_processor_has() -> None:
    """What :func:`slow_bf16` asks, under the names that it asks for."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert set(BF16_UNITS) & set(torch.cpu.get_capabilities())


def test_missing_gpus_and_silent_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asks for 64 GPUs, this machine has \d+.*trainer=cpu"):
        require_devices("gpu", 64, "32-true")
    with pytest.raises(ValueError, match="asks for 100 GPUs"):
        require_devices("gpu", [0, 99], "32-true")
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed needs a GPU"):
        require_devices("cpu", 1, "16-mixed")
    require_devices("cpu", 2, "bf16-mixed")


def test_tf32_is_off_unless_asked_for() -> None:
    for allowed in (True, False):
        set_tf32(allowed)
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.backends.cuda.matmul.allow_tf32 is allowed


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (ROOT / "conf" / "recipe").glob("*.yaml")))
def test_every_recipe_trains(recipe: str, digits: Path, tmp_path: Path) -> None:
    """Two short epochs of what `train.py` builds of it, on a small network; digits cannot be resized."""
    prepare_environment()
    small = ["net.depths=[1,1,1,1]", "net.width_a=0.125", "net.width_b=0.0625", "data.stem_stride=1", "compile=false"]
    scale = ["recipe.batch_size=64", "trainer.max_epochs=2", "recipe.warmup_epochs=0.5", "callbacks.resize=null"]
    short = ["trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "bench.every_n_epochs=0"]
    data = ["data=digits", f"data.dir={digits}", "data.prepare=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "train", [f"recipe={recipe}", "trainer=cpu", f"output_dir={tmp_path}", *data, *small, *scale, *short]
        )
    torch.manual_seed(0)
    module = instantiate(cfg.module)
    begin = state_of(module)
    run: pl.Trainer = instantiate(
        cfg.trainer,
        logger=False,
        callbacks=[made for made in instantiate(cfg.callbacks).values() if made is not None],
        enable_progress_bar=False,
        plugins=[AtomicCheckpointIO()],
    )
    run.fit(module, datamodule=instantiate(cfg.datamodule, batch_size=64))
    assert run.global_step == 8
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert any(not torch.equal(v, begin[k]) for k, v in state_of(module).items())
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    averaged = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True).keys() >= {"averaging_state"}
    assert averaged is (recipe == "fast")
    assert run.precision == ("bf16-mixed" if recipe == "fast" else "32-true")


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


GOLDEN = Path(__file__).with_name("golden_loss.json")


def test_reproduces_the_golden_loss_curve(digits: Path, tmp_path: Path) -> None:
    """Twelve steps in float64: a refactoring that moves one of them has changed the training.

    The losses were recorded with this test (GOLDEN_WRITE=1) and hold order, crops, initialisation, schedule and SGD.
    """
    losses = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            losses.append(outputs["loss"].item())

    module = classifier(seed=5, weight_decay=1e-3, warmup_epochs=0.1, label_smoothing=0.1).double()
    run = trainer(tmp_path, [Record()], precision="64-true", limit_train_batches=12, limit_val_batches=0)
    run.fit(module, datamodule=datamodule(digits, seed=5))
    if os.environ.get("GOLDEN_WRITE") == "1":
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)
