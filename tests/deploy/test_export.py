"""Exported files compute what the network does, carry its names, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repvgg.cli import options
from repvgg.deploy import export
from repvgg.deploy.export import OPSET, export_onnx, export_pt2
from repvgg.deploy.runtimes import load_program
from repvgg.model import RepVGG, count_shortcuts, not_fused, to_deploy
from support.exported import distance, images, network
from support.networks import ABLATIONS, randomize

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
#: What the graphs of variants and ablations differ in, beside how many layers they have; all of them are slow.
DESIGNS = {
    "A": ["model=repvgg_a0"],
    "B1g4": ["model=repvgg_b1g4"],
    "D2se": ["model=repvgg_d2se"],
    "relu_branch": ["model=repvgg_a0", "ablation=relu_branch"],
    "residual_reorg": ["model=repvgg_a0", "ablation=residual_reorg"],
}
SMALL = ["net.depths=[1,2,2,1]", "net.width_a=0.25", "net.width_b=0.125"]
#: Rounding in another order: 1e-7 to 1e-6 was measured.
CLOSE = 1e-5


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path).graph


def require_same(net: nn.Module, path: Path, size: int) -> None:
    """Exported, ``net`` computes the same in onnxruntime, and its file is readable."""
    export_onnx(net, path, input_size=(3, size, size))
    x = images(3, 3, size, size)
    assert distance(load_program(path)(x), net(x).detach()) < CLOSE
    require_readable(path, net)


def require_readable(path: Path, net: nn.Module) -> None:
    """Weights have the state dict's names and values, and nodes those of the modules."""
    graph, state = graph_of(path), net.state_dict()
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    others = {name for name in stored if name not in state}
    assert others == {"ReduceMean.axes"}
    assert set(stored) - others == set(state) - {name for name in state if name.endswith("num_batches_tracked")}
    for name in set(stored) - others:
        np.testing.assert_array_equal(stored[name], state[name].numpy())
    modules = dict(net.named_modules())
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    for node in graph.node:
        module = node.name.partition("/")[0]
        assert module in modules or node.name == "ReduceMean", node.name
        if node.op_type == "Conv":
            assert isinstance(modules[node.name], nn.Conv2d)
            assert list(node.input[1:]) == [f"{node.name}.weight", f"{node.name}.bias"]


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design(design: str, tmp_path: Path) -> None:
    net = to_deploy(network(*DESIGNS[design], *SMALL))
    assert bool(not_fused(net)) == (design == "relu_branch")
    assert bool(count_shortcuts(net)) == (design == "residual_reorg")
    require_same(net, tmp_path / "net.onnx", size=32)
    operators = [node.op_type for node in graph_of(tmp_path / "net.onnx").node]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert operators.count("Conv") == convolutions
    if design in ("A", "B1g4"):  # a plain stack of convolution and ReLU
        assert operators == ["Conv", "Relu"] * convolutions + ["ReduceMean", "Gemm"]


@pytest.mark.slow
@pytest.mark.parametrize("model", options("model"))
def test_every_variant_at_its_own_depth_and_width(model: str, tmp_path: Path) -> None:
    require_same(to_deploy(network(f"model={model}", classes=1000)), tmp_path / "net.onnx", size=64)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", options("ablation"))
def test_every_ablation(ablation: str, tmp_path: Path) -> None:
    net = to_deploy(network("model=repvgg_a0", f"ablation={ablation}", *SMALL))
    require_same(net, tmp_path / "net.onnx", size=32)
    export_pt2(net, tmp_path / "net.pt2", input_size=(3, 32, 32))
    x = images(3, 3, 32, 32)
    assert torch.equal(load_program(tmp_path / "net.pt2")(x), net(x).detach())


@pytest.fixture(scope="module")
def train_form() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(RepVGG((1, 1, 2, 1), 0.125, 0.0625, ABLATIONS["full"], num_classes=7)).eval()


@pytest.fixture(scope="module")
def net(train_form: nn.Module) -> nn.Module:
    return to_deploy(train_form)


@pytest.fixture(scope="module")
def written(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one network's files: fixed and free sizes, normalisation inside."""
    directory = tmp_path_factory.mktemp("written")
    for write, suffix in ((export_onnx, "onnx"), (export_pt2, "pt2")):
        write(net, directory / f"fixed.{suffix}", input_size=(3, 32, 32))
        write(net, directory / f"free.{suffix}", input_size=(3, 32, 32), dynamic_size=True)
        write(
            net,
            directory / f"inside.{suffix}",
            input_size=(3, 32, 32),
            mean=MEAN,
            std=STD,
            metadata={"form": "x", "classes": '["a", "é"]'},
        )
    return directory


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_the_train_form_with_free_sizes_is_left_alone(write, train_form: nn.Module, tmp_path: Path) -> None:
    """Its BatchNorms and strided 1×1 branches, at sizes that share no factor with the example's, in channels_last."""
    path = tmp_path / ("net.onnx" if write is export_onnx else "net.pt2")
    net = copy.deepcopy(train_form).to(memory_format=torch.channels_last)
    before, rng = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    write(net, path, input_size=(3, 32, 32), dynamic_size=True)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert net.state_dict().keys() == before.keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    assert not any(module.training for module in net.modules())
    program = load_program(path)
    for shape in ((1, 3, 32, 32), (2, 3, 1, 1), (5, 3, 47, 80), (1, 3, 33, 16)):
        assert distance(program(images(*shape)), net(images(*shape)).detach()) < CLOSE


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_the_batch_is_free_and_the_size_by_option(runtime: str, net: nn.Module, written: Path) -> None:
    suffix = "pt2" if runtime == "torch" else "onnx"
    program = load_program(written / f"free.{suffix}", runtime)
    for shape in ((1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 64, 41)):
        assert distance(program(images(*shape)), net(images(*shape)).detach()) < CLOSE
    program = load_program(written / f"fixed.{suffix}", runtime)
    for n in (1, 4):
        assert distance(program(images(n, 3, 32, 32)), net(images(n, 3, 32, 32)).detach()) < CLOSE
    with pytest.raises(ValueError, match=r"takes images of shape N, 3, 32, 32; got \(2, 3, 64, 41\)"):
        program(images(2, 3, 64, 41))


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_normalisation_inside_is_that_outside(suffix: str, written: Path) -> None:
    inside, outside = load_program(written / f"inside.{suffix}"), load_program(written / f"fixed.{suffix}")
    pixels = images(4, 3, 32, 32, high=255).round()
    normalized = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(inside(pixels), outside(normalized))
    assert inside.metadata["normalize"] == "inside"
    assert json.loads(inside.metadata["mean"]) == MEAN
    assert outside.metadata["normalize"] == "outside"
    assert "mean" not in outside.metadata


def test_a_viewer_shows_modules_and_shapes(written: Path) -> None:
    proto = onnx.load(written / "inside.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", OPSET)]
    graph = proto.graph
    assert [node.name for node in graph.node][:6] == [
        *("normalize/Sub", "normalize/Div", "stem.conv", "stem.activation", "stages.0.0.conv", "stages.0.0.activation")
    ]
    assert [node.name for node in graph.node][-2:] == ["ReduceMean", "head"]
    assert {tensor.name for tensor in graph.initializer} > {"normalize.mean", "normalize.std"}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    assert shapes["images"] == ["batch", 3, 32, 32]
    assert shapes["logits"] == ["batch", 7]
    assert shapes["stem.conv"] == ["batch", 8, 16, 16]
    assert {prop.key: prop.value for prop in proto.metadata_props} == {
        **{"classes": '["a", "é"]', "form": "x", "input_size": "[3, 32, 32]", "dynamic_size": "false"},
        **{"normalize": "inside", "mean": json.dumps(MEAN), "std": json.dumps(STD)},
    }
    free = onnx.load(written / "free.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in free] == ["batch", 3, "height", "width"]


def test_nothing_of_this_machine_is_in_the_files(written: Path) -> None:
    graph = onnx.load(written / "free.onnx").graph
    assert not any(holder.doc_string for holder in (graph, *graph.node, *graph.input, *graph.output))
    assert not any(holder.metadata_props for holder in (graph, *graph.node, *graph.initializer))
    contents = [file.read_bytes() for file in written.glob("*.onnx")]
    for file in written.glob("*.pt2"):
        with zipfile.ZipFile(file) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    places = (Path.home(), Path(__file__).parents[2], sys.prefix, Path(torch.__file__).parent)
    for place in (*map(str, places), ".py"):
        assert not any(place.encode() in content for content in contents), place


WRITE = """
import hashlib, sys
from pathlib import Path
from repvgg.deploy.export import export_onnx, export_pt2
from repvgg.model import to_deploy
from support.networks import randomize, tiny
import torch
torch.manual_seed(0)
net = to_deploy(randomize(tiny()))
for write, name in ((export_onnx, "net.onnx"), (export_pt2, "net.pt2")):
    path = Path(sys.argv[1]) / name
    write(net, path, input_size=(3, 32, 32), dynamic_size=True, metadata={"b": "2", "a": "1"})
    print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_the_same_network_gives_the_same_bytes(net: nn.Module, written: Path, tmp_path: Path) -> None:
    """Under another name, with the metadata in another order, after other exports."""
    same = copy.deepcopy(net)
    for write, suffix in ((export_onnx, "onnx"), (export_pt2, "pt2")):
        path = tmp_path / f"another name.{suffix}"
        metadata = {"classes": '["a", "é"]', "form": "x"}
        write(same, path, input_size=(3, 32, 32), mean=MEAN, std=STD, metadata=metadata)
        assert path.read_bytes() == (written / f"inside.{suffix}").read_bytes()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """With other hashes of strings."""
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path)]
        variables = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=variables)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 2


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mean": MEAN}, "mean=.* and std=None: give both, or neither"),
        ({"mean": MEAN, "std": [1.0, 1.0]}, "must be 3 numbers each"),
        ({"mean": MEAN, "std": [1.0, 0.0, 1.0]}, "std positive"),
        ({"input_size": (3, 32)}, r"input_size=\(3, 32\) must be channels, height and width"),
        ({"input_size": (3, 0, 32)}, r"input_size=\(3, 0, 32\)"),
    ],
)
def test_wrong_arguments(write, arguments: dict, says: str, net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        write(net, tmp_path / "net.file", **{"input_size": (3, 32, 32), **arguments})
    assert not list(tmp_path.iterdir())


def test_a_network_in_training_is_refused(net: nn.Module, tmp_path: Path) -> None:
    part = copy.deepcopy(net)
    part.get_submodule("stages.1.0").train()
    for write in (export_onnx, export_pt2):
        with pytest.raises(ValueError, match=r"RepVGG \(its 'stages.1.0'\) is in training mode: call .eval\(\)"):
            write(part, tmp_path / "net.file", input_size=(3, 32, 32))


def test_what_onnx_cannot_hold_is_refused_before_the_work(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"GiB of weights do not fit into one ONNX file \(2 GiB\): export a .pt2"):
        export_onnx(net, tmp_path / "net.onnx", input_size=(3, 32, 32))


def test_a_missing_package_names_the_command(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is not installed. Install it with pip install -e '.\[deploy\]'"):
        export_onnx(net, tmp_path / "net.onnx", input_size=(3, 32, 32))


def test_a_failed_export_leaves_the_old_file(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    for write, place, name in (
        (export_onnx, "onnx.checker.check_model", "net.onnx"),
        (export_pt2, "torch.export.save", "net.pt2"),
    ):
        (tmp_path / name).write_text("old")
        monkeypatch.setattr(place, fail)
        with pytest.raises(OSError, match="no space"):
            write(net, tmp_path / name, input_size=(3, 32, 32))
        assert (tmp_path / name).read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.pt2"]


@pytest.fixture(scope="module")
def both_forms(train_form: nn.Module, written: Path) -> dict[str, onnx.ModelProto]:
    path = written / "train.onnx"
    export_onnx(train_form, path, input_size=(3, 32, 32), dynamic_size=True)
    return {"deploy": onnx.load(written / "free.onnx"), "train": onnx.load(path)}


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("form", ["deploy", "train"])
def test_an_older_opset_is_the_same_function(
    form: str, opset: int, both_forms: dict[str, onnx.ModelProto], train_form: nn.Module, tmp_path: Path
) -> None:
    """With ReduceMean's axes as an attribute, BatchNorm and Slice: with free sizes, in two runtimes."""
    path, x = tmp_path / "net.onnx", images(3, 3, 40, 56)
    proto = copy.deepcopy(both_forms[form])
    export._lower(proto, opset)
    onnx.checker.check_model(proto, full_check=True)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", opset)]
    assert proto.ir_version == {11: 6, 13: 7, 17: 8}[opset]  # of ONNX 1.6, 1.8 and 1.12
    assert not any(tensor.name.startswith("ReduceMean") for tensor in proto.graph.initializer)
    path.write_bytes(proto.SerializeToString())
    for runtime in ("onnxruntime", "openvino"):
        assert distance(load_program(path, runtime)(x), train_form(x).detach()) < CLOSE


def test_the_file_asks_for_no_newer_reader_than_its_opset(written: Path) -> None:
    assert onnx.load(written / "fixed.onnx").ir_version == 8  # of ONNX 1.13, which has opset 18


def test_an_opset_that_lacks_an_operator_is_refused(tmp_path: Path) -> None:
    class Squares(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("nchw,nchw->nc", x, x)

    net = Squares().eval()
    for opset in (10, 19):
        with pytest.raises(ValueError, match=rf"opset={opset}: choose from 11 to 18"):
            export_onnx(net, tmp_path / "net.onnx", input_size=(3, 32, 32), opset=opset)
    with pytest.raises(ValueError, match=r"opset=11 cannot say .*Einsum.*; opset=18 can"):
        export_onnx(net, tmp_path / "net.onnx", input_size=(3, 32, 32), opset=11)
    assert not list(tmp_path.iterdir())
