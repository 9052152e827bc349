"""Embedded images that a small network does not saturate: from which of 19 photographs is this patch?

The photographs are those that scikit-learn and scikit-image ship, free to use (their packages say by whom each is).
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repvgg.data.sources import InMemory

SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "cell",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "stereo_motorcycle",
    "text",
)
SKLEARN = ("china", "flower")
CELL = 64
"""Side in pixels of the squares that a photograph is divided into; each belongs to one split only."""
PER_CLASS = {"train": 100, "val": 60}


def describe_patches(split: str, image_size: int, seed: int) -> str:
    """The `description` of `patches(…)`, without reading anything."""
    count = f"{PER_CLASS.get(split)} gray patches of {image_size} px each"
    return f"photographs of scikit-learn and scikit-image, {split}, {count}, seed {seed}"


def patches(split: Literal["train", "val"], image_size: int = 32, seed: int = 0) -> InMemory:
    """Gray patches of 19 photographs, 100 (train) or 60 (val) of each; the label says which photograph.

    A photograph is cut into cells of 64×64 pixels. A third of them, drawn by `seed`, are for validation; every patch
    lies in one cell, so no pixel is in both splits. Gray, because the colours alone would tell most of them. Much of
    what is left cannot be told by anyone: sky is sky, black is black.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if not 1 <= image_size <= CELL:
        raise ValueError(
            f"patches are of cells of {CELL}×{CELL} pixels: image_size must lie in 1 … {CELL}, got {image_size}"
        )
    photographs = _photographs()
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, photograph in enumerate(photographs.values()):
        rng = np.random.default_rng([seed, label])
        rows, columns = (side // CELL for side in photograph.shape)
        cells = rng.permutation(rows * columns)
        held_out = len(cells) // 3
        cells = cells[:held_out] if split == "val" else cells[held_out:]
        rng = np.random.default_rng([seed, label, split == "val"])
        for i in range(PER_CLASS[split]):
            top, left = np.multiply(divmod(cells[i % len(cells)], columns), CELL) + rng.integers(
                0, CELL - image_size + 1, size=2
            )
            images.append(photograph[top : top + image_size, left : left + image_size])
            labels.append(label)
    return InMemory(
        images=np.stack(images),
        labels=np.array(labels),
        classes=list(photographs),
        description=describe_patches(split, image_size, seed),
    )


def _photographs() -> dict[str, NDArray[np.uint8]]:
    """Gray, height × width, by name."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    def gray(image: Any) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(image).convert("L"))

    found = {name: getattr(skimage.data, name)() for name in SKIMAGE}
    found["stereo_motorcycle"] = found["stereo_motorcycle"][0]  # left eye, right eye, disparity
    found |= {name: load_sample_image(f"{name}.jpg") for name in SKLEARN}
    return {name: gray(image) for name, image in found.items()}
