"""The training equals the authors' recipe, step by step: the real thing against the oracle, both in float64.

One side is what `python src/train.py` builds: configs composed by Hydra, the Classifier, Lightning's Trainer. The
other is :mod:`support.oracle`. Fifty steps from the same weights on the same batches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, TensorDataset

from repvgg.cli import ROOT, prepare_environment
from repvgg.learn.module import Classifier
from support.networks import randomize
from support.oracle import BUFFERS, Recipe, Trajectory, official_names, train

EPOCHS, BATCHES, BATCH = 10, 5, 32
STEPS = EPOCHS * BATCHES
SMALL = (
    "net.depths=[1,2,2,1]",
    "net.width_a=0.125",
    "net.width_b=0.0625",
    "data=digits",
    "data.stem_stride=1",
    "trainer=cpu",
)
#: The overrides of the older script's two switches, and what the oracle calls them.
SWITCHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "paper": ((), {}),
    "older script": (
        ("recipe.decay_identity_gamma=true", "recipe.bias_lr_factor=2.0"),
        {"decay_identity_gamma": True, "bias_lr_factor": 2.0},
    ),
}
SCALE = (f"recipe.batch_size={BATCH}", f"recipe.lr_batch={BATCH}", f"trainer.max_epochs={EPOCHS}")
#: Relative, of every tensor as a whole. The two sides add in another order (1e-16 each time), and 50 steps at lr 0.1
#: amplify that: to 1e-13 in losses, weights and buffers, 1.4e-12 in momenta (measured).
TOLERANCE = 1e-10


pytestmark = pytest.mark.usefixtures("one_thread")


def config(*overrides: str) -> DictConfig:
    prepare_environment()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", ["output_dir=/nowhere", *overrides])


def images_and_labels() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (BATCHES * BATCH,), generator=generator)
    images = torch.randn(len(labels), 3, 16, 16, generator=generator, dtype=torch.float64)
    return TensorDataset(images + labels[:, None, None, None] / 5, labels)


class Record(pl.Callback):
    """Of every step, the loss and the learning rate of each parameter, by id."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[int, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


@cache
def real(*overrides: str) -> tuple[dict[str, torch.Tensor], Trajectory]:
    """Initial tensors and trajectory of the real training, under the official names."""
    cfg = config(*SMALL, *SCALE, "trainer.precision=64-true", *overrides)
    torch.manual_seed(0)
    module: Classifier = instantiate(cfg.module).double()
    randomize(module.net)
    official = official_names(module.net.state_dict())
    initial = {official[name]: value.clone() for name, value in module.net.state_dict().items()}
    record = Record()
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        logger=False,
        callbacks=[record],
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=None,
    )
    loader = DataLoader(images_and_labels(), batch_size=BATCH)
    trainer.fit(module, loader, loader)
    (optimizer,) = trainer.optimizers
    names = {id(p): official[name] for name, p in module.net.named_parameters()}
    return initial, Trajectory(
        losses=record.losses,
        rates=[{names[p]: rate for p, rate in rates.items()} for rates in record.rates],
        tensors={official[name]: value for name, value in module.net.state_dict().items()},
        momenta={names[id(p)]: state["momentum_buffer"] for p, state in optimizer.state.items()},
    )


@cache
def oracle(recipe: Recipe, groups: int, *overrides: str) -> Trajectory:
    """The oracle from the weights that the real training of these overrides began with."""
    initial, _ = real(*overrides)
    data = images_and_labels()
    batches = [(data.tensors[0][i : i + BATCH], data.tensors[1][i : i + BATCH]) for i in range(0, len(data), BATCH)]
    return train(initial, list(islice(batches * EPOCHS, recipe.steps)), recipe, groups=groups, strides=(1, 2, 2, 2, 2))


def distance(a: Trajectory, b: Trajectory) -> dict[str, float]:
    """The largest relative difference of losses, weights, BatchNorm buffers and momenta; each tensor by its norm."""
    assert a.tensors.keys() == b.tensors.keys()
    assert a.momenta.keys() == b.momenta.keys()

    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return ((x - y).double().norm() / y.double().norm()).item()

    return {
        "loss": max(abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True)),
        "weights": max(relative(v, b.tensors[k]) for k, v in a.tensors.items() if not k.endswith(BUFFERS)),
        "buffers": max(relative(v, b.tensors[k]) for k, v in a.tensors.items() if k.endswith(BUFFERS)),
        "momenta": max(relative(v, b.momenta[k]) for k, v in a.momenta.items()),
    }


CASES = {
    "full": (Recipe(STEPS), 1, ()),
    "id": (Recipe(STEPS), 1, ("ablation=id",)),
    "1x1": (Recipe(STEPS), 1, ("ablation=1x1",)),
    "plain": (Recipe(STEPS), 1, ("ablation=plain",)),
    "groups and squeeze-excite": (Recipe(STEPS), 2, ("net.groups=2", "net.squeeze_excite=true", "net.width_a=0.25")),
    "200 epochs, without mixup": (
        Recipe(STEPS, warmup_steps=5 * BATCHES, label_smoothing=0.1),
        1,
        ("recipe=paper_200", "recipe.mixup=0.0", "recipe.rand_augment=null"),
    ),
}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_equal_the_oracles(case: str, switches: str) -> None:
    recipe, groups, overrides = CASES[case]
    switched, options = SWITCHES[switches]
    initial, ours = real(*overrides, *switched)
    theirs = oracle(replace(recipe, **options), groups, *overrides, *switched)
    assert len(ours.losses) == STEPS
    assert ours.losses[-1] < 0.8 * ours.losses[0]
    assert all(not torch.equal(ours.tensors[name], value) for name, value in initial.items())
    apart = distance(ours, theirs)
    assert max(apart.values()) < TOLERANCE, apart
    for at_step, expected in zip(ours.rates, theirs.rates, strict=True):
        assert at_step == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    "flipped",
    [
        {"decay_identity_gamma": True},
        {"bias_lr_factor": 2.0},
        {"weight_decay": 0.0},
        {"label_smoothing": 0.01},
        {"warmup_steps": 1},
        {"momentum": 0.899},
    ],
    ids=lambda flipped: next(iter(flipped)),
)
def test_one_switch_is_seen(flipped: dict[str, Any]) -> None:
    """Negative control: the smallest of these moves the weights by 12 % (measured), 9 orders above the tolerance."""
    _, ours = real()
    apart = distance(ours, oracle(replace(Recipe(STEPS), **flipped), 1))
    assert apart["weights"] > 0.01, apart
    assert apart["loss"] > 0.01, apart


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_parameter_groups_of_b0_by_name(switches: str) -> None:
    """Every parameter's decay and learning rate, as the optimiser has them, against the rule on official names."""
    switched, options = SWITCHES[switches]
    with torch.device("meta"):
        module: Classifier = instantiate(config("model=repvgg_b0", *switched).module)
    optimizer = module.make_optimizer(module.parameter_groups(), lr=module.lr)
    official = official_names(module.net.state_dict())
    names = {id(p): official[name] for name, p in module.net.named_parameters()}
    recipe = Recipe(100, **options)
    seen = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert seen == {name: (recipe.decay_of(name), 0.1 * recipe.lr_factor_of(name)) for name in names.values()}
    # 28 blocks, 23 with an identity: 56 kernels and the head's; each BatchNorm's β and the head's bias.
    decayed = [name for name, (decay, _) in seen.items() if decay]
    assert len(decayed) == 57 + (23 if options else 0)
    assert sum(lr == 0.2 for _, lr in seen.values()) == (28 * 2 + 23 + 1 if options else 0)
