"""Every block design of conf/ablation: both forms are one function, and new kinds of branches are what they say."""

import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from repvgg.cli import ROOT
from repvgg.learn.health import diagnose, kinds
from repvgg.learn.module import Classifier
from repvgg.learn.optim import parameter_groups
from repvgg.learn.run import describe, introduction
from repvgg.model import (
    Activated,
    Block,
    ConvBN,
    ConvShape,
    Dirac,
    Identity,
    NotAffineError,
    PointwiseAverage,
    PointwiseConv,
    RepVGG,
    count_parameters,
    equivalence,
    load_weights,
    read_weights,
    to_deploy,
)
from support.networks import randomize

DESIGNS = sorted(file.stem for file in (ROOT / "conf" / "ablation").glob("*.yaml"))
#: A later stage's first block, one that keeps its shape, a strided one of equal channels; each also grouped.
SHAPES = [
    ConvShape(8, out, stride, groups) for (out, stride), groups in itertools.product([(12, 2), (8, 1), (8, 2)], [1, 2])
]


@cache
def design(name: str) -> dict:
    return instantiate(yaml.safe_load((ROOT / "conf" / "ablation" / f"{name}.yaml").read_text()), _convert_="all")


def net_of(name: str, depths: tuple[int, ...] = (1, 2, 2, 1), **options: Any) -> RepVGG:
    node = design(name)
    return RepVGG(depths, 0.125, 0.0625, node["branches"], block_norm=node["norm"], stage=node.get("stage"), **options)


def block_of(name: str, shape: ConvShape) -> Block:
    torch.manual_seed(0)
    return Block(shape, design(name)["branches"], norm=design(name)["norm"]).double()


def batch_norm(y: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """In eval mode, written out (equation 2)."""
    mean, var, gamma, beta = (v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (y - mean) / torch.sqrt(var + bn.eps) * gamma + beta


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-10 * b.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DESIGNS)
def test_the_deploy_form_is_the_function_that_was_trained(name: str, shape: ConvShape) -> None:
    block = randomize(block_of(name, shape)).train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        block(torch.randn(4, shape.in_channels, 7, 10, dtype=torch.float64)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        optimizer.step()
    x = torch.randn(2, shape.in_channels, 7, 10, dtype=torch.float64)
    block.activation = nn.Identity()  # which would hide what is negative
    assert equivalence(block, to_deploy(block), x).rel_l2 < 1e-10


@pytest.mark.parametrize("name", DESIGNS)
def test_a_network_trains_converts_and_is_diagnosed(name: str) -> None:
    torch.manual_seed(0)
    net = net_of(name, num_classes=5, groups=2)
    net.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    F.cross_entropy(net(images), torch.arange(4)).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert equivalence(net, to_deploy(net), images, dtype=torch.float32).rel_l2 < 1e-4
    block = net.stages[1].get_submodule("1")
    found = diagnose(block)
    shares = [float(found[kind]["share"]) for kind in kinds(block) if "share" in found[kind]]
    assert not shares or sum(shares) == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", DESIGNS)
def test_the_train_form_is_traced_in_eval_mode(name: str, gradients: bool) -> None:
    """By torch.jit.trace, which traces twice and compares the graphs, and by torch.fx."""
    block = randomize(block_of(name, ConvShape(8, 8))).eval()
    x, another = (torch.randn(size, dtype=torch.float64) for size in ((2, 8, 7, 10), (3, 8, 9, 5)))
    with torch.set_grad_enabled(gradients):
        traced = [torch.jit.trace(block, x), torch.fx.symbolic_trace(block)]
    for images in (x, another):
        wanted = block(images)
        for graph in traced:
            with torch.set_grad_enabled(not gradients):
                assert close(graph(images), wanted)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_checkpoint_of_every_design_is_read_back(name: str, tmp_path: Path) -> None:
    net, other = randomize(net_of(name)), net_of(name)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    load_weights(other, read_weights(tmp_path / "net.pt"))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["dirac", "relu_branch", "dbb", "orepa"])
def test_new_branches_train_in_bfloat16(name: str) -> None:
    block = block_of(name, ConvShape(8, 8)).float()
    x = torch.randn(2, 8, 7, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    block.eval()
    with torch.no_grad():
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (block(x) - exact).norm() < 0.02 * exact.norm()


def test_acb_sums_a_square_a_row_and_a_column() -> None:
    block = randomize(block_of("acb", ConvShape(8, 12, stride=2, groups=2))).eval()
    assert list(kinds(block)) == ["conv3x3", "conv1x3", "conv3x1"]
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    total = torch.zeros(2, 12, 4, 5, dtype=torch.float64)
    for branch, (rows, columns) in zip(block.branches, [(1, 1), (0, 1), (1, 0)], strict=True):
        padded = F.pad(x, (columns, columns, rows, rows))
        total = total + batch_norm(F.conv2d(padded, branch.conv.weight, stride=2, groups=2), branch.bn)
    with torch.no_grad():
        assert close(block(x), total.relu())
        assert close(to_deploy(block)(x), total.relu())
    assert count_parameters(to_deploy(block)) == 9 * 4 * 12 + 12
    with pytest.raises(ValueError, match=r"kernel_size=\(1, 4\) is not odd"):
        ConvBN(ConvShape(2, 2), kernel_size=(1, 4))


@pytest.mark.parametrize("groups", [1, 2])
def test_trivial_is_one_convolution_of_i_plus_w(groups: int) -> None:
    block = randomize(block_of("trivial", ConvShape(8, 8, groups=groups))).eval()
    kernel = block.branches[0].conv.weight.detach().clone()
    for channel in range(8):
        kernel[channel, channel % (8 // groups), 1, 1] += 1
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = batch_norm(F.conv2d(x, kernel, padding=1, groups=groups), block.norm).relu()
        assert close(block(x), expected)
        assert close(to_deploy(block)(x), expected)
    assert len(block_of("trivial", ConvShape(8, 12, stride=2)).branches) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dirac_is_diag_a_times_i_plus_diag_b_times_normalised_filters(shape: ConvShape) -> None:
    branch = Dirac(shape).double()
    torch.testing.assert_close(branch.b, torch.full_like(branch.b, 0.1), rtol=1e-7, atol=0)
    assert (branch.a is None) == (not shape.keeps_shape)
    assert branch.a is None or (branch.a == 1).all()
    with torch.no_grad():
        branch.b.uniform_(-2, 2)
        if branch.a is not None:
            branch.a.uniform_(-2, 2)
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    kernel = torch.stack([b * w / w.square().sum().sqrt() for b, w in zip(branch.b, branch.conv.weight, strict=True)])
    expected = F.conv2d(x, kernel, None, shape.stride, 1, 1, shape.groups)
    if branch.a is not None:
        expected = expected + branch.a[:, None, None] * x
    affine = branch.affine(torch.float64, x.device)
    assert close(branch(x), expected)
    assert close(F.conv2d(x, affine.kernel, affine.bias, shape.stride, 1, 1, shape.groups), expected)


def test_dirac_is_blind_to_the_length_of_a_filter_and_decays_its_kernel_alone() -> None:
    branch = Dirac(ConvShape(4, 4)).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = branch(x)
    with torch.no_grad():
        branch.conv.weight.mul_(torch.tensor([1e-3, 0.5, 7, 1e4])[:, None, None, None])
    assert close(branch(x), before)
    kernels, rest = parameter_groups(branch, 1e-4)
    assert [p is branch.conv.weight for p in kernels["params"]] == [True]
    assert {id(p) for p in rest["params"]} == {id(branch.a), id(branch.b)}


@pytest.mark.parametrize("stride", [1, 2])
def test_relus_in_the_branches_are_deployed_as_a_convolution_each(stride: int) -> None:
    shape = ConvShape(8, 8, stride, groups=2)
    block = randomize(block_of("relu_branch", shape)).eval()
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    inner = [activated.branch for activated in block.branches]
    expected = batch_norm(F.conv2d(x, inner[0].conv.weight, None, stride, 1, 1, 2), inner[0].bn).relu()
    expected = expected + batch_norm(F.conv2d(x, inner[1].conv.weight, None, stride, 0, 1, 2), inner[1].bn).relu()
    for identity in inner[2:]:
        expected = expected + batch_norm(x, identity.bn).relu()
    deployed = to_deploy(block)
    with torch.no_grad():
        assert close(block(x), expected)
        assert close(deployed(x), expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert count_parameters(deployed) == (9 * 8 * 4 + 8) + (8 * 4 + 8) + (16 if stride == 1 else 0)
    with pytest.raises(NotAffineError, match="Activated says of no affine map"):
        block.affine()
    for target, source in ((block, deployed), (deployed, block)):
        with pytest.raises(ValueError, match="these weights are of a"):
            target.load_state_dict(source.state_dict(), strict=False)


def test_branches_without_a_relu_are_one_convolution_beside_the_others() -> None:
    activated = partial(Activated.where_it_fits, branch=Identity.where_it_fits)
    block = Block(ConvShape(4, 4), [ConvBN, activated, partial(ConvBN, kernel_size=1)], norm=True, se_hidden=2)
    block = randomize(block.double())
    deployed = to_deploy(block)
    assert [part.conv.kernel_size for part in deployed.parts] == [(3, 3), (1, 1)]
    assert equivalence(block, deployed, torch.randn(2, 4, 5, 5)).rel_l2 < 1e-10


def test_what_cannot_become_one_convolution_is_said_before_training() -> None:
    def described(name: str) -> tuple[dict[str, float], str]:
        net = net_of(name)
        metrics = describe(net, (3, 32, 32))
        module = Classifier(net, num_classes=1000, optimizer=torch.optim.SGD, lr=0.1, lr_batch=8, batch_size=8)
        return metrics, introduction("x", metrics, module, 8, 1)

    metrics, line = described("relu_branch")
    assert metrics["deploy/layers_not_fused"] == 7
    assert "7 layers cannot become one convolution" in line
    metrics, line = described("residual_reorg")
    assert metrics["deploy/shortcuts"] == 2
    assert "deploy/layers_not_fused" not in metrics
    assert "its 2 shortcuts stay when deployed" in line
    metrics, line = described("full")
    assert not {"deploy/layers_not_fused", "deploy/shortcuts"} & metrics.keys()
    assert "cannot" not in line


def padded_with(y: Tensor, bias: Tensor) -> Tensor:
    """One pixel more on every side, which holds ``bias``: written as four explicit borders around a copy."""
    n, channels, height, width = y.shape
    framed = bias[None, :, None, None].expand(n, channels, height + 2, width + 2).clone()
    framed[:, :, 1:-1, 1:-1] = y
    return framed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dbb_is_its_four_branches_with_explicit_borders(shape: ConvShape) -> None:
    block = randomize(block_of("dbb", shape)).eval()
    assert list(kinds(block)) == ["conv3x3", "conv1x1", "PointwiseConv", "PointwiseAverage"]
    square, point, sequence, average = block.branches
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    s, g = shape.stride, shape.groups

    def at_the_border(bn: nn.BatchNorm2d) -> Tensor:  # what the BatchNorm makes of zero
        return batch_norm(torch.zeros(bn.num_features, 1, 1, dtype=torch.float64), bn)[:, 0, 0]

    with torch.no_grad():
        sequence.first.conv.weight.normal_()
        expected = batch_norm(F.conv2d(x, square.conv.weight, None, s, 1, 1, g), square.bn)
        expected = expected + batch_norm(F.conv2d(x, point.conv.weight, None, s, 0, 1, g), point.bn)
        inner = batch_norm(F.conv2d(x, sequence.first.conv.weight, groups=g), sequence.first.bn)
        inner = padded_with(inner, at_the_border(sequence.first.bn))
        expected = expected + batch_norm(F.conv2d(inner, sequence.conv.weight, stride=s, groups=g), sequence.bn)
        inner = batch_norm(F.conv2d(x, average.first.conv.weight, groups=g), average.first.bn)
        windows = padded_with(inner, at_the_border(average.first.bn)).unfold(2, 3, s).unfold(3, 3, s)
        expected = expected + batch_norm(windows.mean((-1, -2)), average.bn)
        assert close(block(x), expected.relu())
        assert close(to_deploy(block)(x), expected.relu())
    assert count_parameters(to_deploy(block)) == 9 * 8 // g * shape.out_channels + shape.out_channels


def test_dbb_starts_from_an_identity_and_dilates_where_it_can() -> None:
    sequence = PointwiseConv(ConvShape(6, 8, groups=2))
    x = torch.randn(1, 6, 4, 4)
    assert torch.equal(sequence.first.conv(x), x)
    block = randomize(Block(ConvShape(4, 6, 2, dilation=2), [ConvBN, PointwiseConv]).double())
    assert equivalence(block, to_deploy(block), torch.randn(2, 4, 9, 8)).rel_l2 < 1e-10
    with pytest.raises(ValueError, match="dilation=2"):
        PointwiseAverage(ConvShape(4, 4, dilation=2))
    for kind in (PointwiseConv, PointwiseAverage):
        with pytest.raises(ValueError, match="kernel_size=2 is not odd"):
            kind(ConvShape(4, 4), kernel_size=2)


def test_where_the_batchnorms_are() -> None:
    """Of 3×3, 1×1, identity and the sum."""
    expected = {
        "full": [True, True, True, False],
        "id_no_bn": [True, True, False, False],
        "post_bn": [False, False, False, True],
        "qarepvgg": [True, False, False, True],
    }
    for name, norms in expected.items():
        block = block_of(name, ConvShape(4, 4))
        assert list(kinds(block)) == ["conv3x3", "conv1x1", "identity"]
        assert [isinstance(m, nn.BatchNorm2d) for m in (*(b.bn for b in block.branches), block.norm)] == norms, name
    mobileone = block_of("mobileone", ConvShape(4, 4))
    assert list(kinds(mobileone)) == ["conv3x3", "conv3x3_2", "conv3x3_3", "conv3x3_4", "conv1x1", "identity"]
    assert all(isinstance(branch.bn, nn.BatchNorm2d) for branch in mobileone.branches)
