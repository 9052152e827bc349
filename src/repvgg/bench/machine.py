"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from repvgg.learn.devices import device_name


def machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores, threads."""
    return {
        "device": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str | int | None]:
    """Python, torch and its libraries, and whichever of ``packages`` are installed."""
    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
