"""What an exported file says of the images that it takes, and images made so with numpy and PIL alone.

The metadata of a file are strings, everything else in JSON:

    input_size      [C, H, W]
    dynamic_size    whether H and W may be others
    resize, crop    the image's shorter side in pixels, then the side of the square that is cut from its centre
    mean, std       per channel, in units of 0 … 255
    normalize       inside: the file takes pixels 0 … 255; outside: it takes (pixels - mean) / std
    classes         names, in the order of the logits
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB image to a network's input.

    Attributes:
        resize: pixels of the shorter side.
        crop: pixels of the centre's side, at most ``resize``.
        mean, std: per channel, in units of 0 … 255.
        inside: whether the file normalises by itself.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inside: bool

    @classmethod
    def of_validation(
        cls, crop: int, ratio: float, mean: Sequence[float], std: Sequence[float], *, inside: bool
    ) -> Preprocessing:
        """That of :class:`repvgg.data.transforms.CenterCrop`: shorter side to crop / ratio."""
        return cls(round(crop / ratio), crop, tuple(map(float, mean)), tuple(map(float, std)), inside)

    @classmethod
    def of_file(cls, metadata: Mapping[str, str]) -> Preprocessing:
        """What an exported file says.

        Raises:
            ValueError: it does not say it.
        """
        try:
            resize, crop = (int(json.loads(metadata[key])) for key in ("resize", "crop"))
            mean, std = (tuple(map(float, json.loads(metadata[key]))) for key in ("mean", "std"))
            inside = {"inside": True, "outside": False}[metadata["normalize"]]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"its metadata lack how images are prepared ({type(error).__name__}: {error})") from None
        return cls(resize, crop, mean, std, inside)

    def metadata(self) -> dict[str, str]:
        """For the file; ``normalize`` is the exporter's to say."""
        said = {"resize": self.resize, "crop": self.crop, "mean": list(self.mean), "std": list(self.std)}
        return {key: json.dumps(value) for key, value in said.items()}

    def cut(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image to crop × crop × 3: torchvision's Resize and CenterCrop, bilinear with antialiasing.

        The validation loader cuts the same box in one interpolation; PIL rounds to whole levels in between.
        """
        shorter = min(image.size)
        width, height = (self.resize * side // shorter for side in image.size)  # cut, not rounded
        left, top = (round((side - self.crop) / 2) for side in (width, height))
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + self.crop, top + self.crop)))

    def batch(self, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Crops, H × W × C each, to what the file takes: N × C × H × W."""
        images = np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32)
        if not self.inside:
            images -= np.asarray(self.mean, dtype=np.float32)[:, None, None]
            images /= np.asarray(self.std, dtype=np.float32)[:, None, None]
        return np.ascontiguousarray(images)


def class_names(metadata: Mapping[str, str]) -> list[str] | None:
    """Of an exported file; None where it has none."""
    names = json.loads(metadata.get("classes", "null"))
    return None if names is None else [str(name) for name in names]
