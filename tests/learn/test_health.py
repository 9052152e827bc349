"""The numbers of every branch against plain computations, and a callback that leaves no trace in training."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from repvgg.learn.health import COLUMNS, Health, diagnose, kinds, layer_rows, read_rows, stage_of, summary, write_rows
from repvgg.model import Block, Branch, ConvBN, ConvShape, Identity, RepVGG
from repvgg.report.offline import find_offline_runs, read_offline_run
from support.networks import ABLATIONS, ID, K1, K3, randomize, tiny
from support.training import classifier, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def made(branches: list[Any], seed: int = 0, shape: ConvShape | None = None, **options: Any) -> Block:
    torch.manual_seed(seed)
    block = Block(shape or ConvShape(6, 6, groups=2), branches, **options)
    return randomize(block.double(), seed)  # type: ignore[return-value]


def numbers(block: Block) -> dict[str, dict[str, float]]:
    return {
        kind: {name: value.item() for name, value in values.items()}
        for kind, values in diagnose(block, torch.float64).items()
    }


def by_hand(branch: nn.Module, shape: ConvShape) -> tuple[np.ndarray, np.ndarray]:
    """O × I/g × 3 × 3 and O, one output channel after another, from the definition of an eval-mode BatchNorm."""
    per_group = shape.in_channels // shape.groups
    kernel = np.zeros((shape.out_channels, per_group, 3, 3))
    bias = np.zeros(shape.out_channels)
    for o in range(shape.out_channels):
        if isinstance(branch, Identity):
            kernel[o, o % per_group, 1, 1] = 1
        else:
            weight = branch.conv.weight[o].detach().numpy()
            cut = slice(None) if weight.shape[1] == 3 else slice(1, 2)
            kernel[o, :, cut, cut] = weight
        if isinstance(branch.bn, nn.BatchNorm2d):
            sigma = math.sqrt(branch.bn.running_var[o].item() + 1e-5)
            gamma, beta = branch.bn.weight[o].item(), branch.bn.bias[o].item()
            kernel[o] *= gamma / sigma
            bias[o] = beta - branch.bn.running_mean[o].item() * gamma / sigma
    return kernel, bias


@pytest.mark.parametrize("norm", [False, True])
def test_a_hand_made_block(norm: bool) -> None:
    """The identity's BatchNorm has one channel of tiny variance, the 1×1 none at all and two dead γ in the 3×3's."""
    bare = partial(ConvBN, kernel_size=1, norm=False)
    block = made([K3, bare, ID], norm=norm)
    with torch.no_grad():
        block.branches[2].bn.running_var[4] = 1e-7
        block.branches[0].bn.weight[[0, 3]] = torch.tensor([1e-6, 0.0], dtype=torch.float64)
    found = numbers(block)
    maps = {kind: by_hand(branch, block.shape) for kind, branch in kinds(block).items()}
    kernels = {kind: kernel for kind, (kernel, _) in maps.items()}
    biases = {kind: bias for kind, (_, bias) in maps.items()}
    biases["fused"] = sum(biases.values())
    if norm:  # a map per channel, of each kernel and each bias; its shift is the sum's
        scale = (block.norm.weight / torch.sqrt(block.norm.running_var + 1e-5)).detach().numpy()
        shift = block.norm.bias.detach().numpy() - block.norm.running_mean.numpy() * scale
        kernels = {kind: kernel * scale[:, None, None, None] for kind, kernel in kernels.items()}
        biases = {kind: bias * scale + (shift if kind == "fused" else 0) for kind, bias in biases.items()}
    kernels["fused"] = sum(kernels.values())
    assert found.keys() == {"conv3x3", "conv1x1", "identity", "fused"}
    for kind, kernel in kernels.items():
        largest = [np.abs(channel).max() for channel in kernel]
        assert {name: found[kind][name] for name in found[kind] if not name.startswith(("gamma", "var"))} == {
            "share": pytest.approx(np.vdot(kernel, kernels["fused"]) / np.square(kernels["fused"]).sum(), rel=1e-10),
            "norm": pytest.approx(math.sqrt(np.square(kernel).sum()), rel=1e-10),
            "weight_max": pytest.approx(max(largest), rel=1e-10),
            "channel_range": pytest.approx(max(largest) / np.median(largest), rel=1e-10),
            "bias_min": pytest.approx(biases[kind].min(), rel=1e-10),
            "bias_max": pytest.approx(biases[kind].max(), rel=1e-10),
        }, kind
    norms = {"conv3x3": block.branches[0].bn, "identity": block.branches[2].bn} | (
        {"fused": block.norm} if norm else {}
    )
    mean = np.mean([np.abs(bn.weight.detach().numpy()) for bn in norms.values()])
    for kind, bn in norms.items():
        gamma = np.abs(bn.weight.detach().numpy())
        assert {name: found[kind][name] for name in found[kind] if name.startswith(("gamma", "var"))} == {
            "gamma_mean": pytest.approx(gamma.mean(), rel=1e-12),
            "gamma_min": gamma.min(),
            "gamma_max": gamma.max(),
            "gamma_dead": pytest.approx((gamma <= 1e-3 * mean).mean(), rel=1e-12),
            "var_min": bn.running_var.min().item(),
        }, kind
    assert found["conv3x3"]["gamma_dead"] == pytest.approx(1 / 3)
    assert found["identity"]["var_min"] == 1e-7
    assert "gamma_mean" not in found["conv1x1"]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(ABLATIONS)),
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.floats(1e-3, 1e3),
)
def test_shares_add_up_to_one_and_know_no_scale(
    ablation: str, seed: int, groups: int, norm: bool, scale: float
) -> None:
    block = made(ABLATIONS[ablation], seed, ConvShape(6, 6, groups=groups), norm=norm)
    before = numbers(block)
    assert math.fsum(v["share"] for kind, v in before.items() if kind != "fused") == pytest.approx(1, rel=1e-9)
    assert before["fused"]["share"] == pytest.approx(1, rel=1e-12)
    with torch.no_grad():
        for branch in block.branches:
            branch.bn.weight.mul_(scale)
            branch.bn.bias.mul_(scale)
    for kind, values in numbers(block).items():
        for unmoved in ("share", "channel_range"):
            assert values[unmoved] == pytest.approx(before[kind][unmoved], rel=1e-9, abs=1e-12)
        assert values["norm"] == pytest.approx(before[kind]["norm"] * scale, rel=1e-9)


def test_a_branch_that_works_against_the_others_has_a_negative_share() -> None:
    block = made([K3, K3])
    with torch.no_grad():  # K2 = −K1 / 2
        block.branches[1].load_state_dict(block.branches[0].state_dict())
        block.branches[1].conv.weight.mul_(-0.5)
    found = numbers(block)
    assert found["conv3x3"]["share"] == pytest.approx(2)
    assert found["conv3x3_2"]["share"] == pytest.approx(-1)


def test_a_low_precision_block_is_folded_in_float32() -> None:
    block = randomize(Block(ConvShape(8, 8), ABLATIONS["full"])).bfloat16()
    low, same = diagnose(block), diagnose(copy.deepcopy(block).float())
    assert all(value.dtype == torch.float32 for values in low.values() for value in values.values())
    assert {k: {n: v.item() for n, v in d.items()} for k, d in low.items()} == {
        k: {n: v.item() for n, v in d.items()} for k, d in same.items()
    }


class Curved(Branch):
    def __init__(self, shape: ConvShape) -> None:
        super().__init__()
        self.inner = ConvBN(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def test_kinds_are_numbered_and_general() -> None:
    block = Block(ConvShape(4, 4), [K3, Curved, K1, K3, ID, Curved, K3])
    assert list(kinds(block)) == ["conv3x3", "Curved", "conv1x1", "conv3x3_2", "identity", "Curved_2", "conv3x3_3"]


def test_layers_have_the_papers_stages() -> None:
    names = ["stem", "stages.0.0", "stages.3.12", "body.stages.1.0", "blocks.4"]
    assert [stage_of(name) for name in names] == ["stage0", "stage1", "stage4", "stage2", "blocks"]


def rows_of(**columns: list[Any]) -> list[dict[str, Any]]:
    """Rows with one entry of each column per row."""
    count = len(next(iter(columns.values())))
    return [{**dict.fromkeys(COLUMNS), **{name: values[i] for name, values in columns.items()}} for i in range(count)]


def test_the_summary_means_over_a_stage_and_keeps_the_worst_layer() -> None:
    branches = rows_of(
        stage=["stage1", "stage1", "stage2"],
        branch=["identity"] * 3,
        share=[0.2, 0.4, -0.1],
        norm=[1.0, 3.0, 5.0],
        gamma_mean=[1.0, 2.0, 4.0],
        gamma_dead=[0.0, 0.5, 1.0],
        var_min=[0.3, 0.01, 0.2],
        grad_norm=[3.0, 0.0, 4.0],
    )
    fused = rows_of(
        stage=["stage1", "stage1"],
        branch=["fused"] * 2,
        share=[1.0, 1.0],
        norm=[9.0, 9.0],
        weight_max=[2.0, 1.0],
        channel_range=[3.0, math.nan],
        bias_min=[-1.0, -5.0],
        bias_max=[1.0, 0.0],
    )
    values = summary(branches + fused)
    assert math.isnan(values.pop("health/channel_range/stage1"))
    assert values == pytest.approx(
        {
            "health/share/stage1/identity": 0.3,
            "health/share/stage2/identity": -0.1,
            "health/norm/stage1/identity": 2,
            "health/norm/stage2/identity": 5,
            "health/gamma/stage1/identity": 1.5,
            "health/gamma/stage2/identity": 4,
            "health/gamma_dead/identity": 0.5,
            "health/var_min/identity": 0.01,
            "health/grad_norm/identity": 5,
            "health/weight_max/stage1": 2,
            "health/bias_range/stage1": 5,
        }
    )


def test_the_number_of_keys_does_not_grow_with_depth() -> None:
    counts = []
    for depth in (2, 9):
        net = RepVGG((depth,) * 4, 0.125, 0.0625, ABLATIONS["full"])
        counts.append(len(summary(layer_rows(net, 0, 0, gradients={}))))
    assert counts[0] == counts[1] < 80


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = rows_of(epoch=[0, 3], step=[5, 9], layer=["stem", "a,b"], stage=["s"] * 2, branch=["x", "fused"])
    rows[0] |= {"share": 0.25, "norm": math.inf, "var_min": 1e-30}
    write_rows(tmp_path / "new" / "health.csv", rows)
    assert read_rows(tmp_path / "new" / "health.csv") == rows
    assert read_rows(tmp_path / "missing.csv") == []


# In training

#: Of one epoch of the tiny network: 7 blocks of a 3×3, a 1×1 and their sum, 3 of them with an identity.
ROWS = 7 * 3 + 3


def batches(count: int = 5, batch: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count * batch,), generator=generator)
    images = torch.randn(len(labels), 3, 16, 16, generator=generator) + labels[:, None, None, None] / 5
    return DataLoader(TensorDataset(images, labels), batch_size=batch)


def fit(directory: Path, callbacks: list[pl.Callback], net: nn.Module | None = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    module = options.pop("module", None) or classifier(net)
    ckpt = options.pop("ckpt_path", None)
    run = trainer(directory, callbacks, **{"limit_train_batches": None, **options})
    run.fit(module, batches(), batches(1), ckpt_path=ckpt, weights_only=True)
    return run


class Gradients(pl.Callback):
    """A copy of every gradient at every step, and of the weights after it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.trained: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append({name: p.grad.clone() for name, p in pl_module.net.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.trained.append(copy.deepcopy(pl_module.net.state_dict()))


def norm_of(gradients: dict[str, Tensor], part: str = "") -> float:
    return math.sqrt(sum(g.double().square().sum().item() for name, g in gradients.items() if part in name))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_the_last_steps_of_the_epoch(accumulate: int, tmp_path: Path) -> None:
    seen = Gradients()
    run = fit(tmp_path, [Health(str(tmp_path)), seen], accumulate_grad_batches=accumulate, gradient_clip_val=0.01)
    assert len(seen.seen) == (5 if accumulate == 1 else 3)
    last = seen.seen[-1]
    logged = run.callback_metrics
    assert logged["health/grad_norm/total"] == pytest.approx(norm_of(last), rel=1e-5)
    assert norm_of(last) > 0.01  # before clipping
    for i, kind in enumerate(["conv3x3", "conv1x1", "identity"]):
        assert logged[f"health/grad_norm/{kind}"] == pytest.approx(norm_of(last, f"branches.{i}."), rel=1e-5)
    (row,) = (r for r in read_rows(tmp_path / "health.csv") if (r["layer"], r["branch"]) == ("stages.1.1", "identity"))
    assert row["grad_norm"] == pytest.approx(norm_of(last, "stages.1.1.branches.2."), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_without_the_scalers_factor(fused: bool, tmp_path: Path) -> None:
    """A fused optimiser unscales inside its step, after the hook."""
    norms = []
    for scale in (1.0, 1024.0):
        module = classifier()
        module.make_optimizer = partial(torch.optim.SGD, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run = trainer(tmp_path, [Health(str(tmp_path))], limit_train_batches=None)
        run.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        run.fit(module, batches(), batches(1))
        assert scaler.get_scale() == scale
        norms.append(float(run.callback_metrics["health/grad_norm/total"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)  # float16 rounds otherwise under another scale


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_never_changes_training(precision: str, tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [Health(str(tmp_path))]):
        seen = Gradients()
        pl.seed_everything(1, verbose=False)
        run = fit(tmp_path, [*callbacks, seen], max_epochs=2, precision=precision)
        results.append((run.lightning_module.state_dict(), seen.seen, torch.get_rng_state(), run.callback_metrics))
    (without, grads, rng, metrics), (with_it, grads_with, rng_with, metrics_with) = results
    assert all(torch.equal(value, with_it[name]) for name, value in without.items())
    assert len(grads) == len(grads_with) == 10
    assert all(torch.equal(a[name], b[name]) for a, b in zip(grads, grads_with, strict=True) for name in a)
    assert torch.equal(rng, rng_with)
    assert {k: v for k, v in metrics_with.items() if not k.startswith("health/")} == metrics
    assert any(k.startswith("health/") for k in metrics_with)


def state_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "grad_norm"} for row in rows]


def rows_now(net: nn.Module, epoch: int, step: int, file: Path) -> list[dict[str, Any]]:
    """What a diagnosis of this network says, as the file rounds it."""
    write_rows(file, layer_rows(net, epoch, step, gradients={}))
    return state_of(read_rows(file))


def test_an_average_of_the_weights_is_not_what_is_diagnosed(tmp_path: Path) -> None:
    seen = Gradients()
    run = fit(tmp_path, [EMAWeightAveraging(decay=0.5), Health(str(tmp_path)), seen])
    rows = state_of(read_rows(tmp_path / "health.csv"))
    net = copy.deepcopy(run.lightning_module.net)
    assert rows != rows_now(net, 0, 5, tmp_path / "average.csv")  # what the fit has left in the module
    net.load_state_dict(seen.trained[-1])
    assert rows == rows_now(net, 0, 5, tmp_path / "trained.csv")


def test_a_compiled_network_has_the_same_layers(tmp_path: Path) -> None:
    net = randomize(tiny())
    compiled = torch.compile(net, backend="eager")
    assert rows_now(compiled, 0, 0, tmp_path / "compiled.csv") == rows_now(net, 0, 0, tmp_path / "eager.csv")
    assert any("_orig_mod" in name for name, _ in compiled.named_modules())


def test_how_often(tmp_path: Path) -> None:
    run = fit(tmp_path, [Health(str(tmp_path), every_n_epochs=2)], max_epochs=5)
    rows = read_rows(tmp_path / "health.csv")
    assert sorted({(row["epoch"], row["step"]) for row in rows}) == [(1, 10), (3, 20)]
    assert len(rows) == 2 * ROWS
    assert "health/share/stage2/identity" in run.callback_metrics
    run = fit(tmp_path / "never", [Health(str(tmp_path / "never"), every_n_epochs=0)])
    assert not any(key.startswith("health/") for key in run.callback_metrics)
    assert not (tmp_path / "never" / "health.csv").exists()
    with pytest.raises(ValueError, match=r"callbacks\.health\.every_n_epochs=-1: choose 1"):
        Health("", every_n_epochs=-1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_continues_its_file(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.current_epoch == 2 and batch_idx == 3:
                raise KeyboardInterrupt

    def keep() -> list[pl.Callback]:
        return [Health(str(tmp_path)), ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)]

    options = {"max_epochs": 4, "enable_checkpointing": True}
    fit(tmp_path / "whole", [Health(str(tmp_path / "whole"))], max_epochs=4)
    with pytest.raises(SystemExit):
        fit(tmp_path, [*keep(), Stop()], **options)
    assert {row["epoch"] for row in read_rows(tmp_path / "health.csv")} == {0, 1}
    # From the first epoch's checkpoint: the second epoch is trained, and written, again.
    fit(tmp_path, keep(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), **options)
    assert (tmp_path / "health.csv").read_bytes() == (tmp_path / "whole" / "health.csv").read_bytes()
    fit(tmp_path, keep(), **{**options, "max_epochs": 1})  # a new run in the same directory starts anew
    assert {row["epoch"] for row in read_rows(tmp_path / "health.csv")} == {0}


def test_a_branch_without_a_map_is_named_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = tiny(num_classes=10)
    net.stages[1][1] = Block(ConvShape(16, 16), [K3, Curved, ID])
    with caplog.at_level(logging.WARNING, "repvgg"):
        run = fit(tmp_path, [Health(str(tmp_path))], net, max_epochs=2)
    (message,) = [r.message for r in caplog.records if r.name == "repvgg.learn.health"]
    assert "Curved in stages.1.1 is no affine map" in message
    rows = {r["branch"]: r for r in read_rows(tmp_path / "health.csv") if (r["epoch"], r["layer"]) == (1, "stages.1.1")}
    assert rows.keys() == {"conv3x3", "Curved", "identity", "fused"}
    assert rows["conv3x3"]["share"] + rows["identity"]["share"] == pytest.approx(1, rel=1e-5)
    assert rows["Curved"]["share"] is None
    assert rows["Curved"]["gamma_mean"] > 0
    assert rows["Curved"]["grad_norm"] > 0
    assert "health/share/stage2/Curved" not in run.callback_metrics
    assert "health/gamma/stage2/Curved" in run.callback_metrics


def test_a_network_without_blocks_has_a_gradient_all_the_same(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    run = fit(tmp_path, [Health(str(tmp_path))], net)
    assert [k for k in run.callback_metrics if k.startswith("health/")] == ["health/grad_norm/total"]
    assert read_rows(tmp_path / "health.csv") == []


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from repvgg.learn.health import Health
from repvgg.learn.logging import RunLogger
from support.training import classifier, trainer

out = Path(sys.argv[1])
logger = RunLogger(mode="offline", project="repvgg", save_dir=str(out), name="health")
run = trainer(out, [Health(str(out))], devices=2, logger=logger, limit_train_batches=None, limit_val_batches=0)
logger.log_hyperparams({"seed": 0})
images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(run.global_rank))
data = DataLoader(TensorDataset(images, torch.arange(48) % 10), batch_size=16)
run.fit(classifier(), data, data)
keys = sorted(key for key in run.callback_metrics if key.startswith("health/"))
torch.save({"net": run.lightning_module.net.state_dict(), "keys": keys}, out / f"rank{run.global_rank}.pt")
logger.finish({}, 0)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two processes that logs to W&B: files of their own, for its settings are global."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "script.py", str(out)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out, env=one, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_rank_0_alone_diagnoses_its_own_network(two_ranks: Path, tmp_path: Path) -> None:
    ranks = [torch.load(two_ranks / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]["keys"]) > 30
    assert not ranks[1]["keys"]
    rows = state_of(read_rows(two_ranks / "health.csv"))
    net = classifier().net
    same = []
    for rank in ranks:
        net.load_state_dict(rank["net"])
        same.append(rows == rows_now(net, 0, 3, tmp_path / "now.csv"))
    assert same == [True, False]  # the ranks saw other images, so their running statistics differ


def test_wandb_gets_the_table_and_the_histograms(two_ranks: Path) -> None:
    (file,) = find_offline_runs(two_ranks)
    run = read_offline_run(file)
    assert 0 < run.summary["health/share/stage0/conv1x1"] < 1
    assert {k for k in run.summary if k.startswith("health/share_of_layers/")}, sorted(run.summary)
    (table,) = (file.parent / "files" / "media" / "table").rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(COLUMNS)
    assert len(content["data"]) == len(read_rows(two_ranks / "health.csv")) == ROWS
