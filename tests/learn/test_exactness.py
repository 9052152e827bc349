"""One training, however many ranks share its batches: in float64, by whole trainings of real processes over gloo.

What theory says is equal is compared to 1e-12, what must differ is seen to differ, and what must not depend on how
BatchNorm buffers travel is compared bit for bit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from learn.test_ddp import run
from repvgg.data.order import train_order
from repvgg.learn.batchnorm import bring_together, check_batchnorm, ddp_options, reads_statistics, running_statistics
from repvgg.learn.ema import EMA
from repvgg.learn.health import diagnose
from repvgg.learn.optim import parameter_groups
from repvgg.model import Block, PointwiseConv, RepVGG, to_deploy
from support.networks import ABLATIONS, K3, randomize, tiny
from support.training import classifier, datamodule, trainer, two_forms

pytestmark = pytest.mark.usefixtures("one_thread")

#: Images per step. The digits' 1437 make 14 steps of it, and 29 batches of the half: one too many for whole steps.
GLOBAL = 96
EPOCHS = 2
STEPS = 14 * EPOCHS


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Normalises by its running statistics, in training too: nothing depends on how a batch is shared."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in randomize(net).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = FrozenBatchNorm2d
            nn.init.normal_(module.weight, 1.0, 0.1, generator=generator)
    return net


class Trace(pl.Callback):
    """What the training did, and what is in the network of this rank before it validates and at the end."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {"lr": [], "before": {}}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.result["lr"].append(optimizer.param_groups[0]["lr"])

    def on_validation_start(self, trainer, pl_module) -> None:
        self.result["before"] = {k: v.clone() for k, v in pl_module.net.named_buffers()}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.result["validated"] = {k: v.clone() for k, v in pl_module.net.state_dict().items()}

    def on_train_end(self, trainer, pl_module) -> None:
        optimizer = trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.result |= {
            "steps": trainer.global_step,
            "momenta": [optimizer.state[p]["momentum_buffer"].clone() for p in parameters],
            "net": {k: v.clone() for k, v in pl_module.net.state_dict().items()},
            "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                self.result["average"] = {
                    k: v.clone() for k, v in callback._average_model.module.net.state_dict().items()
                }


def network(kind: str) -> RepVGG:
    """`frozen`, `batchnorm`, or `border`, whose training reads running statistics."""
    branches = [K3, PointwiseConv] if kind == "border" else ABLATIONS["full"]
    torch.manual_seed(3)
    net = RepVGG((1, 2, 2, 1), 0.125, 0.0625, branches, num_classes=10, strides=(1, 2, 2, 2, 1))
    return freeze(net) if kind == "frozen" else net  # type: ignore[return-value]


def fit(
    files: Path,
    out: Path,
    *,
    devices: int = 1,
    accumulate: int = 1,
    kind: str = "frozen",
    batchnorm: str = "rank0",
    broadcast: bool = False,
    ema: bool = False,
    double: bool = True,
    resume: str | None = None,
    checkpoints: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train on GLOBAL images per step and say what came of it on this rank."""
    module = classifier(network(kind), batch_size=GLOBAL, warmup_epochs=0.5, weight_decay=1e-3, batchnorm=batchnorm)
    trace = Trace()
    callbacks: list[pl.Callback] = [*([EMA(0.9)] if ema else []), two_forms(tolerance=1e-2), trace]
    if checkpoints:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        )
    made = trainer(
        out,
        callbacks,
        devices=devices,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=checkpoints,
        strategy=DDPStrategy(**{**ddp_options(batchnorm), "forward_sync_buffers": broadcast})
        if devices > 1
        else "auto",
        precision="64-true" if double else "32-true",
        **{"limit_train_batches": None, "max_epochs": EPOCHS, **options},
    )
    data = datamodule(files, batch_size=GLOBAL // devices // accumulate)
    made.fit(module.double() if double else module, datamodule=data, ckpt_path=resume)
    return {**trace.result, "rank": made.global_rank}


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from learn.test_exactness import fit

files, out, results = (Path(argument) for argument in sys.argv[1:4])
for name, options in json.loads(sys.argv[4]).items():
    result = fit(files, out / name, devices=2, **options)
    torch.save(result, results / f"{name}_{result['rank']}.pt")
"""


def on_two_ranks(files: Path, out: Path, **trainings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of each training, what both ranks saw; all in one pair of processes, whose start takes longest."""
    run(SCRIPT, out, files, out, out, json.dumps(trainings))
    return {name: [torch.load(out / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)] for name in trainings}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative L2 distance of two tensors of one name."""
    assert a.keys() == b.keys()
    return max(
        float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-12)) for name in a if a[name].is_floating_point()
    )


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- ranks and accumulation share a batch ---


@pytest.mark.slow
def test_a_batch_is_the_same_however_it_is_shared(digits: Path, tmp_path: Path) -> None:
    """Momentum, weight decay, warm-up and cosine: 28 steps on 1, 2 and 2 × 2 accumulated shares of 96 images."""
    whole = fit(digits, tmp_path)
    accumulated = fit(digits, tmp_path, accumulate=2)
    several = on_two_ranks(digits, tmp_path, ranks={}, both={"accumulate": 2}, batchnorm={"kind": "batchnorm"})
    moved = distance(fit(digits, tmp_path, max_epochs=1)["net"], whole["net"])
    assert moved > 1e-3  # the training moves the weights by far more than what is compared
    for other in (accumulated, several["ranks"][0], several["ranks"][1], several["both"][0]):
        assert other["steps"] == whole["steps"] == STEPS
        assert other["lr"] == whole["lr"]
        assert distance(whole["net"], other["net"]) < 1e-12
        momenta = [{str(i): m for i, m in enumerate(run["momenta"])} for run in (whole, other)]
        assert distance(*momenta) < 1e-11
        for key in ("train/top1", "val/top1", "val/top5", "val/deploy/top1"):
            assert other["logged"][key] == pytest.approx(whole["logged"][key], abs=1e-12), key
        assert other["logged"]["train/loss"] == pytest.approx(whole["logged"]["train/loss"], rel=1e-12)
        for key in ("val/loss", "val/deploy/loss"):  # of float32 logits
            assert other["logged"][key] == pytest.approx(whole["logged"][key], rel=1e-6), key
    # The schedule has come to its end, by its own formula.
    assert len(whole["lr"]) == STEPS
    assert whole["lr"][-1] == pytest.approx(0.15 * (1 + math.cos(math.pi * 20 / 21)) / 2)
    # And with BatchNorm, which normalises by a rank's own share, it is another training.
    batchnorm = fit(digits, tmp_path, kind="batchnorm")
    assert distance(batchnorm["net"], several["batchnorm"][0]["net"]) > 1e-3


@pytest.mark.slow
def test_accumulated_batches_are_whole_steps(digits: Path, tmp_path: Path) -> None:
    """A last window of fewer batches would be a 15th step with a part of its images' gradient."""
    whole, accumulated = (fit(digits, tmp_path, accumulate=a, limit_val_batches=1) for a in (1, 2))
    assert accumulated["steps"] == whole["steps"] == STEPS
    assert accumulated["lr"] == whole["lr"]
    assert distance(whole["net"], accumulated["net"]) < 1e-12


@given(
    steps=st.integers(1, 4),
    rest=st.integers(0, 50),
    batch=st.integers(1, 5),
    ranks=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_step_is_of_the_same_images(
    steps: int, rest: int, batch: int, ranks: int, accumulate: int, epoch: int
) -> None:
    """Each image at most once an epoch, none on two ranks, and fewer left out than a step has."""
    whole = batch * ranks * accumulate
    samples = steps * whole + rest % whole
    one = train_order(samples, batch_size=whole, seed=0, epoch=epoch)
    shares = [
        train_order(samples, batch_size=batch * accumulate, seed=0, epoch=epoch, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert len(one) == len(set(one.tolist())) == steps * whole
    for step in range(steps):
        of_ranks = [share[step * batch * accumulate :][: batch * accumulate] for share in shares]
        assert sorted(np.concatenate(of_ranks).tolist()) == sorted(one[step * whole :][:whole].tolist())


# --- how BatchNorm buffers travel ---


@pytest.mark.slow
def test_sending_buffers_before_every_forward_changes_nothing_that_is_kept(digits: Path, tmp_path: Path) -> None:
    """Bit for bit, over two validations with averaged weights: so it is left out."""
    options = {"kind": "batchnorm", "ema": True, "double": False}
    found = on_two_ranks(digits, tmp_path, sent={**options, "broadcast": True}, own=options)
    (sent, sent_1), (own, own_1) = found["sent"], found["own"]
    for part in ("net", "validated", "average", "before"):
        assert identical(sent[part], own[part]), part
    assert {k: v for k, v in sent["logged"].items() if "bench" not in k and "convert_s" not in k} == {
        k: v for k, v in own["logged"].items() if "bench" not in k and "convert_s" not in k
    }
    # All ranks validate what rank 0 has, which is not what the others had.
    for rank_1 in (sent_1, own_1):
        assert identical(rank_1["validated"], sent["validated"])
    assert not identical(own_1["before"], own["before"])
    parameters = [name for name, _ in network("batchnorm").named_parameters()]
    assert identical(*({k: r["net"][k] for k in parameters} for r in (own, own_1)))


@pytest.mark.slow
def test_a_network_that_reads_running_statistics_reads_one_on_all_ranks(digits: Path, tmp_path: Path) -> None:
    """DBB's border: brought together before every batch, it trains as with buffers sent before every forward."""
    options = {"kind": "border", "double": False}
    found = on_two_ranks(digits, tmp_path, sent={**options, "broadcast": True}, own=options)
    for rank in (0, 1):
        assert identical(found["sent"][rank]["net"], found["own"][rank]["net"])


@pytest.mark.slow
def test_the_mean_is_of_all_ranks(digits: Path, tmp_path: Path) -> None:
    options = {"kind": "batchnorm", "double": False, "max_epochs": 1, "limit_train_batches": 6, "checkpoints": True}
    found = on_two_ranks(digits, tmp_path, rank0=options, mean={**options, "batchnorm": "mean"})
    a, b = found["mean"]
    assert identical(a["validated"], b["validated"])
    assert identical(a["net"], b["net"])
    statistics = running_statistics(network("batchnorm"))
    assert len(statistics) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in network("batchnorm").modules())
    for name in statistics:
        expected = (a["before"][name].double() + b["before"][name].double()) / 2
        assert not torch.equal(a["before"][name], b["before"][name])
        torch.testing.assert_close(a["validated"][name].double(), expected, rtol=1e-7, atol=1e-9)
    saved = torch.load(tmp_path / "mean" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"net.{name}"], a["validated"][name]) for name in a["validated"])
    # The training is that of rank0: only which statistics count is another.
    of_rank0 = found["rank0"][0]
    assert identical(a["before"], of_rank0["before"])
    parameters = [name for name, _ in network("batchnorm").named_parameters()]
    assert all(torch.equal(a["net"][name], of_rank0["net"][name]) for name in parameters)
    assert not identical(a["net"], of_rank0["net"])


@pytest.mark.slow
def test_a_checkpoint_between_validations_holds_the_mean(digits: Path, tmp_path: Path) -> None:
    """With averaged weights, of both of what it holds."""
    options = {
        "kind": "batchnorm", "double": False, "max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0,
        "checkpoints": True, "ema": True,
    }  # fmt: skip
    found = on_two_ranks(digits, tmp_path, rank0=options, mean={**options, "batchnorm": "mean"})
    saved = torch.load(tmp_path / "mean" / "epoch=0.ckpt", weights_only=True)
    for part, key in (("net", "current_model_state"), ("average", "state_dict")):
        for name in running_statistics(network("batchnorm")):
            ranks = [found["rank0"][rank][part][name].double() for rank in (0, 1)]
            expected = (ranks[0] + ranks[1]) / 2
            torch.testing.assert_close(saved[key][f"net.{name}"].double(), expected, rtol=1e-6, atol=1e-9)
            assert not torch.equal(ranks[0], ranks[1])


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["rank0", "mean"])
def test_resumed_ranks_go_on_alike(batchnorm: str, digits: Path, tmp_path: Path) -> None:
    """After a resume all ranks begin with the statistics of the file; nothing that is kept can tell."""
    options = {"double": False, "checkpoints": True, "batchnorm": batchnorm}
    kinds = {kind: {**options, "kind": kind} for kind in ("batchnorm", "border")}
    whole = on_two_ranks(digits, tmp_path, **kinds)
    again = on_two_ranks(
        digits, tmp_path, **{k: {**o, "resume": str(tmp_path / k / "epoch=0.ckpt")} for k, o in kinds.items()}
    )
    for kind in kinds:
        assert identical(whole[kind][0]["validated"], again[kind][0]["validated"]), kind
        assert identical(whole[kind][0]["net"], again[kind][0]["net"]), kind


# --- the parts, without ranks ---


def test_which_networks_read_running_statistics() -> None:
    images = torch.randn(2, 3, 32, 32)
    for name, branches in ABLATIONS.items():
        net = tiny(name)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        random_numbers = torch.get_rng_state()
        assert not reads_statistics(net, images), name
        assert identical(before, net.state_dict())
        assert torch.equal(random_numbers, torch.get_rng_state())
        assert len(branches) == len(net.stem.branches) + (0 if "id" not in name and name != "full" else 1)
    assert reads_statistics(network("border"), images)
    assert reads_statistics(network("frozen"), images)
    assert not reads_statistics(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), images)


def test_one_rank_is_left_alone() -> None:
    tensors = {"running_mean": torch.randn(3)}
    before = tensors["running_mean"].clone()
    bring_together(tensors, "mean", {"running_mean"})
    assert torch.equal(tensors["running_mean"], before)


def test_sync_batchnorm_converts_like_batchnorm() -> None:
    """torch's SyncBatchNorm in place of every BatchNorm, as Lightning puts it: keys, groups, deploy form, health."""
    for ablation in ABLATIONS:
        net = randomize(tiny(ablation)).eval()
        torch.manual_seed(0)
        sync = tiny(ablation)
        sync.load_state_dict(net.state_dict())
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(sync).eval()
        assert any(isinstance(m, nn.SyncBatchNorm) for m in sync.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in sync.modules())
        assert identical(net.state_dict(), sync.state_dict())
        assert running_statistics(net) == running_statistics(sync)
        groups = [[(g["name"], len(g["params"])) for g in parameter_groups(m, 1e-4)] for m in (net, sync)]
        assert groups[0] == groups[1]
        assert identical(to_deploy(net).state_dict(), to_deploy(sync).state_dict())
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(net(x), sync(x))
        for a, b in zip(net.modules(), sync.modules(), strict=True):
            if isinstance(a, Block) and isinstance(b, Block):
                assert diagnose(a) == diagnose(b)


def test_what_cannot_be_is_said_before_anything_begins() -> None:
    with pytest.raises(ValueError, match=r"batchnorm=ranks: choose rank0, mean or sync"):
        check_batchnorm("ranks")
    with pytest.raises(ValueError, match=r"batchnorm=ranks"):
        classifier(batchnorm="ranks")
    with pytest.raises(ValueError, match=r"batchnorm=sync with trainer\.devices=2 on CPUs"):
        check_batchnorm("sync", "cpu", 2)
    check_batchnorm("sync", "cpu", 1)
    check_batchnorm("sync", "gpu", 8)
