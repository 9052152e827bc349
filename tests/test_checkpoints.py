"""What a checkpoint file is found to be: from its run, from what it says, from its tensors."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from repvgg import checkpoints
from repvgg.checkpoints import fitting_choices, load_network, metadata_of, settle
from repvgg.cli import ROOT, options, prepare_environment
from repvgg.model import load_weights, read_weights, to_deploy, write_weights
from repvgg.model.tensorfile import RUN
from support import official
from support.networks import randomize
from support.paper import VARIANTS

#: A width and depths that no variant has; every design exists there.
NARROW = ["net.depths=[2,2,2,1]", "net.width_a=0.25", "net.width_b=0.125", "net.num_classes=7"]
#: Of these the deploy form is no plain stack of convolutions.
UNLIKE = {"relu_branch", "residual_reorg"}
#: A bare identity has no tensors, so both have the same.
ALIKE = {"1x1": "id_no_bn", "id_no_bn": "1x1"}
#: One of every depth, and what only groups or widths tell apart; the others are slow by their number alone.
QUICK = {"a1", "b0", "b3g2", "d2se"}


@pytest.fixture(autouse=True)
def conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra as it is inside of an entry point."""
    monkeypatch.setenv("PROJECT_ROOT", os.environ.get("PROJECT_ROOT", ""))
    monkeypatch.delenv("PROJECT_ROOT")
    prepare_environment()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def network(model: str, ablation: str, *typed: str) -> nn.Module:
    return instantiate(compose("train", overrides=[f"model={model}", f"ablation={ablation}", *typed]).net)


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def small(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One stored number per tensor, seen at its full shape."""
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("group", ["model", "ablation"])
def test_the_quick_config_is_the_composed_one(group: str) -> None:
    for option in options(group):
        model, ablation = (option, "full") if group == "model" else ("repvgg_b0", option)
        typed = ["net.width_a=0.5", "block.norm=true", "net.strides=[1,2,2,2,2]"]
        composed = compose("train", overrides=[f"model={model}", f"ablation={ablation}", "data=imagenet", *typed])
        quick = checkpoints._config(model, ablation, [*typed, "net.num_classes=1000"])
        assert quick.net == composed.net, option
        assert quick.block == composed.block, option


def cases() -> Iterator[object]:
    """Every design in both forms; most deploy forms are of one kind, and slow by their number alone."""
    for ablation in options("ablation"):
        yield ablation, "train"
        usual = ablation not in {*UNLIKE, "full", "post_bn"}
        yield pytest.param(ablation, "deploy", marks=[pytest.mark.slow] if usual else [])


@pytest.mark.parametrize(("ablation", "form"), list(cases()))
def test_every_design_is_found_by_its_tensors_and_computes_the_same(ablation: str, form: str, tmp_path: Path) -> None:
    net = randomize(network("repvgg_a0", ablation, *NARROW).double()).eval()
    written = to_deploy(net) if form == "deploy" else net
    path = tmp_path / "weights.safetensors"
    write_weights(written, path, metadata={})
    typed = [*NARROW, "model=repvgg_a0"]
    if form == "train" and ablation in ALIKE:
        with pytest.raises(ValueError, match=r"fits ablation=(1x1|id_no_bn) and ablation=(1x1|id_no_bn) alike"):
            settle("train", path, typed)
        typed.append(f"ablation={ablation}")
    found = load_network("train", path, typed)
    expected = ablation if form == "train" or ablation in UNLIKE else "full"
    assert found.settled.choices["ablation"] == expected
    assert ("ablation" in found.settled.known) == (form == "train" or ablation in UNLIKE)
    assert ("any ablation" in found.settled.origin or "does not say" in found.settled.origin) == (
        "ablation" not in found.settled.known
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found.net(x), written(x), rtol=1e-10, atol=1e-12)
    assert found.form == form
    assert not found.net.training
    if (ablation, form) == ("full", "train"):
        deployed = load_network("train", path, typed, form="deploy", precision=torch.float32)
        assert deployed.form == "deploy"
        assert {p.dtype for p in deployed.net.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[] if v in QUICK else pytest.mark.slow) for v in VARIANTS])
def test_every_variant_is_found_at_its_real_size(variant: str, tmp_path: Path) -> None:
    v = VARIANTS[variant]
    for deploy in (False, True):
        with torch.device("meta"):
            state = official.RepVGG(v.depths, v.a, v.b, groups=v.groups, se=v.se, deploy=deploy).state_dict()
        weights = read_weights(saved(small(state), tmp_path / "weights.pth"))
        assert checkpoints._matches(weights, []) == [(f"repvgg_{variant}", "full")]


@pytest.mark.parametrize("ablation", ["dirac", "relu_branch", "residual_reorg", "orepa"])
def test_the_error_of_another_ablation_names_the_right_one(ablation: str, tmp_path: Path) -> None:
    for form in ("train", "deploy"):
        if form == "deploy" and ablation not in UNLIKE:
            continue
        with torch.device("meta"):
            net, other = network("repvgg_a0", ablation), network("repvgg_a0", "full")
        if form == "deploy":
            net, other = to_deploy(net), to_deploy(other)
        weights = read_weights(saved(small(net.state_dict()), tmp_path / f"{form}.pth"))
        with (
            pytest.raises(ValueError, match=rf"This file fits model=repvgg_a0 ablation={ablation}$"),
            fitting_choices(weights, "full"),
        ):
            load_weights(other, weights)


def test_what_a_file_says_of_itself_is_found_again(tmp_path: Path) -> None:
    """Also what was set in the run, and a stride that no tensor shows."""
    typed = ["model=repvgg_a0", "ablation=id_no_bn", "data=digits", "net.strides=[1,2,2,2,2]", *NARROW[:3]]
    net = network(typed[0].partition("=")[2], "id_no_bn", *typed)
    path = tmp_path / "weights.safetensors"
    write_weights(net, path, metadata={})
    settled = settle("train", path, typed)
    assert settled.origin == ""
    metadata = metadata_of(settled)
    assert json.loads(metadata["net"]) == {
        "depths": [2, 2, 2, 1],
        "width_a": 0.25,
        "width_b": 0.125,
        "strides": [1, 2, 2, 2, 2],
    }
    write_weights(net, path, metadata=metadata)
    again = settle("train", path, [])
    assert again.origin.startswith("As the file says: model=repvgg_a0 ablation=id_no_bn data=digits net.depths=[2, 2")
    assert again.cfg.net == settled.cfg.net
    assert again.known == {"model": "repvgg_a0", "ablation": "id_no_bn", "data": "digits"}
    assert settle("train", path, ["data=imagenet"]).choices["data"] == "imagenet"
    assert load_network("train", path, ["data=imagenet"]).settled.cfg.net.num_classes == 10


def test_what_a_file_says_runs_nothing_and_is_not_believed_against_its_tensors(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = small(official.RepVGG((2, 4, 14, 1), 0.75, 2.5).state_dict())
    for said in (
        {"model": "repvgg_b0", "ablation": "full"},
        {"model": "repvgg_a0", "ablation": "../data/digits"},
        {"model": "repvgg_a0,repvgg_a1", "ablation": "full"},
        {"model": "repvgg_a0", "ablation": "full", "net": '{"_target_": "os.system", "width_a": "${oc.env:HOME}"}'},
        {"model": "repvgg_a0", "ablation": "full", "net": '{"depths": [{"_target_": "os.abort"}], "groups": true}'},
        {"net": "[1]"},
        {"net": "no JSON"},
    ):
        path = saved({"state_dict": state, "metadata": said}, tmp_path / "weights.pth")
        settled = settle("train", path, [])
        assert (settled.choices["model"], settled.choices["ablation"]) == ("repvgg_a0", "full")
        assert settled.cfg.net._target_ == "repvgg.model.RepVGG"
        assert settled.cfg.net.width_a == 0.75


def test_a_training_s_checkpoint_says_its_choices_wherever_it_lies(tmp_path: Path) -> None:
    net = network("repvgg_a0", "id_no_bn")
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"net.{key}": tensor for key, tensor in small(net.state_dict()).items()},
        RUN: {"choices": {"model": "repvgg_a0", "ablation": "id_no_bn", "data": "digits", "logger": "csv"}},
    }
    settled = settle("train", saved(content, tmp_path / "best.ckpt"), [])
    assert settled.origin == "As the file says: model=repvgg_a0 ablation=id_no_bn data=digits"


def test_what_no_choice_fits_is_compared_with_the_nearest(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = small(official.RepVGG((4, 6, 16, 1), 2, 4, groups=4).state_dict())
    lost = dict(state)
    del lost["stage2.3.rbr_1x1.conv.weight"]
    with pytest.raises(ValueError, match=r"1 tensors are missing \(stage2\.3\.rbr_1x1\.conv\.weight\)") as caught:
        settle("train", saved(lost, tmp_path / "lost.pth"), [])
    assert "the nearest, model=repvgg_b1g4 ablation=full" in str(caught.value)
    more = {**state, "stage1.0.rbr_identity.bias": torch.zeros(128)}
    with pytest.raises(ValueError, match=r"1 tensors are too many \(stage1\.0\.rbr_identity\.bias\)"):
        settle("train", saved(more, tmp_path / "more.pth"), [])
    with pytest.raises(ValueError, match=r"(?s)another shape.*model=repvgg_b0 ablation=full"):
        settle("train", saved(state, tmp_path / "whole.pth"), ["model=repvgg_b0"])


def test_forms_and_heads(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = small(official.RepVGG((2, 4, 14, 1), 0.75, 2.5, deploy=True, num_classes=5).state_dict())
    path = saved(state, tmp_path / "deploy.pth")
    assert load_network("train", path, []).settled.cfg.net.num_classes == 5
    with pytest.raises(ValueError, match=r"is a deploy form \(official naming\).*form=train needs the file"):
        load_network("train", path, [], form="train")
    with pytest.raises(ValueError, match="classifier of 5 classes, the model one of 6"):
        load_network("train", path, ["net.num_classes=6"])
    headless = saved({k: t for k, t in state.items() if not k.startswith("linear")}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"has no classifier.*init_from="):
        load_network("train", headless, [])


def test_weights_chooses_between_raw_and_averaged(tmp_path: Path) -> None:
    state = small(official.RepVGG((2, 4, 14, 1), 0.75, 2.5, deploy=True, num_classes=5).state_dict())
    averaged = {key: tensor + 1 for key, tensor in state.items()}
    path = saved({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "both.pth")
    for typed, value in (([], 1.0), (["weights=null"], 1.0), (["weights=ema"], 1.0), (["weights=raw"], 0.0)):
        network = load_network("convert", path, typed)
        assert network.net.head.bias.max() == value, typed
        assert network.weights.name == ("state_dict_ema" if value else "state_dict")
    with pytest.raises(ValueError, match=r"weights=best: .* holds state_dict and state_dict_ema"):
        load_network("export", path, ["weights=best"])


def test_a_run_whose_choices_are_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text(
        "hydra: {runtime: {choices: {model: repvgg_z9, ablation: full, data: digits}}, overrides: {task: []}}"
    )
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        ValueError, match=r"(?s)are no longer there \(model=repvgg_z9 .*Choose model=, ablation= and data="
    ):
        settle("train", tmp_path / "checkpoints" / "best.ckpt", [])
