"""Networks of conf/, small enough to export in a second, and files that they became."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from support.networks import randomize

ROOT = Path(__file__).parents[2]


def network(*overrides: str, classes: int = 7) -> nn.Module:
    """A network in train form as ``python src/train.py`` would build it, with statistics that hide no mistake."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=[*overrides, "data=imagenet"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: nn.Module = instantiate(config.net, num_classes=classes)
    return randomize(net).eval()


def images(*shape: int, seed: int = 0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * high


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2."""
    return ((got - wanted).norm() / wanted.norm()).item()
