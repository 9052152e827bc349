"""Another implementation as a user would name it: the authors' style of network, for `--against support.peer:build`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from support.official import Block, RepVGG
from support.paper import VARIANTS


def build(model: str) -> RepVGG:
    variant = VARIANTS[model.removeprefix("repvgg_")]
    return RepVGG(variant.depths, variant.a, variant.b, groups=variant.groups, se=variant.se)


def deploy(net: nn.Module) -> nn.Module:
    """The paper's section 3.3, in float64, one convolution after the other."""
    deployed = copy.deepcopy(net).eval()
    for block in deployed.modules():
        if isinstance(block, Block):
            kernel, bias = folded(block)
            conv = block.rbr_dense.conv
            options = {"stride": conv.stride, "padding": 1, "groups": conv.groups}
            block.rbr_reparam = nn.Conv2d(conv.in_channels, conv.out_channels, 3, **options)
            block.rbr_reparam.weight = nn.Parameter(kernel.float())
            block.rbr_reparam.bias = nn.Parameter(bias.float())
            del block.rbr_dense, block.rbr_1x1, block.rbr_identity
            block.deploy = True
    return deployed


@torch.no_grad()
def folded(block: Block) -> tuple[Tensor, Tensor]:
    kernel = torch.zeros_like(block.rbr_dense.conv.weight, dtype=torch.float64)
    bias = torch.zeros(len(kernel), dtype=torch.float64)
    one = torch.zeros_like(kernel)
    for channel in range(len(kernel)):
        one[channel, channel % kernel.shape[1], 1, 1] = 1
    point = nn.functional.pad(block.rbr_1x1.conv.weight.double(), [1, 1, 1, 1])
    parts = [(block.rbr_dense.conv.weight.double(), block.rbr_dense.bn), (point, block.rbr_1x1.bn)]
    parts += [(one, block.rbr_identity)] if block.rbr_identity is not None else []
    for weight, bn in parts:
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        kernel += weight * scale[:, None, None, None]
        bias += bn.bias.double() - bn.running_mean.double() * scale
    return kernel, bias


def wrong(net: nn.Module) -> nn.Module:
    """A deploy form that is another function."""
    deployed = deploy(net)
    with torch.no_grad():
        deployed.linear.weight.mul_(2)
    return deployed


def in_place(net: nn.Module) -> nn.Module:
    return net


def small(model: str) -> RepVGG:
    """Whatever the variant: a network that costs a test nothing."""
    if model.removeprefix("repvgg_") not in VARIANTS:
        raise KeyError(model)
    return RepVGG((1, 2, 1, 1), 0.125, 0.125, num_classes=10)


def with_its_own(model: str) -> RepVGG:
    return small(model)


with_its_own.deploy = deploy


def no_module(model: str) -> str:
    return model


def talkative(model: str) -> RepVGG:
    print("a peer that prints")
    return small(model)


not_callable = 1
