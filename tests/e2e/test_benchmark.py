"""`python src/benchmark.py`, as typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repvgg.cli import ROOT


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loader", "--images", "0"], "--images must be at least 1, got 0"),
        (["loader", "--photos", "/none"], "/none"),
        (["speed", "--rounds", "0"], "usage: benchmark.py speed"),
        (["speed", "--models", "b0"], "error: --models b0: choose from repvgg_a0, repvgg_a1"),
        (["speed", "--out", "README.md"], "error: --out README.md is a file"),
        (["speed", "--device", "cuda"], "error: --device cuda: torch finds no GPU here"),
    ],
)
def test_a_wrong_value_is_named(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "src/benchmark.py", "loader", "--images", "100000", "--output", str(tmp_path / "x.md")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("photo.jpg")) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.splitlines() == ["stopped: nothing is measured, nothing is left behind"]
    assert not list(tmp_path.iterdir())


SPEED = ["speed", "--models", "repvgg_a1", "repvgg_a0", "--device", "cpu", "--resolution", "32", "--batch", "1"]


def test_speeds_are_measured_and_written(tmp_path: Path) -> None:
    done = benchmark(*SPEED, "--warmup", "0", "--batches", "1", "--rounds", "2", "--out", str(tmp_path / "speed"))
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "speed" / "speed.md").read_text()
    assert text in done.stdout
    assert "| repvgg_a1 |" in text
    assert "n = 2 variants" in text
    record = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert record["protocol"]["rounds"] == 2
    for forms in record["seconds_per_batch"].values():
        assert [[len(times) for times in rounds] for rounds in forms.values()] == [[1, 1], [1, 1]]
    assert record["images_per_s"]["repvgg_a0"]["deploy"][1] == pytest.approx(
        1 / record["seconds_per_batch"]["repvgg_a0"]["deploy"][1][0]
    )
    assert (tmp_path / "speed" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_a_measurement_too(tmp_path: Path) -> None:
    command = [sys.executable, "src/benchmark.py", *SPEED, "--batches", "1000000", "--out", str(tmp_path / "speed")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "2 variants and their forms take turns" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.splitlines()[-1] == "stopped: nothing is measured, nothing is left behind"
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_loader_is_measured_and_drawn(tmp_path: Path) -> None:
    done = benchmark("loader", "--images", "16", "--rounds", "1", "--output", str(tmp_path / "loader.md"))
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "loader.md").read_text()
    assert text in done.stdout
    rows = [row for row in text.splitlines() if row.startswith("| train | original bytes |")]
    assert [row.split(" | ")[2] for row in rows] == ["this repository", "FFCV's own operations"]
    assert "| `ops=fused` |" in text
    assert (tmp_path / "loader.png").read_bytes().startswith(b"\x89PNG")
