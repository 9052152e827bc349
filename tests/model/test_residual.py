"""Residual Reorg (Table 7): pairs of layers with ResNet's shortcuts, in both forms."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.learn.health import layer_rows
from repvgg.model import (
    Block,
    ConvShape,
    RepVGG,
    ResidualStage,
    WeightsMismatchError,
    count_macs,
    count_shortcuts,
    equivalence,
    load_weights,
    not_fused,
    read_weights,
    to_deploy,
)
from repvgg.model.weights import distance
from support.networks import K3, randomize
from support.paper import VARIANTS

RESIDUAL = {"branches": [K3], "stage": ResidualStage}


def conv_bn(x: Tensor, block: Block) -> Tensor:
    """In eval mode, by torch's own functions."""
    (branch,) = block.branches
    stride, padding = block.shape.stride, branch.conv.kernel_size[0] // 2
    y = F.conv2d(x, branch.conv.weight, None, stride, padding, 1, block.shape.groups)
    bn = branch.bn
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("channels", "stride"), [(6, 2), (8, 2), (8, 1)])
def test_a_stage_is_resnets_basic_blocks(channels: int, stride: int, groups: int) -> None:
    shapes = [ConvShape(channels, 8, stride, groups), *[ConvShape(8, 8, groups=g) for g in (1, groups, 1)]]
    stage = ResidualStage([Block(shape, [K3]) for shape in shapes])
    stage = randomize(stage.double()).eval()
    layers = [stage.get_submodule(str(i)) for i in range(4)]
    x = torch.randn(2, channels, 7, 10, dtype=torch.float64)
    with torch.no_grad():
        shortcut = x if (channels, stride) == (8, 1) else conv_bn(x, stage.shortcut)
        y = (conv_bn(conv_bn(x, layers[0]).relu(), layers[1]) + shortcut).relu()
        y = (conv_bn(conv_bn(y, layers[2]).relu(), layers[3]) + y).relu()
        for form in (stage, to_deploy(stage)):
            torch.testing.assert_close(form(x), y, rtol=0, atol=1e-12)
    deployed = to_deploy(stage)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert not_fused(deployed) == []
    assert count_shortcuts(stage) == count_shortcuts(deployed) == 2
    if isinstance(stage.shortcut, Block):
        assert stage.shortcut.shape == ConvShape(channels, 8, stride)  # dense in grouped variants, too


def test_a_stage_of_one_layer_is_that_layer_and_an_odd_one_is_refused() -> None:
    block = randomize(Block(ConvShape(4, 6, stride=2), [K3]))
    stage = ResidualStage([block])
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(stage.eval()(x), block(x))
    assert (block(x) >= 0).all()
    assert count_shortcuts(stage) == 0
    with pytest.raises(ValueError, match=r"depths=\[1, 2, 3, 1\]: stage 3: 3 layers cannot be paired"):
        RepVGG((1, 2, 3, 1), 0.125, 0.0625, **RESIDUAL)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_shortcut_for_two_layers(name: str) -> None:
    v = VARIANTS[name]
    with torch.device("meta"):
        net, plain = (
            RepVGG(v.depths, v.a, v.b, [K3], groups=v.groups, squeeze_excite=v.se, stage=stage)
            for stage in (ResidualStage, None)
        )
    expected = {"a": 1 + 2 + 7, "b": 2 + 3 + 8, "d": 4 + 7 + 12}
    assert count_shortcuts(net) == expected[name[0]]
    # 1×1 projections onto 56², 28² and 14² pixels are all that is added to the plain network.
    widths = [min(64, int(64 * v.a)), *(int(c * v.a) for c in (64, 128, 256))]
    projections = sum(i * o * side**2 for i, o, side in zip(widths[:-1], widths[1:], (56, 28, 14), strict=True))
    image = (3, 224, 224)
    assert count_macs(to_deploy(net), image) == count_macs(to_deploy(plain), image) + projections


def test_a_whole_network_converts_with_squeeze_excite_and_groups() -> None:
    net = RepVGG((2, 4, 2, 1), 0.25, 0.125, num_classes=7, groups=2, squeeze_excite=True, **RESIDUAL)
    assert equivalence(randomize(net.double()), to_deploy(net), torch.randn(2, 3, 64, 64)).rel_l2 < 1e-12


def test_checkpoints_of_both_forms_are_read_and_a_plain_one_is_told_apart(tmp_path) -> None:
    make = partial(RepVGG, (1, 2, 4, 1), 0.125, 0.0625, num_classes=5)
    net, other, plain = randomize(make(**RESIDUAL)), make(**RESIDUAL), make([K3])
    for form, empty in ((net, other), (to_deploy(net), to_deploy(other))):
        torch.save(form.state_dict(), tmp_path / "net.pt")
        weights = read_weights(tmp_path / "net.pt")
        load_weights(empty, weights)
        assert all(torch.equal(tensor, empty.state_dict()[key]) for key, tensor in form.state_dict().items())
    assert distance(to_deploy(plain), weights) == (4, 0)  # two projections more, and else the same shapes
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(WeightsMismatchError, match=r"1\+1\+2\+4\+1 layers of .*; shortcuts"):
        load_weights(plain, read_weights(tmp_path / "net.pt"))
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(WeightsMismatchError, match=r"missing \(stages\.1\.shortcut\.branches"):
        load_weights(net, read_weights(tmp_path / "plain.pt"))


def test_the_projection_is_a_layer_of_its_stage_in_the_diagnosis() -> None:
    net = RepVGG((1, 2, 2, 1), 0.125, 0.0625, **RESIDUAL)
    rows = [row for row in layer_rows(net, 0, 0, {}) if row["branch"] != "fused"]
    assert [(row["layer"], row["stage"], row["branch"]) for row in rows if "shortcut" in row["layer"]] == [
        (f"stages.{i}.shortcut", f"stage{i + 1}", "conv1x1") for i in (1, 2)
    ]
    assert all(row["share"] == pytest.approx(1, abs=1e-5) for row in rows)
