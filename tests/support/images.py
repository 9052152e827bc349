"""Images for tests: photographs that scikit-learn ships, and sources that writers' worker processes can import."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg.data.sources import ImageSource, Sample


class First(ImageSource):
    """The first ``count`` images of a source."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self.count, self.classes = source, count, source.classes
        self.description = f"the first {count} of {source.description}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]


@cache
def photos() -> tuple[Image.Image, ...]:
    """A temple and a flower, 640×427 pixels each."""
    from sklearn.datasets import load_sample_image

    return tuple(Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))


def photo(rng: np.random.Generator, size: tuple[int, int], label: int = 0) -> Image.Image:
    """A random part of one of the photographs, scaled to ``size`` (width, height). Even labels are the temple.

    Labels of one photograph differ in the order of their colour channels, so that classes can be learnt.
    """
    whole = photos()[label % 2]
    width, height = size
    scale = rng.uniform(0.5, 1.0) * min(whole.width / width, whole.height / height)
    left = rng.uniform(0, whole.width - scale * width)
    top = rng.uniform(0, whole.height - scale * height)
    part = whole.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + scale * width, top + scale * height))
    orders = ("RGB", "GRB", "BGR", "RBG", "GBR", "BRG")
    channels = dict(zip("RGB", part.split(), strict=True))
    return Image.merge("RGB", [channels[name] for name in orders[label // 2 % len(orders)]])


def photo_folder(
    directory: str | Path,
    classes: int = 3,
    per_class: int = 8,
    size: tuple[int, int] = (500, 375),
    *,
    seed: int = 0,
    quality: int = 92,
) -> Path:
    """Fill ``directory``/class_0 … with JPEG photographs of about ``size`` (sides vary by 10 %), and return it.

    The same arguments give the same files; another seed gives other parts of the same photographs.
    """
    rng = np.random.default_rng(seed)
    for label in range(classes):
        folder = Path(directory) / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            width, height = (round(side * rng.uniform(0.9, 1.1)) for side in size)
            photo(rng, (width, height), label).save(folder / f"{number:04}.jpg", quality=quality)
    return Path(directory)
