"""`python src/predict.py` as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import predict as entry_point
from repvgg.deploy.export import export_onnx, export_pt2
from repvgg.deploy.preprocess import Preprocessing
from repvgg.model import to_deploy
from support.exported import network
from support.images import photo_folder

ROOT = Path(__file__).parents[2]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NAMES = ["tench", "great white shark", "hen", "é", "cock"]
RESIZE, CROP = 72, 64


def predict(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/predict.py", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    small = ["model=repvgg_a0", "net.depths=[1,1,1,1]", "net.width_a=0.25", "net.width_b=0.125"]
    return to_deploy(network(*small, classes=5))


@pytest.fixture(scope="module")
def files(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    prepared = Preprocessing.of_validation(CROP, CROP / RESIZE, MEAN, STD, inside=False).metadata()
    names = {"classes": json.dumps(NAMES)}
    export_onnx(net, directory / "outside.onnx", input_size=(3, CROP, CROP), metadata={**prepared, **names})
    export_onnx(
        net, directory / "inside.onnx", input_size=(3, CROP, CROP), mean=MEAN, std=STD, metadata={**prepared, **names}
    )
    export_pt2(net, directory / "no names.pt2", input_size=(3, CROP, CROP), metadata=prepared)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), classes=2, per_class=2)


def by_hand(net: torch.nn.Module, file: Path) -> np.ndarray:
    """Probabilities of one image, by torch and PIL alone."""
    image = Image.open(file).convert("RGB")
    width, height = (int(RESIZE * side / min(image.size)) for side in image.size)
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    crop = np.array(resized.crop((left, top, left + CROP, top + CROP)))
    x = (torch.from_numpy(crop).permute(2, 0, 1)[None].float() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with torch.no_grad():
        return net(x).double().softmax(1)[0].numpy()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("outside.onnx", []),
        ("inside.onnx", ["--runtime", "openvino", "--threads", "1"]),
        ("no names.pt2", []),
    ],
)
def test_says_what_torch_says(model: str, options: list[str], net: torch.nn.Module, files: Path, photos: Path) -> None:
    single = photos / "class_1" / "0001.jpg"
    done = predict(photos / "class_0", single, "--model", files / model, "--json", "--top", 3, *options)
    said = json.loads(done.stdout)
    assert said["model"] == str(files / model)
    assert said["precision"] == "f32"
    wanted = [*sorted((photos / "class_0").iterdir()), single]
    assert [image["file"] for image in said["images"]] == [str(file) for file in wanted]
    for image, file in zip(said["images"], wanted, strict=True):
        probabilities = by_hand(net, file)
        assert [found["index"] for found in image["predictions"]] == np.argsort(-probabilities)[:3].tolist()
        for found in image["predictions"]:
            assert found["probability"] == pytest.approx(probabilities[found["index"]], rel=1e-4)
            index = found["index"]
            assert found["class"] == (str(index) if model == "no names.pt2" else NAMES[index])


def test_the_table_has_a_line_for_every_image(net: torch.nn.Module, files: Path, photos: Path) -> None:
    lines = predict(photos, "--model", files / "outside.onnx", "--top", 2).stdout.splitlines()
    assert len(lines) == 4
    for line, file in zip(lines, sorted(photos.glob("*/*")), strict=True):
        probabilities = by_hand(net, file)
        best, second = np.argsort(-probabilities)[:2]
        pattern = rf"{re.escape(str(file))}  {NAMES[best]} (\d+\.\d\d) % +{NAMES[second]} (\d+\.\d\d) %"
        found = re.fullmatch(pattern, line)
        assert found is not None, line
        assert float(found[1]) == pytest.approx(100 * probabilities[best], abs=0.011)


def test_more_classes_than_there_are_is_all_of_them(files: Path, photos: Path) -> None:
    done = predict(photos / "class_0" / "0000.jpg", "--model", files / "outside.onnx", "--top", 99, "--json")
    found = json.loads(done.stdout)["images"][0]["predictions"]
    assert len(found) == 5
    assert sum(each["probability"] for each in found) == pytest.approx(1)


def test_unreadable_images_are_named_and_the_others_shown(files: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "half.jpg").write_bytes((photos / "class_0" / "0000.jpg").read_bytes()[:3000])
    good = photos / "class_0" / "0001.jpg"
    done = predict(tmp_path / "text.jpg", good, tmp_path / "half.jpg", "--model", files / "outside.onnx", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith(str(good))
    assert len(done.stdout.splitlines()) == 1
    errors = done.stderr.splitlines()
    assert [error.partition(" cannot be read as an image")[0] for error in errors] == [
        *(f"error: {tmp_path / 'text.jpg'}", f"error: {tmp_path / 'half.jpg'}")
    ]
    done = predict(tmp_path / "text.jpg", "--model", files / "outside.onnx", check=False)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{photos}", "--model", "/none.onnx"], "error: /none.onnx: there is no such file. python src/export.py"),
        (["{photos}", "--model", "{foreign}"], "does not say in its metadata"),
        (["{photos}", "--model", "{unprepared}"], "its metadata lack how images are prepared"),
        (["{photos}", "--model", "{damaged}"], "cannot be loaded by onnxruntime"),
        (["/none.jpg", "--model", "{model}"], "error: /none.jpg: there is no such file"),
        (["{empty}", "--model", "{model}"], "holds no images"),
        (["{photos}", "--model", "{model}", "--runtime", "torch"], "choose onnxruntime or openvino"),
        (["{photos}", "--model", "{model}", "--precision", "f16"], "precision=f16: onnxruntime computes in f32"),
        (["{photos}", "--model", "{model}", "--top", "0"], "--top must be at least 1, got 0"),
        (["{photos}"], "the following arguments are required: --model"),
    ],
)
def test_a_wrong_input_gets_one_clear_error(
    arguments: list[str],
    says: str,
    files: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proto = onnx.load(files / "outside.onnx")
    entries = {prop.key: prop.value for prop in proto.metadata_props}
    for name, keys in (("foreign", []), ("unprepared", ["input_size", "dynamic_size", "normalize"])):
        onnx.helper.set_model_props(proto, {key: entries[key] for key in keys})
        onnx.save(proto, tmp_path / f"{name}.onnx")
    (tmp_path / "damaged.onnx").write_bytes((files / "outside.onnx").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    named = {name: tmp_path / f"{name}.onnx" for name in ("foreign", "unprepared", "damaged")}
    places = {"photos": photos, "model": files / "outside.onnx", "empty": tmp_path / "empty", **named}
    monkeypatch.setattr(sys, "argv", ["predict.py", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        entry_point.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""


def test_an_onnx_file_needs_no_torch(files: Path, photos: Path) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['src/predict.py', {str(photos)!r}, '--model', {str(files / 'inside.onnx')!r}]\n"
        "sys.path.insert(0, 'src')\n"
        "runpy.run_path('src/predict.py', run_name='__main__')\n"
        "heavy = {'torch', 'onnx', 'openvino', 'ffcv', 'numba', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_without_numpy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['src/predict.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/predict.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--runtime" in done.stdout
