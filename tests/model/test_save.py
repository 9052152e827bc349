"""What is written under the names of an implementation, its own network loads; and the file is whole or not there."""

import contextlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.model import RepVGG, load_weights, named, read_weights, tensorfile, to_deploy, write_weights
from repvgg.model.tensorfile import read_tensor_file, write_tensor_file
from support import official
from support.networks import ABLATIONS, randomize, tiny
from support.paper import VARIANTS

FOREIGN = ["official", "timm", "mmpretrain"]
FORMS = [False, True]
SIZES = {"depths": (1, 2, 2, 1), "a": 0.25, "b": 0.125}
OPTIONS = {"plain": {}, "g2": {"groups": 2}, "se": {"se": True}}


def ours(groups: int = 1, se: bool = False, ablation: str = "full") -> nn.Module:
    torch.manual_seed(1)
    options = {"groups": groups, "squeeze_excite": se, "num_classes": 7}
    return randomize(RepVGG(SIZES["depths"], SIZES["a"], SIZES["b"], ABLATIONS[ablation], **options).double()).eval()


def loaded(path: Path) -> dict[str, Tensor]:
    """As a user of another implementation reads a file, without this package."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)["state_dict"]


def strictly_loaded(reference: nn.Module, state: dict[str, Tensor], naming: str) -> nn.Module:
    """The reference network with a state under the names of ``naming``: every tensor, and no other."""
    authors = {
        official.renamed({key: tensor}, naming).popitem()[0]: key for key, tensor in reference.state_dict().items()
    }
    assert state.keys() == authors.keys()
    reference.load_state_dict({authors[key]: tensor for key, tensor in state.items()}, strict=True)
    return reference.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("deploy", FORMS, ids=["train", "deploy"])
@pytest.mark.parametrize("naming", FOREIGN)
@pytest.mark.parametrize("options", OPTIONS)
def test_their_network_computes_the_same(options: str, naming: str, deploy: bool, suffix: str, tmp_path: Path) -> None:
    net = ours(**OPTIONS[options])
    path = tmp_path / f"weights{suffix}"
    write_weights(to_deploy(net) if deploy else net, path, naming=naming, metadata={})
    reference = official.RepVGG(**SIZES, **OPTIONS[options], num_classes=7, deploy=deploy).double()
    x = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        theirs = strictly_loaded(reference, loaded(path), naming)(x)
        torch.testing.assert_close(theirs, net(x), rtol=1e-10, atol=1e-12)


#: One of every depth, of groups and of squeeze-and-excitation; the others are slow by their number alone.
QUICK = {"a1", "b0", "b3g2", "d2se"}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[] if v in QUICK else pytest.mark.slow) for v in VARIANTS])
def test_every_variant_has_their_names_and_shapes_in_both_forms(variant: str) -> None:
    v = VARIANTS[variant]
    with torch.device("meta"):
        net = RepVGG(v.depths, v.a, v.b, ABLATIONS["full"], groups=v.groups, squeeze_excite=v.se)
        for deploy in FORMS:
            theirs = official.RepVGG(v.depths, v.a, v.b, groups=v.groups, se=v.se, deploy=deploy).state_dict()
            form = to_deploy(net) if deploy else net
            for naming in FOREIGN:
                written = {key: (tensor.shape, tensor.dtype) for key, tensor in named(form, naming).items()}
                expected = official.renamed(theirs, naming)
                assert written == {key: (tensor.shape, tensor.dtype) for key, tensor in expected.items()}


@settings(max_examples=15, deadline=None)
@given(
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    groups=st.sampled_from([1, 2]),
    se=st.booleans(),
    classes=st.integers(1, 12),
    deploy=st.booleans(),
    naming=st.sampled_from(["ours", *FOREIGN]),
    suffix=st.sampled_from(tensorfile.SUFFIXES),
)
def test_there_and_back_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    depths: tuple,
    groups: int,
    se: bool,
    classes: int,
    deploy: bool,
    naming,
    suffix,
) -> None:
    path = tmp_path_factory.mktemp("there") / f"weights{suffix}"
    net = RepVGG(depths, 0.25, 0.125, ABLATIONS["full"], groups=groups, squeeze_excite=se, num_classes=classes)
    net = to_deploy(randomize(net)) if deploy else randomize(net)
    write_weights(net, path, naming=naming, metadata={"form": "told"})
    weights = read_weights(path)
    assert (weights.naming, weights.form) == (naming, "deploy" if deploy else "train")
    assert (weights.num_classes, weights.depths) == (classes, list(depths))
    assert weights.metadata == {"form": "told"}
    with torch.device("meta"):
        empty = RepVGG(depths, 0.25, 0.125, ABLATIONS["full"], groups=groups, squeeze_excite=se, num_classes=classes)
        empty = to_deploy(empty) if deploy else empty
    load_weights(empty, weights, assign=True)
    assert_same_state(empty.state_dict(), net.state_dict())


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=0, equal_nan=True, msg=key)


# --- what has no names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", FOREIGN)
@pytest.mark.parametrize("ablation", ["plain", "id", "1x1"])
def test_branches_that_their_networks_have_must_be_there(ablation: str, naming: str) -> None:
    with pytest.raises(ValueError, match=rf"{naming} has branches in every block .*1x1|.*identity.*|.*branch_norm.*"):
        named(tiny(ablation), naming)
    assert named(to_deploy(tiny(ablation)), naming)  # all of them are plain convolutions when deployed
    assert named(tiny(ablation), "ours").keys() == tiny(ablation).state_dict().keys()


def test_an_unknown_naming_is_named() -> None:
    with pytest.raises(ValueError, match="naming=torchvision: choose ours, official, timm, mmpretrain"):
        named(tiny(), "torchvision")


# --- files ------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any layout, and with values that are no numbers."""
    tensor = torch.full(draw(shapes), draw(st.sampled_from([0.0, -1.5, 7.0]))).to(draw(dtypes))
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 0.25]))
    layout = draw(st.sampled_from(["whole", "transposed", "part", "one number"]))
    if layout == "transposed":
        return tensor.mT if tensor.dim() > 1 else tensor
    if layout == "part":
        return torch.cat([tensor[None], tensor[None]])[1]
    return tensor.new_ones(()).expand(tensor.shape) if layout == "one number" else tensor


@settings(max_examples=20, deadline=None)
@given(
    state=st.dictionaries(st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,4}){0,3}", fullmatch=True), tensors(), min_size=1),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), st.text(st.characters(codec="utf-8"))),
    suffix=st.sampled_from(tensorfile.SUFFIXES),
)
def test_files_give_back_what_was_written_and_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, state: dict, metadata: dict, suffix: str
) -> None:
    paths = [tmp_path_factory.mktemp("files") / f"{name}{suffix}" for name in ("one", "other")]
    for path in paths:
        write_tensor_file(path, state, metadata)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read, said, *_ = read_tensor_file(paths[0])
    assert said == metadata
    assert_same_state(read, state)
    if suffix == ".safetensors":
        assert_same_state(safetensors.torch.load_file(paths[0]), state)


def test_the_metadata_keep_their_order_and_the_tensors_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    metadata = dict.fromkeys("zyxwvutsrq", "1")
    write_weights(tiny(), path, metadata=metadata)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert list(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]) == list(metadata)
    assert length % 8 == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole")
    for suffix in (".safetensors", ".pth"):
        write_weights(tiny(), path / f"w{suffix}", naming="official", metadata={"form": "train"})
    return {file.suffix: file.read_bytes() for file in path.iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".safetensors", ".pth"]), share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_short_gets_one_error(files: dict, tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(files[suffix][: int(len(files[suffix]) * share)])
    with pytest.raises(ValueError, match=r"cut\..* (is no whole safetensors file|cannot be read as tensors alone)"):
        read_weights(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".safetensors", ".pth"]), place=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_damaged_beginning_raises_nothing_else(
    files: dict, tmp_path: Path, suffix: str, place: int, byte: int
) -> None:
    """Where names, shapes and pickles are: what is no error is another name or value."""
    path = tmp_path / f"damaged{suffix}"
    content = bytearray(files[suffix])
    content[place] = byte
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_safetensors_are_known_by_their_content(files: dict, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"named{suffix}"
    path.write_bytes(files[".safetensors"])
    assert read_weights(path).metadata == {"form": "train"}
    other = tmp_path / "torch.safetensors"
    other.write_bytes(files[".pth"])
    with pytest.raises(ValueError, match=r"no whole safetensors file .*named \.pth"):
        read_weights(other)


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    write_weights(tiny(), path, metadata={})
    before = path.read_bytes()
    for damaged in ({"a": torch.zeros(1)}, {}):
        monkeypatch.setattr(tensorfile, "read_tensor_file", lambda path, damaged=damaged: (damaged, {}))
        with pytest.raises(OSError, match="reads back differently"):
            write_weights(tiny("plain"), path, metadata={})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["weights.ckpt", "weights", "weights.onnx"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name a \.safetensors, \.pth or \.pt file"):
        write_weights(tiny(), tmp_path / name, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    net = randomize(tiny()).to(dtype)
    write_weights(net, path, naming="timm", metadata={})
    with torch.device("meta"):
        empty = tiny()
    load_weights(empty, read_weights(path), assign=True)
    assert_same_state(empty.state_dict(), net.state_dict())


def test_channels_last_is_not_written(tmp_path: Path) -> None:
    """The values are those of the usual layout, which other programs read."""
    net = tiny().to(memory_format=torch.channels_last)
    for suffix in (".pth", ".safetensors"):
        write_weights(net, tmp_path / f"w{suffix}", metadata={})
        state = loaded(tmp_path / f"w{suffix}")
        assert all(tensor.is_contiguous() for tensor in state.values())
        assert_same_state(state, net.state_dict())


def test_a_quantized_file_is_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["stem.branches.0.conv.weight"] = state["stem.branches.0.conv.weight"].to(torch.int8)
    torch.save(state, tmp_path / "int8.pth")
    with pytest.raises(ValueError, match=r"holds int8 in stem\.branches\.0\.conv\.weight.*quantized"):
        read_weights(tmp_path / "int8.pth")
