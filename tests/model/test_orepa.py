"""OREPA: the one kernel is the sum of six branches that are computed one after another on the image."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg.learn.optim import parameter_groups
from repvgg.model import Block, ConvShape, Orepa, equivalence, to_deploy
from repvgg.model.orepa import frequency_prior
from support.networks import randomize


def randomized(shape: ConvShape, kernel_size: int = 3) -> Orepa:
    torch.manual_seed(0)
    branch = Orepa(shape, kernel_size).double()
    with torch.no_grad():
        branch.scale.normal_()
        branch.first.weight.normal_()
    return branch


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize(
    "shape",
    [ConvShape(8, 12, 2), ConvShape(8, 8), ConvShape(8, 12, 2, 2), ConvShape(8, 8, 1, 4), ConvShape(4, 6, 1, 2, 2)],
    ids=str,
)
def test_it_is_its_six_branches_one_by_one(shape: ConvShape, kernel_size: int) -> None:
    branch = randomized(shape, kernel_size)
    k, g, stride, dilation = kernel_size, shape.groups, shape.stride, shape.dilation
    x = torch.randn(2, shape.in_channels, 9, 12, dtype=torch.float64)
    wide = F.pad(x, (dilation * (k // 2),) * 4)  # 1×1 maps without a bias keep the border of zeros
    per_channel = torch.ones(shape.out_channels, 1, k, k, dtype=torch.float64) / k**2

    def each(y: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return F.conv2d(y, kernel, None, stride, 0, dilation, shape.out_channels)

    with torch.no_grad():
        inner = wide + F.conv2d(wide, branch.first.weight, groups=g)
        separable = F.conv2d(wide, branch.depthwise.weight, None, stride, 0, dilation, shape.in_channels)
        outputs = [
            F.conv2d(wide, branch.conv.weight, None, stride, 0, dilation, g),
            each(F.conv2d(wide, branch.average.weight, groups=g), per_channel),
            each(F.conv2d(wide, branch.prior.weight, groups=g), branch.frequencies[:, None]),
            F.conv2d(inner, branch.second.weight, None, stride, 0, dilation, g),
            F.conv2d(x[:, :, ::stride, ::stride], branch.point.weight, groups=g),
            F.conv2d(separable, branch.pointwise.weight, groups=g),
        ]
        expected = sum(s[:, None, None] * y for s, y in zip(branch.scale, outputs, strict=True))
        torch.testing.assert_close(branch(x), expected, rtol=0, atol=1e-10)
    block = randomize(Block(shape, [lambda shape: randomized(shape, kernel_size)], norm=True).double())
    assert equivalence(block, to_deploy(block), x).rel_l2 < 1e-12


def test_it_starts_as_the_authors_do() -> None:
    branch = Orepa(ConvShape(16, 32))
    assert branch.scale.tolist() == [[value] * 32 for value in (0.25, 0.25, 0, 0.5, 1, 0.5)]
    assert not branch.first.weight.any()  # so that, with the identity, the first 1×1 changes nothing
    for conv in (branch.conv, branch.second, branch.average, branch.point, branch.depthwise, branch.pointwise):
        bound = math.sqrt(6 / conv.weight[0].numel())  # √2 · √3 / √fan-in
        assert 0.8 * bound < conv.weight.abs().max() <= bound
    with pytest.raises(ValueError, match="kernel_size=4 is not odd"):
        Orepa(ConvShape(2, 2), 4)


@pytest.mark.parametrize("channels", [6, 7])
def test_the_prior_is_cosines_of_rising_frequency(channels: int) -> None:
    expected = torch.empty(channels, 3, 3)
    for c in range(channels):
        for row in range(3):
            for column in range(3):
                down = c < channels / 2
                place, frequency = (row, c + 1) if down else (column, c + 1 - channels / 2)
                expected[c, row, column] = math.cos(math.pi * (place + 0.5) * frequency / 3)
    torch.testing.assert_close(frequency_prior(channels, 3), expected)


def test_kernels_are_decayed_and_scales_are_not() -> None:
    block = Block(ConvShape(4, 4), [Orepa], norm=True)
    kernels, rest = parameter_groups(block, 1e-4)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in kernels["params"]} == {id(conv.weight) for conv in convs}
    assert {id(p) for p in rest["params"]} == {id(p) for p in (block.branches[0].scale, *block.norm.parameters())}
