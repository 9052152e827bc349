"""`python src/export.py` as a user types it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image

import export as entry_point
from repvgg.command import require_right_values
from repvgg.deploy.export import OLDEST_OPSET, OPSET
from repvgg.deploy.runtimes import load_program
from repvgg.inputs import TABLES
from repvgg.model import to_deploy
from support.commands import TRAIN, only_run, small
from support.exported import distance, images, network
from support.images import photo_folder

ROOT = Path(__file__).parents[2]
SMALL = ["model=repvgg_a0", "net.depths=[1,1,2,1]", "net.width_a=0.25", "net.width_b=0.125"]
MEAN, STD = 79.012, 88.795  # conf/data/digits.yaml


def export(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/export.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(ROOT))


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return network(*SMALL, classes=10)


@pytest.fixture(scope="module")
def checkpoint(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a training leaves it, without the run around it."""
    path = tmp_path_factory.mktemp("checkpoint") / "net.ckpt"
    torch.save({"state_dict": {f"net.{key}": tensor for key, tensor in net.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def data(digits: Path) -> list[str]:
    return [*SMALL, "data=digits", f"data.dir={digits}"]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, data: list[str]) -> tuple[Path, str]:
    """The command of the README, and what it says."""
    done = export(f"ckpt={checkpoint}", *data, "images=40")
    return checkpoint.with_suffix(".onnx"), done.stdout


def test_the_file_is_compared_with_torch_on_validation_images(
    exported: tuple[Path, str], net: torch.nn.Module, digits: Path
) -> None:
    path, said = exported
    assert f"Against torch {torch.__version__}, float32, 40 validation images of {digits}/val.beton:" in said
    lines = re.findall(r"(\w+) [\d.]+, 32 × 32: max \|Δlogit\| (\S+), relative L2 (\S+), top-1 agreement 1.0000", said)
    assert [runtime for runtime, _, _ in lines] == ["onnxruntime", "openvino"]
    # Rounding alone: u √n for the longest sum, n = 9·128, is 2e-6 in a layer. Where a runtime sums in torch's order, as
    # on some processors, the difference is 0.
    assert all(0 <= float(difference) < 1e-5 for _, _, difference in lines)
    assert f"{path}: deploy form, opset 18, " in said
    assert "with class names" in said
    assert len(said.splitlines()) == 5  # and no diary of the exporters
    x = images(3, 3, 32, 32)
    assert distance(load_program(path)(x), to_deploy(net)(x).detach()) < 1e-5


def test_its_metadata_say_where_it_is_from_and_what_it_takes(exported: tuple[Path, str]) -> None:
    metadata = {prop.key: prop.value for prop in onnx.load(exported[0]).metadata_props}
    assert re.fullmatch(r"[0-9a-f]{64}", metadata.pop("checkpoint_sha256"))
    assert json.loads(metadata.pop("classes")) == [str(digit) for digit in range(10)]
    assert metadata == {
        **{"model": "repvgg_a0", "ablation": "full", "data": "digits", "form": "deploy"},
        **{"input_size": "[3, 32, 32]", "dynamic_size": "false", "resize": "32", "crop": "32"},
        **{"normalize": "outside", "mean": str([MEAN] * 3), "std": str([STD] * 3)},
    }


def test_no_other_file_is_left(exported: tuple[Path, str]) -> None:
    assert sorted(file.name for file in exported[0].parent.iterdir()) == ["net.ckpt", "net.onnx"]


@pytest.mark.slow
def test_a_pt2_that_takes_pixels_of_any_size(
    checkpoint: Path, data: list[str], net: torch.nn.Module, tmp_path: Path
) -> None:
    out = tmp_path / "net.pt2"
    done = export(f"ckpt={checkpoint}", *data, f"out={out}", "normalize=true", "dynamic_size=true", "check=random")
    assert "images of random pixels, not of real images" in done.stdout
    assert re.search(r"torch [\d.+a-z]+, 41 × 64: max", done.stdout)
    assert "pixels 0 … 255, N × 3 × height × width" in done.stdout
    pixels = images(2, 3, 40, 56, high=255)
    wanted = to_deploy(net)((pixels - MEAN) / STD).detach()
    assert distance(load_program(out)(pixels), wanted) < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.slow
def test_of_a_run_nothing_but_the_checkpoint_is_named(digits: Path, tmp_path: Path) -> None:
    """From a training to what the exported file says of images."""
    subprocess.run([*TRAIN, *small(digits, tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=250)
    checkpoint = only_run(tmp_path) / "checkpoints" / "best.ckpt"
    done = export(f"ckpt={checkpoint}", "images=8")
    assert "Of the checkpoint's run: model=repvgg_a0 ablation=full data=digits" in done.stdout
    assert done.stderr == ""
    Image.new("RGB", (40, 50), "gray").save(tmp_path / "gray.png")
    command = [sys.executable, "src/predict.py", str(tmp_path / "gray.png"), "--model", checkpoint.with_suffix(".onnx")]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    assert re.fullmatch(rf"{tmp_path}/gray.png(  \d \d+\.\d\d %){{5}}\n", said)


@pytest.mark.slow
def test_images_of_ones_own_and_names_from_a_file(checkpoint: Path, net: torch.nn.Module, tmp_path: Path) -> None:
    """Of data that is not here: the train form, at a crop that was typed, in one runtime."""
    names = [f"class {letter}" for letter in "abcdefghij"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    photos = photo_folder(tmp_path / "photos", classes=2, per_class=2)
    done = export(
        *(f"ckpt={checkpoint}", *SMALL, "data=imagenet", "data.dir=/none", "form=train", "runtimes=[onnxruntime]"),
        *(f"check_images=[{photos},{photos}/class_0/0000.jpg]", f"classes={tmp_path / 'names.txt'}"),
        *("data.val_transform.size=64", "data.val_transform.ratio=1.0", f"out={tmp_path / 'train.onnx'}"),
    )
    assert "5 images of" in done.stdout
    assert "openvino" not in done.stdout
    program = load_program(tmp_path / "train.onnx")
    assert json.loads(program.metadata["classes"]) == names
    assert (program.metadata["form"], program.metadata["resize"], program.input_size) == ("train", "64", (3, 64, 64))
    x = images(2, 3, 64, 64)
    assert distance(program(x), net(x).detach()) < 1e-5


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(exported: tuple[Path, str], checkpoint: Path, data: list[str]) -> None:
    before = exported[0].read_bytes()
    done = export(f"ckpt={checkpoint}", *data, "tolerance=1e-30", "images=4", check=False)
    assert done.returncode == 1
    assert re.search(r"error: onnxruntime [\d.]+ computes other logits than torch: relative L2 \S+, tol", done.stderr)
    assert "Traceback" not in done.stderr
    assert exported[0].read_bytes() == before
    assert sorted(file.name for file in exported[0].parent.iterdir()) == ["net.ckpt", "net.onnx"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(checkpoint: Path, data: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-u", "src/export.py", f"ckpt={checkpoint}", *data, f"out={tmp_path / 'net.onnx'}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Found by names and shapes")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped: no file is left; the same command begins anew"
    assert not list(tmp_path.iterdir())


def test_a_wrong_input_gets_one_clear_error_at_once(checkpoint: Path) -> None:
    done = export(f"ckpt={checkpoint}", "to=tflite", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: to=tflite: choose onnx, pt2 or null\n"
    done = export(f"ckp={checkpoint}", check=False)
    assert done.returncode == 2
    assert "Did you mean ckpt?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "ckpt=PATH is missing. Of a run it is\n  python src/export.py ckpt=RUN/checkpoints/best.ckpt"),
        (["ckpt=/none.ckpt"], "ckpt=/none.ckpt: there is no such file"),
        (["out=net.tflite"], "out=net.tflite: choose to=onnx or to=pt2"),
        (["to=pt2", "out=net.onnx"], "out=net.onnx: with to=pt2 it ends in .pt2"),
        (["out=/none/net.onnx"], "out=/none/net.onnx: /none is no directory"),
        (["out={folder}"], "folder.onnx cannot be written"),
        (["form=fused"], "form=fused: choose train, deploy or null"),
        (["check=some"], "check=some: choose data or random"),
        (["check_images=/none"], "check_images=/none: there is no such file"),
        (["classes=/none"], "classes=/none: there is no such file"),
        (["check=random", "check_images=/"], "two ways to check"),
        (["images=0"], "images=0 must be a whole number of at least 1"),
        (["opset=10"], "opset=10 must be a whole number from 11 to 18"),
        (["opset=17.5"], "opset=17.5 must be a whole number"),
        (["to=pt2", "opset=17"], "opset=17 is of ONNX: leave it out with to=pt2"),
        (["int8=onnxruntime", "opset=12"], "opset=12: int8 has a scale per channel, which ONNX has from opset=13 on"),
        (["tolerance=0"], "tolerance=0 must be a number above 0"),
        (["normalize=3"], "normalize=3: choose true or false"),
        (["runtimes=[tvm]"], "runtimes=['tvm']: with to=onnx choose from onnxruntime, openvino"),
        (["recipe.lr=1"], "recipe.lr=1: export.py does not read recipe (how"),
        (["~data.val_transform.ratio"], "CenterCrop: an exported file describes a CenterCrop, of size= and ratio="),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_checked_before_anything_begins(
    arguments: list[str], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    typed = [
        argument.format(folder=tmp_path / "folder.onnx") if "{f" in argument else argument for argument in arguments
    ]
    if typed and not typed[0].startswith("ckpt="):
        typed.insert(0, f"ckpt={checkpoint}")
    with pytest.raises(ValueError, match=re.escape(says)):
        settled(typed)


def settled(typed: list[str]) -> tuple[str, Path]:
    """What is checked while Hydra sets the command up."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("export", overrides=["output_dir=/nowhere", *typed], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    try:
        cfg = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        require_right_values("export", cfg, composed.hydra.runtime.choices)
        to, out = entry_point.check(cfg)
    finally:
        HydraConfig.instance().cfg = None
    entry_point.usable_runtimes(cfg, to)
    return to, out


def test_format_and_file_follow_from_each_other(checkpoint: Path, tmp_path: Path) -> None:
    assert settled([f"ckpt={checkpoint}"]) == ("onnx", checkpoint.with_suffix(".onnx"))
    assert settled([f"ckpt={checkpoint}", "to=pt2"]) == ("pt2", checkpoint.with_suffix(".pt2"))
    out = tmp_path / "net.pt2"
    assert settled([f"ckpt={checkpoint}", f"out={out}"]) == ("pt2", out)


def test_the_opsets_are_those_of_the_exporter() -> None:
    rule = TABLES["export"]["opset"]
    assert [opset for opset in range(30) if rule.holds(opset)] == list(range(OLDEST_OPSET, OPSET + 1))


def test_missing_packages_are_named_before_anything_begins(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"to=onnx needs onnxscript, which .* pip install -e '.\[deploy\]'"):
        settled([f"ckpt={checkpoint}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data=imagenet", "data.dir=/none"], ["Looked for", "/none/val.beton", "check_images=PATH", "check=random"]),
        (["data=digits", "data.dir={digits}", "classes={names}", "check=random"], ["names 2 classes", "has 10"]),
        (["data=digits", "data.dir={digits}", "check_images={names}"], ["names.txt cannot be read as an image"]),
        (
            ["data=digits", "data.dir={digits}", "model=repvgg_b0"],
            ["does not fit the model", "the nearest, model=repvgg_b0"],
        ),
    ],
    ids=["no data", "other classes", "no image", "another network"],
)
def test_a_wrong_input_that_only_files_show(
    arguments: list[str], says: list[str], checkpoint: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    typed = [argument.format(digits=digits, names=tmp_path / "names.txt") for argument in arguments]
    small = [] if "model=repvgg_b0" in arguments else SMALL
    out = tmp_path / "net.onnx"
    done = export(f"ckpt={checkpoint}", *small, *typed, f"out={out}", check=False)
    assert done.returncode == 2
    for words in says:
        assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["names.txt"]


def test_help_is_worth_reading_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['src/export.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/export.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'ffcv', 'numba', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("python src/export.py ckpt=", "to=onnx|pt2", "normalize=true", "check_images=", "exit code 1"):
        assert words in done.stdout
