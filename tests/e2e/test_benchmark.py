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
        (["inference", "--models", "b0"], "error: --models b0: choose from repvgg_a0, repvgg_a1"),
        (["inference", "--runtimes", "tensorrt"], "invalid choice: 'tensorrt' (choose from "),
        (["inference", "--precisions", "float16", "--device", "cpu"], "error: --precisions float16 needs a GPU"),
        (["inference", "--precisions", "float16"], "error: --precisions float16 needs a GPU"),
        (["inference", "--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["train", "--against", "none:build"], "error: --against none:build: none cannot be imported from here"),
        (["train", "--against-deploy", "x:y"], "error: --against-deploy x:y goes with --against module.path:callable"),
        (["train", "--precisions", "float16"], "invalid choice: 'float16'"),
        (["train", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["convert", "--out", "README.md"], "error: --out README.md is a file: name a directory"),
        (["convert", "--wandb"], "error: --wandb keeps its files beside the others: add --out DIR"),
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


@pytest.mark.slow
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


SMALL = ["--models", "repvgg_a0", "--resolution", "32", "--batch", "2", "--device", "cpu", "--threads", "1"]
QUICK = ["--warmup", "0", "--batches", "2", "--rounds", "2", "--no-memory"]


def rows(text: str) -> list[dict[str, str]]:
    """Of all tables of a page."""
    found: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-:"):
            found.append(dict(zip(header, cells, strict=True)))
    return found


@pytest.mark.slow
def test_inference_beside_another_implementation(tmp_path: Path) -> None:
    peer = ["--against", "support.peer:small", "--against-deploy", "support.peer:deploy"]
    layouts = ["--layouts", "channels_last", "contiguous", "--precisions", "float32", "bfloat16"]
    done = benchmark("inference", *SMALL, *QUICK, *peer, *layouts, "--out", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "new" / "inference.md").read_text()
    assert done.stdout == text
    lines = [row for row in rows(text) if "images/s" in row]
    compared = [row for row in rows(text) if "reason" in row or "ours, same conditions [×]" in row]
    assert len(lines) == 2 * len(compared) == 2 * 2 * 2 * 2  # sides, forms, precisions, layouts
    assert {row["whose"] for row in lines} == {"ours", "support.peer:small"}
    record = json.loads((tmp_path / "new" / "inference.json").read_text())
    assert record["protocol"]["rounds"] == 2
    assert record["machine"]["threads"] == 1
    assert [[len(times) for times in line["seconds"]] for line in record["lines"]] == [[2, 2]] * 16
    assert all(ratio["speed_of_ours"]["smallest"] > 0 for ratio in record["ratios"])
    assert (tmp_path / "new" / "inference.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_steps_with_memory_and_the_block_unfused() -> None:
    done = benchmark("train", *SMALL, *QUICK[:-1], "--unfused")
    assert done.returncode == 0, done.stderr[-2000:]
    ours, unfused, compared = rows(done.stdout)
    assert (ours["whose"], unfused["whose"], compared["whose"]) == ("ours", "ours, unfused", "ours, unfused")
    # Weights of 9.1 M parameters: their gradients alone are 35 MiB.
    assert all(35 < float(row["memory [MiB]"]) < 300 for row in (ours, unfused))
    assert "gradients are part of it" in done.stdout


def test_conversion_beside_one_that_has_none() -> None:
    done = benchmark("convert", "--models", "repvgg_a0", *QUICK, "--against", "support.peer:small")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = rows(done.stdout)
    assert row["whose"] == "ours"
    assert "- support.peer:small has no deploy form: --against-deploy module:callable" in done.stdout
    assert "left out: support.peer:small has no deploy form" in done.stderr


@pytest.mark.slow
def test_every_runtime_and_precision_runs(tmp_path: Path) -> None:
    runtimes = ["--runtimes", "eager", "compile", "onnxruntime", "openvino", "--forms", "deploy"]
    done = benchmark("inference", *SMALL, *QUICK, *runtimes, "--precisions", "float32", "int8", "--seed", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    measured = {(row["runtime"], row["precision"]) for row in rows(done.stdout)}
    names = ("eager", "compile", "onnxruntime", "openvino")
    assert measured == {(runtime, p) for runtime in names for p in ("float32", "int8")} - {("eager", "int8")}
    assert "left out: deploy int8 eager: a quantized graph runs compiled or in a runtime" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [(SPEED, "2 variants and their forms take turns"), (["train", *SMALL, "--no-memory"], "in which the lines")],
)
def test_ctrl_c_ends_a_measurement_too(arguments: list[str], begun: str, tmp_path: Path) -> None:
    command = [sys.executable, "src/benchmark.py", *arguments, "--batches", "1000000", "--out", str(tmp_path / "new")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert begun in running.stderr.readline()
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
