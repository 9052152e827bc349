"""Blocks that keep only their input for the backward: the same bits, BatchNorm's statistics moved once."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from repvgg.learn.module import recompute_blocks
from repvgg.learn.plan import classification_loss, step_memory
from repvgg.model import RepVGG, to_deploy
from repvgg.model.fused import unfused
from support.networks import ABLATIONS, randomize, tiny


def step(net: RepVGG, x: Tensor) -> list[Tensor]:
    """Everything that a training step leaves behind."""
    logits = net.train()(x)
    logits.square().sum().backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [logits, *gradients, *net.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("layers", [nullcontext, unfused], ids=["fused", "layer by layer"])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("options", [{}, {"block_norm": True, "squeeze_excite": True}], ids=["bare", "norm and se"])
def test_a_step_leaves_the_same_bits(
    ablation: str, options: dict[str, bool], layers: type[AbstractContextManager[None]]
) -> None:
    net = randomize(RepVGG((1, 2, 2, 1), 0.25, 0.0625, ABLATIONS[ablation], num_classes=7, **options))
    net.to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    recompute_blocks(other, True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    with layers():
        for a, b in zip(step(net, x), step(other, x), strict=True):
            assert torch.equal(a, b)
    assert all(norm.num_batches_tracked == 1 for norm in other.modules() if isinstance(norm, nn.BatchNorm2d))
    assert all(norm.momentum == 0.1 for norm in other.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_converted_network_recomputes_nothing_and_an_evaluated_one_neither() -> None:
    net = randomize(tiny())
    recompute_blocks(net, True)
    x = torch.randn(2, 3, 64, 64)
    assert "Checkpoint" not in str(net.eval()(x).grad_fn)
    assert torch.allclose(to_deploy(net)(x), net(x), atol=1e-4)


def test_it_takes_less_memory() -> None:
    memory = [
        step_memory(
            lambda: RepVGG((4, 8, 8, 1), 0.25, 0.0625, ABLATIONS["full"], num_classes=7),
            lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            classification_loss(7),
            (8, 3, 64, 64),
            recompute=recompute,
            on_gpu=False,
        )
        for recompute in (False, True)
    ]
    assert memory[1].activations < 0.5 * memory[0].activations
    assert memory[1].peak < 0.8 * memory[0].peak
    assert memory[1].parameters == memory[0].parameters
