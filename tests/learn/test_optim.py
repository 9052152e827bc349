"""What is decayed, the learning rate of every step, and the share of every device."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repvgg.learn.optim import batch_per_device, parameter_groups, scaled_lr, warmup_then_cosine
from support.networks import tiny


def test_kernels_are_decayed_and_nothing_else() -> None:
    model = tiny(squeeze_excite=False)
    names = {id(p): n for n, p in model.named_parameters()}
    kernels, rest = parameter_groups(model, 1e-4)
    assert kernels["weight_decay"] == 1e-4
    assert rest["weight_decay"] == 0
    decayed = {names[id(p)] for p in kernels["params"]}
    assert decayed == {n for n in names.values() if n.endswith("conv.weight") or n == "head.weight"}
    # the γ of the identity's BatchNorm, which choosing by name gets wrong
    assert "stages.1.1.branches.2.bn.weight" in {names[id(p)] for p in rest["params"]}
    assert len(kernels["params"]) + len(rest["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [len(g["params"]) for g in parameter_groups(model, 0.1)] == [1, 1]


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 10), (7, 3)])
def test_learning_rate_of_every_step(steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = warmup_then_cosine(optimizer, steps, warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for i, rate in enumerate(rates):
        if i < warmup:
            expected = 0.1 * (0.01 + 0.99 * i / warmup)
        else:
            expected = 0.05 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        assert rate == pytest.approx(expected, rel=1e-9), i
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_warmup_longer_than_training_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="warm-up of 5 steps does not fit into 5"):
        warmup_then_cosine(optimizer, 5, 5)


def test_lr_follows_the_batch_linearly() -> None:
    assert scaled_lr(0.1, 256, 256) == 0.1
    assert scaled_lr(0.1, 256, 2048) == pytest.approx(0.8)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 8))
def test_every_device_gets_an_equal_share_or_the_user_is_told(batch: int, devices: int, accumulate: int) -> None:
    try:
        share = batch_per_device(batch, devices, accumulate)
    except ValueError as error:
        assert batch % (devices * accumulate) != 0
        suggested = int(str(error).rsplit(" ", 1)[1].removeprefix("recipe.batch_size="))
        assert batch_per_device(suggested, devices, accumulate) >= 1
    else:
        assert share * devices * accumulate == batch
