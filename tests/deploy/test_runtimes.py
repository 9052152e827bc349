"""Exported files in their runtimes: one answer, a precision that is said, and files that are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repvgg.deploy import runtimes
from repvgg.deploy.export import export_onnx, export_pt2
from repvgg.deploy.runtimes import _limit_without_bf16, _openvino, load_program
from repvgg.model import RepVGG, to_deploy
from support.exported import distance, images
from support.networks import ABLATIONS, randomize

#: OpenVINO lists what the processor has; oneDNN may be told to use less of it.
LIMITED = _limit_without_bf16()
HAS_BF16 = "BF16" in _openvino().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
RUNTIMES = [("net.onnx", "onnxruntime"), ("net.onnx", "openvino"), ("net.pt2", "torch")]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return to_deploy(randomize(RepVGG((1, 1, 2, 1), 0.25, 0.125, ABLATIONS["full"], num_classes=7)))


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for write, name in ((export_onnx, "net.onnx"), (export_pt2, "net.pt2")):
        write(net, directory / name, input_size=(3, 32, 32), metadata={"form": "deploy", "classes": '["é"]'})
    return directory


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_every_runtime_gives_torchs_logits_in_f32(name: str, runtime: str, files: Path, net: nn.Module) -> None:
    program = load_program(files / name, runtime)
    x = images(4, 3, 32, 32)
    got = program(x)
    assert got.dtype == torch.float32
    assert distance(got, net(x).detach()) < 1e-5
    np.testing.assert_array_equal(program.run(x.numpy()), got.numpy())
    assert (program.runtime, program.precision, program.input_size) == (runtime, "f32", (3, 32, 32))
    assert program.metadata["classes"] == '["é"]'
    assert program.metadata["form"] == "deploy"
    assert program.version == __import__(runtime).__version__.partition("-")[0]


def test_the_first_runtime_of_a_files_kind_is_the_default(files: Path) -> None:
    assert load_program(files / "net.onnx").runtime == "onnxruntime"
    assert load_program(files / "net.pt2").runtime == "torch"


def test_openvino_computes_in_bf16_only_where_asked(files: Path, net: nn.Module) -> None:
    if not HAS_BF16:
        with pytest.raises(ValueError, match=r"precision=bf16: OpenVINO computes .* on this CPU. Choose f32"):
            load_program(files / "net.onnx", "openvino", precision="bf16")
        return
    if LIMITED:
        with pytest.raises(ValueError, match=rf"precision=bf16: {LIMITED} leaves OpenVINO no instructions for it"):
            load_program(files / "net.onnx", "openvino", precision="bf16")
        return
    x = images(4, 3, 32, 32)
    program = load_program(files / "net.onnx", "openvino", precision="bf16")
    assert program.precision == "bf16"
    # An input is rounded to 8 bits of mantissa, by 2^-9/√3 = 1e-3 on average: in f32 the distance would be below 1e-5.
    assert 1e-4 < distance(program(x), net(x).detach()) < 0.05


@pytest.mark.skipif(not HAS_BF16, reason="OpenVINO lists no bf16 for this processor")
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bf16_that_onednn_is_kept_from_is_one_clear_line(
    name: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(name, "avx512_core")
    with pytest.raises(ValueError, match=rf"^precision=bf16: {name}=AVX512_CORE leaves .* Choose f32$"):
        load_program(files / "net.onnx", "openvino", precision="bf16")
    monkeypatch.setenv(name, "avx512_core_bf16")
    assert _limit_without_bf16() is None


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_threads_are_the_programs_own(name: str, runtime: str, files: Path, net: nn.Module) -> None:
    before = torch.get_num_threads()
    program = load_program(files / name, runtime, threads=2 if before == 1 else 1)
    x = images(2, 3, 32, 32)
    assert distance(program(x), net(x).detach()) < 1e-5
    assert torch.get_num_threads() == before


def test_torch_runs_with_that_many_threads(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program(files / "net.pt2", threads=3)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    before = torch.get_num_threads()
    program(images(1, 3, 32, 32))
    assert set_to == [3, before]


def test_onnx_files_run_without_torch_and_nothing_is_sent_home(files: Path, tmp_path: Path) -> None:
    """Telemetry of onnxruntime and OpenVINO would leave files in the home directory, and OpenVINO's would fork."""
    code = (
        "import os, sys, numpy as np\n"
        "forks = []\n"
        "sys.addaudithook(lambda event, _: forks.append(event) if event == 'os.fork' else None)\n"
        "from pathlib import Path\n"
        "from repvgg.deploy.runtimes import load_program\n"
        "for runtime in ('onnxruntime', 'openvino'):\n"
        f"    program = load_program(Path({str(files / 'net.onnx')!r}), runtime)\n"
        "    assert program.run(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 7)\n"
        "assert 'torch' not in sys.modules\n"
        "assert not forks\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    home = {**kept, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=home)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_signal_is_handled_after_openvino_was_used_twice(files: Path) -> None:
    """Two plugins, gone, would leave this thread no stack to handle it on: a segmentation fault."""
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from repvgg.deploy.runtimes import load_program\n"
        f"path = Path({str(files / 'net.onnx')!r})\n"
        "first, second = load_program(path, 'openvino'), load_program(path, 'openvino')\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGINT, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("none.onnx", {}, "none.onnx: there is no such file. python src/export.py writes one"),
        ("net.pth", {}, "net.pth: an exported file ends in .onnx or .pt2"),
        ("net.onnx", {"runtime": "torch"}, "runtime=torch does not run .onnx files: choose onnxruntime or openvino"),
        ("net.pt2", {"runtime": "openvino"}, "runtime=openvino does not run .pt2 files: choose torch"),
        ("net.onnx", {"precision": "bf16"}, "precision=bf16: onnxruntime computes in f32 here"),
        ("net.onnx", {"runtime": "openvino", "precision": "f8"}, "precision=f8: openvino computes in f32 or bf16"),
        ("net.pt2", {"threads": 0}, "threads=0 must be at least 1"),
    ],
)
def test_wrong_arguments(name: str, options: dict, says: str, files: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_program(files / name, **options)


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_images_of_another_shape_are_refused(name: str, runtime: str, files: Path) -> None:
    program = load_program(files / name, runtime)
    for shape in ((1, 1, 32, 32), (1, 3, 32, 31), (3, 32, 32)):
        with pytest.raises(ValueError, match="takes images of shape N, 3, 32, 32; got"):
            program(images(*shape))


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
@pytest.mark.parametrize("damage", ["half", "text", "empty"])
def test_damaged_files_are_named(name: str, runtime: str, damage: str, files: Path, tmp_path: Path) -> None:
    whole = (files / name).read_bytes()
    content = {"half": whole[: len(whole) // 2], "text": b"not a network\n" * 100, "empty": b""}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (cannot be loaded by {runtime}|is damaged|does not say)"):
        load_program(tmp_path / name, runtime)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_of_others_is_named(runtime: str, files: Path, tmp_path: Path) -> None:
    proto = onnx.load(files / "net.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"foreign.onnx does not say in its metadata .* python src/export.py ckpt="):
        load_program(tmp_path / "foreign.onnx", runtime)


@pytest.mark.parametrize(
    ("runtime", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("openvino", "onnx")]
)
def test_a_missing_package_names_the_command(
    runtime: str, package: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(runtimes, "_openvino", _openvino.__wrapped__)  # as in a process that has loaded nothing yet
    with pytest.raises(ValueError, match=rf"{package} is not installed. Install it with pip install -e '.\[deploy\]'"):
        load_program(files / "net.onnx", runtime)


# --- .pt2 files that would run code -----------------------------------------------------------------------------------


class _Mark:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive whose entries, named from below the root, ``change`` has changed."""
    with zipfile.ZipFile(source) as archive:
        entries = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
        root = archive.namelist()[0].partition("/")[0]
    change(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return target


def set_in(name: str, change: Callable[[dict], None]) -> Callable[[dict[str, bytes]], None]:
    """Changes one JSON entry."""

    def apply(entries: dict[str, bytes]) -> None:
        document = json.loads(entries[name])
        change(document)
        entries[name] = json.dumps(document).encode()

    return apply


def _first_node(document: dict) -> dict:
    return document["graph_module"]["graph"]["nodes"][0]


ATTACKS = {
    "a pickled weight": (
        set_in(
            "data/weights/model_weights_config.json",
            lambda config: next(iter(config["config"].values())).update(use_pickle=True),
        ),
        "holds pickled tensors",
    ),
    "code as a guard": (
        set_in("models/model.json", lambda model: model.update(guards_code=["__import__('os').abort()"])),
        "holds Python code",
    ),
    "a call that is no operator": (
        set_in("models/model.json", lambda model: _first_node(model).update(target="torch.hub.load")),
        "holds a call of torch.hub.load",
    ),
    "code as a size": (
        set_in(
            "models/model.json",
            lambda model: model["graph_module"]["graph"].update(
                sym_int_values={"s": {"as_expr": {"expr_str": "().__class__", "hint": None}}}
            ),
        ),
        "holds an expression",
    ),
    "compiled code": (
        lambda entries: entries.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
        "an entry data/aoti",
    ),
    "a pickled constant": (lambda entries: entries.update({"data/constants/opaque_obj_0": b""}), "opaque_obj_0"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pt2_that_could_run_code_is_not_loaded(attack: str, files: Path, tmp_path: Path) -> None:
    change, says = ATTACKS[attack]
    path = rewritten(files / "net.pt2", tmp_path / "evil.pt2", change)
    with pytest.raises(ValueError, match=r"evil.pt2 holds .*never writes.*it is not loaded") as caught:
        load_program(path)
    assert says in str(caught.value)


def test_the_files_that_are_refused_would_have_run_code(files: Path, tmp_path: Path) -> None:
    """Example inputs, which torch.export.save writes as a pickle by itself."""
    buffer = io.BytesIO()
    pickle.dump(_Mark(tmp_path / "mark"), buffer)
    path = rewritten(
        files / "net.pt2",
        tmp_path / "evil.pt2",
        lambda entries: entries.update({"data/sample_inputs/model.pt": buffer.getvalue()}),
    )
    with pytest.raises(ValueError, match=r"holds an entry data/sample_inputs/model.pt, which"):
        load_program(path)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch says when it is too late
        torch.export.load(path)
    assert (tmp_path / "mark").exists()


def test_an_unchanged_copy_is_loaded(files: Path, net: nn.Module, tmp_path: Path) -> None:
    """What the attacks' copying does is not what is refused."""
    path = rewritten(files / "net.pt2", tmp_path / "copy.pt2", lambda entries: None)
    x = images(2, 3, 32, 32)
    assert torch.equal(load_program(path)(x), net(x).detach())
