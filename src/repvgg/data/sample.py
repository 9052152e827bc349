"""Some images of a file, drawn at random: to calibrate or to check with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repvgg.data.loader import make_loader
from repvgg.data.manifest import read_manifest
from repvgg.data.transforms import Transform

#: Images that are decoded at once.
BATCH = 64


def drawn_images(
    path: str | Path, *, transform: Transform, images: int, seed: int, key: str = "images", **options: Any
) -> Tensor:
    """Different images of a ``.beton`` file, uint8 N × 3 × H × W, in the file's order; only these are read.

    Args:
        transform: the crop.
        images: how many.
        seed: of the draw, which nothing else depends on.
        key: what a user calls ``images``, for the error.
        options: of :func:`repvgg.data.loader.make_loader`.

    Raises:
        ValueError: less than one image, or more than the file holds.
    """
    there = read_manifest(path).samples
    if images < 1:
        raise ValueError(f"{key}={images} must be at least 1")
    if images > there:
        raise ValueError(f"{key}={images}, but {path} holds {there}: {key}={there} takes all")
    records = np.sort(np.random.default_rng(seed).choice(there, images, replace=False))
    loader = make_loader(
        path, transform=transform, batch_size=min(BATCH, images), train=False, records=records.tolist(), **options
    )
    # Copies: the loader's tensors are slots of a ring.
    return torch.cat([pixels.clone() for pixels, _ in loader])
