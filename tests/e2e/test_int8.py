"""`python src/export.py … int8=onnxruntime` as a user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repvgg.deploy.runtimes import load_program
from repvgg.model import RepVGG
from support.networks import ABLATIONS, randomize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A0 at a quarter of its width, for digits."""
    torch.manual_seed(0)
    net = randomize(RepVGG((2, 4, 14, 1), 0.25, 0.25, ABLATIONS["full"], num_classes=10))
    path = tmp_path_factory.mktemp("weights") / "a0.pth"
    torch.save(net.state_dict(), path)
    return path


def export(weights: Path, digits: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/export.py", f"ckpt={weights}", "model=repvgg_a0", "data=digits"]
    command += ["net.width_a=0.25", "net.width_b=0.25", f"data.dir={digits}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_an_int8_file_is_written_and_compared(weights: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "a0.onnx"
    done = export(weights, digits, "int8=onnxruntime", "quantizer.images=64", "normalize=true", f"out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    printed = re.search(
        r"In int8 \(minmax, 64 images of .*train\.beton\):\n  onnxruntime .*relative L2 ([\d.e-]+)", done.stdout
    )
    assert printed is not None, done.stdout
    assert 1e-4 < float(printed[1]) < 0.5
    assert "deploy form in int8" in done.stdout
    program = load_program(out)
    assert program.metadata["int8"] == "minmax, 64 calibration images"
    assert program.metadata["normalize"] == "inside"
    whole = tmp_path / "float.onnx"
    assert export(weights, digits, "normalize=true", f"out={whole}").returncode == 0
    assert out.stat().st_size < 0.5 * whole.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0.onnx", "float.onnx"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["int8=int4"], "int8=int4: choose onnxruntime, torch or null"),
        (["int8=torch"], "int8=torch to=onnx form=deploy: a file in int8 is the deploy form in ONNX"),
        (["int8=onnxruntime", "to=pt2"], "Choose int8=onnxruntime to=onnx form=deploy"),
        (["int8=onnxruntime", "form=train"], "Choose int8=onnxruntime to=onnx form=deploy"),
        (
            ["int8=onnxruntime", "quantizer.method=histogram"],
            "quantizer.method=histogram: int8=onnxruntime knows minmax",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_wrong_choice_gets_one_clear_error(
    arguments: list[str], says: str, weights: Path, digits: Path, tmp_path: Path
) -> None:
    done = export(weights, digits, *arguments, f"out={tmp_path / 'a0'}.{'pt2' if 'to=pt2' in arguments else 'onnx'}")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
