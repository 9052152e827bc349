"""`python src/train.py` on the embedded digits, small enough for seconds, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "src/train.py"]


def heavy(*values: object) -> object:
    """A case of a parametrized test that takes seconds, because torch and Lightning must be imported for it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def small(digits: Path, root: Path, *more: str, epochs: int = 1) -> list[str]:
    """Overrides of a training of a quarter of A0's width; everything it writes is under ``root``."""
    return [
        *("model=repvgg_a0", "data=digits", "trainer=cpu", "recipe=quick", "logger=wandb_offline"),
        *("net.width_a=0.25", "net.width_b=0.25", "bench.warmup=1", "bench.batches=2", "bench.batch=8"),
        *(f"data.dir={digits}", f"root={root}", f"trainer.max_epochs={epochs}"),
        *("+trainer.enable_progress_bar=false", "data.num_threads=1"),
        *more,
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """With what it prints in a file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_until(condition: Callable[[], object], what: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.1)


def only_run(root: Path) -> Path:
    (run,) = (root / "outputs").iterdir()
    return run


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def begun(root: Path) -> bool:
    """Whether a first epoch has been trained."""
    return any(root.glob("outputs/*/checkpoints/last.ckpt"))


def assert_same_training(one: Path, other: Path) -> None:
    """Weights, averages and momenta of the last checkpoints, bit for bit."""
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other))
    assert a["global_step"] == b["global_step"] > 0
    assert a["state_dict"].keys() == b["state_dict"].keys()
    different = [name for name, value in a["state_dict"].items() if not torch.equal(value, b["state_dict"][name])]
    assert not different
    for mine, theirs in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert mine["state"].keys() == theirs["state"].keys()
        for number, state in mine["state"].items():
            assert torch.equal(state["momentum_buffer"], theirs["state"][number]["momentum_buffer"])
