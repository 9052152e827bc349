"""Parameters and multiply-adds of every variant, as published and counted (paper, Tables 3 to 6)."""

import pytest
import torch

from repvgg.model import RepVGG, count_macs, count_parameters, count_winograd_muls, to_deploy
from support.networks import ABLATIONS
from support.paper import ABLATION_TRAIN_PARAMS, VARIANTS, Variant

IMAGE = (3, 224, 224)


def build(variant: Variant, ablation: str = "full") -> RepVGG:
    with torch.device("meta"):
        return RepVGG(
            variant.depths,
            variant.a,
            variant.b,
            ABLATIONS[ablation],
            groups=variant.groups,
            squeeze_excite=variant.se,
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_equal_the_paper(name: str) -> None:
    variant = VARIANTS[name]
    train = build(variant)
    deploy = to_deploy(train)
    assert count_parameters(train) == variant.train_params
    assert count_parameters(deploy) == variant.deploy_params
    assert round(count_macs(train, IMAGE) / 1e9, 3) == variant.train_gmacs
    assert round(count_macs(deploy, IMAGE) / 1e9, 3) == variant.deploy_gmacs
    # The published Winograd figure of D2se has two decimals, cut rather than rounded.
    assert count_winograd_muls(deploy, IMAGE) / 1e9 == pytest.approx(variant.winograd_g, abs=1e-3)


@pytest.mark.parametrize(("ablation", "parameters"), ABLATION_TRAIN_PARAMS.items())
def test_table_6_counts(ablation: str, parameters: int) -> None:
    train = build(VARIANTS["b0"], ablation)
    assert count_parameters(train) == parameters
    assert count_parameters(to_deploy(train)) == VARIANTS["b0"].deploy_params


def test_b0_has_28_blocks_and_23_identities() -> None:
    blocks = [build(VARIANTS["b0"]).stem, *(b for stage in build(VARIANTS["b0"]).stages for b in stage)]
    assert len(blocks) == 28
    assert sum(len(block.branches) == 3 for block in blocks) == 23


def test_grouped_layers_are_every_second_one_up_to_26() -> None:
    model = build(VARIANTS["b1g4"])
    blocks = [model.stem, *(b for stage in model.stages for b in stage)]
    assert [i for i, block in enumerate(blocks) if block.shape.groups == 4] == list(range(2, 27, 2))
    assert all(branch.conv.groups == 4 for branch in blocks[2].branches[:2])


def test_output_map_is_a_32nd_of_the_input_and_strides_are_configurable() -> None:
    variant = VARIANTS["a0"]
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert build(variant).features(image).shape == (1, 1280, 7, 7)
    with torch.device("meta"):
        small = RepVGG(variant.depths, 0.75, 2.5, ABLATIONS["full"], strides=(1, 1, 2, 2, 2), in_channels=1)
    assert small.features(torch.empty(1, 1, 32, 32, device="meta")).shape == (1, 1280, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2, 3)}, "four numbers"),
        ({"depths": (1, 2, 0, 1)}, "at least 1"),
        ({"strides": (2, 2)}, "five numbers"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"groups": 3}, "layer 2 .*groups=3 does not divide"),
    ],
)
def test_wrong_shapes_are_named(options: dict, message: str) -> None:
    arguments = {"depths": (2, 4, 14, 1), "width_a": 1, "width_b": 1, "branches": ABLATIONS["full"]}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        RepVGG(**{**arguments, **options})
