"""Whether a run that was disturbed left what an undisturbed one did, bit for bit, but for what was measured in time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

TIMED = ("bench/", "perf/", "reparam/convert_s")
Rows = dict[tuple[int, str], float]


def different(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ in anything but measured times."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in a.keys() | b.keys() if not str(k).startswith(TIMED)]
        return [d for k in keys for d in different(a.get(k, "missing"), b.get(k, "missing"), f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in different(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} and {b}"]


def checkpoint(directory: Path, name: str = "last.ckpt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(directory / "checkpoints" / name, weights_only=True)
    return content


def csv_files(directory: Path) -> list[Path]:
    """Those of all of a run's starts, oldest first."""
    older = sorted(directory.glob("metrics.*.csv"), key=lambda f: int(f.name.split(".")[1]))
    return [*older, directory / "metrics.csv"]


def logged(directory: Path) -> Rows:
    """What the CSV files of a run's starts say together: of what was logged twice, the last."""
    rows: Rows = {}
    for file in csv_files(directory):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, text in row.items():
                    if text and name not in ("step", "epoch") and not name.startswith(TIMED):
                        rows[int(row["step"]), name] = float(text)
    return rows
