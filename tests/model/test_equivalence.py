"""Deploy form equals train form: in float64 to 1e-10, for every shape that a block can have."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.model import Block, ConvShape, RepVGG, equivalence, relative, to_deploy
from support.networks import ABLATIONS, ID, K1, K3, randomize, tiny


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


SHAPES = [
    ConvShape(channels, out, stride, groups, dilation)
    for (channels, out), stride, groups, dilation in itertools.product([(8, 8), (8, 12)], [1, 2], [1, 2, 4], [1, 2])
]


@pytest.mark.parametrize("se_hidden", [0, 3])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_block_equals_its_fused_form(ablation: str, se_hidden: int) -> None:
    for shape, norm in itertools.product(SHAPES, [False, True]):
        block = randomize(Block(shape, ABLATIONS[ablation], norm=norm, se_hidden=se_hidden).double()).eval()
        x = torch.randn(2, 8, 7, 10, dtype=torch.float64)  # not square
        with torch.no_grad():
            assert apart(to_deploy(block)(x), block(x)) < 1e-10, shape


def oracle(block: Block, x: Tensor) -> Tensor:
    """The train form written out a second time from the paper's equations, without the module's own code."""

    def norm(y: Tensor, bn: torch.nn.BatchNorm2d) -> Tensor:
        mean, var, gamma, beta = (v[None, :, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return (y - mean) / torch.sqrt(var + bn.eps) * gamma + beta

    s = block.shape
    k3, k1, *rest = block.branches
    total = norm(F.conv2d(x, k3.conv.weight, None, s.stride, s.dilation, s.dilation, s.groups), k3.bn)
    total = total + norm(F.conv2d(x, k1.conv.weight, None, s.stride, 0, 1, s.groups), k1.bn)
    for identity in rest:
        total = total + norm(x, identity.bn)
    return total.clamp(min=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_equal_an_independent_oracle(shape: ConvShape) -> None:
    block = randomize(Block(shape, [K3, K1, ID]).double()).eval()
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    with torch.no_grad():
        assert apart(block(x), oracle(block, x)) < 1e-10
        assert apart(to_deploy(block)(x), oracle(block, x)) < 1e-10


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_fused_kernel_is_the_impulse_response(ablation: str, groups: int) -> None:
    """A unit impulse in input channel i reads column i of the kernel, mirrored; a zero image reads the bias."""
    channels = 4
    block = randomize(Block(ConvShape(channels, channels, groups=groups), ABLATIONS[ablation]).double()).eval()
    block.activation = torch.nn.Identity()
    fused = to_deploy(block)
    with torch.no_grad():
        bias = block(torch.zeros(1, channels, 5, 5, dtype=torch.float64))[0, :, 2, 2]
        torch.testing.assert_close(fused.conv.bias, bias, rtol=1e-10, atol=1e-12)
        for i in range(channels):
            impulse = torch.zeros(1, channels, 5, 5, dtype=torch.float64)
            impulse[0, i, 2, 2] = 1
            response = (block(impulse)[0] - bias[:, None, None])[:, 1:4, 1:4].flip(1, 2)
            per_group = channels // groups
            members = slice(i // per_group * per_group, (i // per_group + 1) * per_group)
            expected = torch.zeros_like(response)
            expected[members] = fused.conv.weight[members, i % per_group]
            torch.testing.assert_close(response, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"squeeze_excite": True}, {"groups": 2}, {"strides": (1, 1, 2, 2, 2)}])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_network_equals_its_deploy_form(ablation: str, options: dict) -> None:
    widths = {"width_a": 0.25, "width_b": 0.0625} if "squeeze_excite" in options else {}
    model = randomize(tiny(ablation, **options) if not widths else wider(ablation, **options))
    proof = equivalence(model, to_deploy(model.double()), torch.randn(4, 3, 40, 56))
    assert proof.rel_l2 < 1e-10
    assert proof.top1_agreement == 1.0


def wider(ablation: str, **options) -> RepVGG:
    return RepVGG((1, 2, 2, 1), 0.5, 0.125, ABLATIONS[ablation], num_classes=7, **options)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_after_optimiser_steps(ablation: str) -> None:
    torch.manual_seed(3)
    model = tiny(ablation).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(7, (8,))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    proof = equivalence(model, to_deploy(model), torch.randn(8, 3, 32, 32))
    assert proof.rel_l2 < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_fold_in_float64_and_are_cast_last(dtype: torch.dtype) -> None:
    block = randomize(Block(ConvShape(8, 8), [K3, K1, ID])).to(dtype)
    fused = to_deploy(block)
    exact = block.double().affine()
    assert fused.conv.weight.dtype is dtype
    assert torch.equal(fused.conv.weight, exact.kernel.to(dtype))
    assert torch.equal(fused.conv.bias, exact.bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beside_logits_of_zero_nothing_is_no_difference(dtype: torch.dtype) -> None:
    model = randomize(tiny())
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    images, deployed = torch.randn(2, 3, 32, 32), to_deploy(model)
    assert equivalence(model, deployed, images, dtype=dtype).rel_l2 == 0
    torch.nn.init.ones_(deployed.head.bias)
    assert equivalence(model, deployed, images, dtype=dtype).rel_l2 == float("inf")
    assert relative(torch.tensor(0.0), torch.tensor(2.0)) == 0
    for nonfinite in ((float("nan"), 0.0), (0.0, float("nan")), (float("inf"), float("inf")), (float("inf"), 0.0)):
        assert not relative(*map(torch.tensor, nonfinite)).isfinite()


def test_a_fold_that_overflows_half_precision_is_a_difference_that_is_not_finite() -> None:
    model = randomize(tiny())
    with torch.no_grad():
        model.stem.branches[0].bn.weight.fill_(1e5)  # above the 65504 of float16
    model.half()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    found = equivalence(model, to_deploy(model), torch.randn(2, 3, 32, 32), dtype=torch.float32)
    assert not found.rel_l2 <= 1e-3
