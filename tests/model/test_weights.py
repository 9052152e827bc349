"""Files of every naming, form and wrapping give the network that they were written from."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from repvgg.model import (
    RepVGG,
    WeightsMismatchError,
    fits,
    initialize,
    load_weights,
    read_weights,
    to_deploy,
)
from repvgg.model.weights import NAMINGS
from support import official
from support.networks import ABLATIONS, randomize
from support.paper import VARIANTS

FOREIGN = ["official", "timm", "mmpretrain"]
SMALL = {"depths": (1, 2, 2, 1), "a": 0.25, "b": 0.125, "num_classes": 7}


def oracle(*, deploy: bool = False, **options) -> official.RepVGG:
    torch.manual_seed(1)
    return randomize(official.RepVGG(**{**SMALL, **options}, deploy=deploy).double()).eval()


def ours(ablation: str = "full", *, deploy: bool = False, groups: int = 1, se: bool = False, num_classes: int = 7):
    options = {"groups": groups, "squeeze_excite": se, "num_classes": num_classes}
    net = RepVGG(SMALL["depths"], SMALL["a"], SMALL["b"], ABLATIONS[ablation], **options).double().eval()
    return to_deploy(net) if deploy else net


def saved(state: object, path: Path, **options) -> Path:
    torch.save(state, path, **options)
    return path


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)


@torch.no_grad()
def assert_same_logits(net: nn.Module, reference: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(net(x), reference(x), rtol=1e-10, atol=1e-12)


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("naming", FOREIGN)
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"se": True}], ids=["plain", "g2", "se"])
def test_computes_what_the_foreign_network_computes(naming: str, deploy: bool, options: dict, tmp_path: Path) -> None:
    reference = oracle(deploy=deploy, **options)
    path = saved(official.renamed(reference.state_dict(), naming), tmp_path / "weights.pth")
    weights = read_weights(path)
    assert (weights.naming, weights.form, weights.num_classes) == (naming, "deploy" if deploy else "train", 7)
    net = ours(deploy=deploy, **options)
    load_weights(net, weights)
    assert_same_logits(net, reference, images())
    if not deploy:
        assert_same_logits(to_deploy(net), reference, images())


@pytest.fixture(scope="module")
def variants() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            name: RepVGG(v.depths, v.a, v.b, ABLATIONS["full"], groups=v.groups, squeeze_excite=v.se)
            for name, v in VARIANTS.items()
        }


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_fits_at_its_real_size_and_no_other(name: str, variants: dict, tmp_path: Path) -> None:
    v = VARIANTS[name]
    for deploy in (False, True):
        with torch.device("meta"):
            state = official.RepVGG(v.depths, v.a, v.b, groups=v.groups, se=v.se, deploy=deploy).state_dict()
        for naming in FOREIGN:
            # One stored number per tensor, seen at its full shape.
            small = {key: torch.zeros(()).expand(t.shape) for key, t in official.renamed(state, naming).items()}
            weights = read_weights(saved(small, tmp_path / "weights.pth"))
            assert fits(to_deploy(variants[name]) if deploy else variants[name], weights)
            assert weights.num_classes == 1000
        if not deploy:
            assert [other for other in VARIANTS if fits(variants[other], weights)] == [name]


def test_a0_at_its_real_size(tmp_path: Path) -> None:
    variant = VARIANTS["a0"]
    reference = randomize(official.RepVGG(variant.depths, variant.a, variant.b)).double().eval()
    net = RepVGG(variant.depths, variant.a, variant.b, ABLATIONS["full"]).double().eval()
    load_weights(net, read_weights(saved(reference.state_dict(), tmp_path / "RepVGG-A0-train.pth")))
    assert_same_logits(net, reference, images())


# --- wrappings --------------------------------------------------------------------------------------------------------


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPINGS = {
    "plain": lambda state: state,
    "ddp": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "under state_dict": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module.")},
    "under model": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "config": None},
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 1,
        "state_dict": prefixed(state, "net.") | {"loss.weight": torch.ones(7)},
        "current_model_state": prefixed({key: torch.zeros_like(t) for key, t in state.items()}, "net."),
    },
    "compiled lightning": lambda state: {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": prefixed(state, "net._orig_mod."),
    },
}


@pytest.mark.parametrize("naming", ["ours", "official"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_come_off(wrapping: str, naming: str, tmp_path: Path) -> None:
    reference = oracle() if naming == "official" else randomize(ours())
    path = saved(WRAPPINGS[wrapping](dict(reference.state_dict())), tmp_path / "weights.ckpt")
    net = ours()
    load_weights(net, read_weights(path))
    assert_same_logits(net, reference, images())


# --- several networks in one file -------------------------------------------------------------------------------------


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same network; counters of batches are whole numbers."""
    return {key: tensor / 2 if tensor.is_floating_point() else tensor.clone() for key, tensor in state.items()}


def averaged_model(state: dict[str, Tensor], counter: str = "n_averaged") -> dict[str, Tensor]:
    """As torch.optim.swa_utils.AveragedModel and mmengine's BaseAveragedModel have it."""
    return {counter: torch.tensor(3), **prefixed(state, "module.")}


#: Raw and averaged weights to a file's content, and the names of both there.
SEVERAL = {
    "timm": (lambda raw, ema: {"epoch": 1, "state_dict": raw, "state_dict_ema": ema}, "state_dict", "state_dict_ema"),
    "timm with its options": (
        lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "args": Namespace(lr=0.1, model="repvgg_a0")},
        *("state_dict", "state_dict_ema"),
    ),
    "torchvision": (lambda raw, ema: {"model": raw, "model_ema": averaged_model(ema)}, "model", "model_ema"),
    "deeper": (
        lambda raw, ema: {"nets": {"net": raw, "ema": {"decay": 0.9, "shadow": ema}}},
        "nets.net",
        "nets.ema.shadow",
    ),
    "by other names": (
        lambda raw, ema: {
            **{"model_state_dict": raw, "EMA": ema, "optimizer": {"state": raw}},
            **{"loss": {"centers.weight": torch.ones(3, 3)}, "metrics": {"top1": torch.tensor(0.5)}},
        },
        *("model_state_dict", "EMA"),
    ),
    "modules side by side": (
        lambda raw, ema: {"state_dict": prefixed(raw, "model.") | prefixed(averaged_model(ema), "model_ema.")},
        *("state_dict", "state_dict.model_ema"),
    ),
    "modules of a Lightning module": (
        lambda raw, ema: {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": prefixed(raw, "net.") | prefixed(ema, "net_ema.") | {"loss.weight": torch.ones(7, 7)},
        },
        *("state_dict", "state_dict.net_ema"),
    ),
    "Lightning's averaging": (
        lambda raw, ema: {
            **{"pytorch-lightning_version": "2.6.6", "state_dict": prefixed(ema, "net.")},
            **{"current_model_state": prefixed(raw, "net."), "averaging_state": {"n_averaged": torch.tensor(3)}},
        },
        *("current_model_state", "state_dict"),
    ),
    "mmengine": (
        lambda raw, ema: {"meta": {}, "state_dict": ema, "ema_state_dict": averaged_model(raw, "steps")},
        *("ema_state_dict", "state_dict"),
    ),
}


@pytest.mark.parametrize("layout", SEVERAL)
def test_of_several_networks_the_averaged_one_is_taken_and_said(layout: str, tmp_path: Path) -> None:
    content, raw_name, averaged_name = SEVERAL[layout]
    raw = randomize(ours())
    ema = ours()
    ema.load_state_dict(half(raw.state_dict()))
    path = saved(content(dict(raw.state_dict()), dict(ema.state_dict())), tmp_path / "several.pth")
    for which, reference, name in (
        *((None, ema, averaged_name), ("ema", ema, averaged_name), (averaged_name, ema, averaged_name)),
        *(("raw", raw, raw_name), (raw_name, raw, raw_name)),
    ):
        weights = read_weights(path, which)
        net = ours()
        load_weights(net, weights)
        assert_same_logits(net, reference, images())
        assert weights.name == name
        other = raw_name if name == averaged_name else f"{averaged_name} (averaged weights)"
        assert f" is taken, not {other}; weights=ema or weights=raw" in weights.taken
        assert weights.taken in initialize(net, weights)


def test_safetensors_may_hold_several_too(tmp_path: Path) -> None:
    raw = dict(randomize(ours()).state_dict())
    save_file(prefixed(raw, "model.") | prefixed(half(raw), "ema_model."), tmp_path / "several.safetensors")
    weights = read_weights(tmp_path / "several.safetensors")
    assert weights.name == "ema_model"
    assert torch.equal(weights.state["head.weight"], raw["head.weight"] / 2)
    assert torch.equal(read_weights(weights.path, "raw").state["head.weight"], raw["head.weight"])


def test_averaged_weights_alone(tmp_path: Path) -> None:
    raw = dict(randomize(ours()).state_dict())
    path = saved(averaged_model(raw), tmp_path / "averaged.pth")
    for which in (None, "ema"):
        weights = read_weights(path, which)
        assert torch.equal(weights.state["head.weight"], raw["head.weight"])
        assert not weights.taken, "there was nothing to choose"
    with pytest.raises(ValueError, match=r"weights=raw: .* holds tensors \(averaged weights\), and nothing else"):
        read_weights(path, "raw")


def test_a_file_with_one_network_has_no_averaged_one(tmp_path: Path) -> None:
    path = saved({"state_dict": dict(ours().state_dict()), "ema_decay": torch.tensor(0.9)}, tmp_path / "one.pth")
    assert not read_weights(path, "raw").taken
    with pytest.raises(ValueError, match=r"weights=ema: .* holds state_dict, and nothing else"):
        read_weights(path, "ema")


def test_networks_that_nothing_tells_apart_are_named(tmp_path: Path) -> None:
    raw = dict(ours().state_dict())
    path = saved({"student": raw, "teacher": half(raw)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"student and teacher, and nothing .* weights=student or weights=teacher"):
        read_weights(path)
    assert torch.equal(read_weights(path, "teacher").state["head.weight"], raw["head.weight"] / 2)


def test_averaged_tensors_without_names_are_not_passed_over(tmp_path: Path) -> None:
    raw = dict(ours().state_dict())
    ema = {"decay": 0.9, "shadow_params": list(raw.values())}
    path = saved({"model": raw, "ema": ema}, tmp_path / "shadow.pth")
    with pytest.raises(ValueError, match=r"the tensors of ema\.shadow_params have no names\. Give weights=raw"):
        read_weights(path)
    assert read_weights(path, "raw").name == "model"


def test_a_mapping_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, object] = {"a": 1}
    content["self"] = content
    with pytest.raises(ValueError, match="holds no tensors of a network"):
        read_weights(saved(content, tmp_path / "round.pth"))


def test_files_from_before_torch_1_6(tmp_path: Path) -> None:
    reference = oracle()
    state = {key: tensor for key, tensor in reference.state_dict().items() if "num_batches" not in key}
    net = ours()
    load_weights(net, read_weights(saved(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)))
    assert_same_logits(net, reference, images())


def test_what_timm_leaves_in_a_deployed_network_is_ignored(tmp_path: Path) -> None:
    reference = oracle(deploy=True)
    state = official.renamed(reference.state_dict(), "timm") | {"stem.id_tensor": torch.ones(1)}
    net = ours(deploy=True)
    load_weights(net, read_weights(saved(state, tmp_path / "timm.pth")))
    assert_same_logits(net, reference, images())


# --- names ------------------------------------------------------------------------------------------------------------

places = st.one_of(st.just("stem"), st.builds("stages.{}.{}".format, st.integers(0, 3), st.integers(0, 30)))


@given(naming=st.sampled_from(FOREIGN), place=places, data=st.data())
def test_a_naming_reads_in_both_directions(naming: str, place: str, data: st.DataObject) -> None:
    table = NAMINGS[naming]
    part = data.draw(st.sampled_from(sorted(table.parts)))
    leaf = data.draw(st.sampled_from(["weight", "bias", "running_mean", "num_batches_tracked"]))
    for key in (f"{place}.{part}.{leaf}", f"head.{leaf}"):
        theirs = table.theirs(key)
        assert theirs is not None
        assert table.ours(theirs) == key


def test_branches_are_known_by_kind_and_not_by_position(tmp_path: Path) -> None:
    reference = randomize(ours())
    path = saved(reference.state_dict(), tmp_path / "ours.pth")
    backwards = RepVGG(SMALL["depths"], SMALL["a"], SMALL["b"], ABLATIONS["full"][::-1], num_classes=7).double().eval()
    load_weights(backwards, read_weights(path))
    assert_same_logits(backwards, reference, images())
    load_weights(backwards, read_weights(saved(oracle().state_dict(), tmp_path / "official.pth")))
    assert_same_logits(backwards, oracle(), images())


def test_two_branches_of_a_kind_keep_their_order(tmp_path: Path) -> None:
    design = [ABLATIONS["plain"][0], *ABLATIONS["full"]]
    nets = [RepVGG((1, 1, 1, 1), 0.25, 0.125, design, num_classes=7).double().eval() for _ in range(2)]
    weights = read_weights(saved(randomize(nets[0]).state_dict(), tmp_path / "ours.pth"))
    load_weights(nets[1], weights)
    assert_same_logits(nets[1], nets[0], images())
    with pytest.raises(WeightsMismatchError, match="3x3#2"):
        load_weights(nets[1], read_weights(saved(oracle().state_dict(), tmp_path / "official.pth")))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ours_of_every_ablation_fit_their_own_and_no_other(ablation: str, tmp_path: Path) -> None:
    weights = read_weights(saved(ours(ablation).state_dict(), tmp_path / "ours.pth"))
    assert [other for other in ABLATIONS if fits(ours(other), weights)] == [ablation]


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_mismatch_names_tensors_and_both_networks_and_changes_nothing(tmp_path: Path) -> None:
    weights = read_weights(saved(oracle().state_dict(), tmp_path / "weights.pth"))
    net = ours("plain")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(net, weights)
    message = str(caught.value)
    for words in ("too many (stage0.rbr_1x1.conv.weight", "branches 3x3 1x1 identity", "branches 3x3;", "ablation="):
        assert words in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    with pytest.raises(WeightsMismatchError, match=r"22 tensors are missing|tensors are missing \(stem\.branches\.1x1"):
        load_weights(ours("full"), read_weights(saved(net.state_dict(), tmp_path / "ours.pth")))
    with pytest.raises(WeightsMismatchError, match=r"(?s)another shape .*groups 2"):
        load_weights(ours(groups=2), weights)


def test_shapes_are_shown(tmp_path: Path) -> None:
    weights = read_weights(saved(oracle(b=0.25).state_dict(), tmp_path / "weights.pth"))
    with pytest.raises(
        WeightsMismatchError, match=r"stage4\.0\.rbr_dense.conv.weight: 128 × 64 × 3 × 3, the model's 64 ×"
    ):
        load_weights(ours(), weights)


def test_other_classes_are_named_or_get_a_fresh_classifier(tmp_path: Path) -> None:
    reference = oracle()
    weights = read_weights(saved(reference.state_dict(), tmp_path / "weights.pth"))
    net = ours(num_classes=5)
    with pytest.raises(ValueError, match=r"7 classes, the model one of 5.*init_from="):
        load_weights(net, weights)
    head = net.head.weight.clone()
    assert "fresh, since the file's has 7 classes, not 5" in initialize(net, weights)
    assert torch.equal(net.head.weight, head)
    assert torch.equal(net.stem.branches[1].bn.running_var, reference.stage0.rbr_1x1.bn.running_var)
    same = ours()
    assert "its classifier of 7 classes too" in initialize(same, weights)
    assert torch.equal(same.head.weight, reference.linear.weight)


def test_a_file_without_a_classifier_can_only_begin_a_training(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in oracle().state_dict().items() if not key.startswith("linear")}
    weights = read_weights(saved(state, tmp_path / "backbone.pth"))
    with pytest.raises(WeightsMismatchError, match=r"missing \(linear\.weight"):
        load_weights(ours(), weights)
    assert "no classes" in initialize(ours(), weights)


def test_forms_do_not_mix(tmp_path: Path) -> None:
    deployed = read_weights(saved(oracle(deploy=True).state_dict(), tmp_path / "deploy.pth"))
    with pytest.raises(ValueError, match=r"Branches cannot be recovered.*forms=deploy"):
        initialize(ours(), deployed)
    trained = read_weights(saved(oracle().state_dict(), tmp_path / "train.pth"))
    with pytest.raises(ValueError, match="to_deploy"):
        load_weights(ours(deploy=True), trained)
    both = {**oracle().state_dict(), **oracle(deploy=True).state_dict()}
    with pytest.raises(ValueError, match="at once"):
        read_weights(saved(both, tmp_path / "both.pth"))


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    path = saved({"state_dict": oracle().state_dict(), "meta": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"tensors alone \(it holds a Python object.*'state_dict', 'state_dict_ema'"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"], ids=["empty", "text", "torn"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as tensors alone"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "no RepVGG in a naming known here.*layer1"),
        ({**oracle().state_dict(), "stage9x.weight": torch.zeros(1)}, "Nearest is official, which has no stage9x"),
        ({"stage3_first.blocks.0.rbr_dense.conv.weight": torch.zeros(1)}, "RepVGGplus"),
        ({"weights": {"a": torch.zeros(1)}}, "no tensors of a network under state_dict or model; it has weights"),
        ({"linear.weight": torch.zeros(1)}, "no block"),
        (torch.zeros(3), "no named tensors, but Tensor"),
        ({}, "no named tensors"),
    ],
    ids=["resnet", "unknown key", "plus", "elsewhere", "head only", "tensor", "nothing"],
)
def test_other_files_are_refused(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        read_weights(saved(content, tmp_path / "weights.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none\.pth"):
        read_weights(tmp_path / "none.pth")
