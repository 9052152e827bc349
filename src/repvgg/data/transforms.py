"""Which part of a stored image becomes the network's input. Geometry only: no pixels, no code generation.

A transform answers one question for a batch: which box of each stored image (and mirrored or not) becomes the
size × size output? A box inside the image is resized to the output, without aliasing; a box that reaches over the edge
must already have the output's size, and what lies outside is black. That covers all three below, and any new crop is a
class with these two methods.

N images per batch; heights and widths are those of the stored images, in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Draw = Callable[[int], NDArray[np.float64]]
"""draw(k) is the k-th uniform number in [0, 1) of every image of the batch, shape (N,)."""


@dataclass(frozen=True)
class Boxes:
    """One box per image, each field of shape (N,): rows top … top+height, columns left … left+width.

    With `cut_first` the resize sees the box only, as if it had been cut out before, and its edges are whole numbers.
    Otherwise it sees the pixels around the box too, as if the whole image had been resized and cut then; edges may
    lie between pixels.
    """

    top: Ints | Floats
    left: Ints | Floats
    height: Ints | Floats
    width: Ints | Floats
    mirrored: NDArray[np.bool_]
    cut_first: bool = True


class Transform(Protocol):
    """A crop to size × size pixels."""

    @property
    def size(self) -> int:
        """Side of the output in pixels."""
        ...

    def check(self, heights: Ints, widths: Ints) -> None:
        """Raise ValueError when images of these sizes cannot be cropped so."""
        ...

    def boxes(self, heights: Ints, widths: Ints, draw: Draw) -> Boxes:
        """One box per image."""
        ...


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number of pixels ≥ 1, got {value!r}")
    return int(value)


def _interval(name: str, value: Sequence[float], upper: float) -> tuple[float, float]:
    pair = tuple(float(v) for v in value)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= upper:
        limit = f" ≤ {upper:g}" if math.isfinite(upper) else ""
        raise ValueError(f"{name} must be two numbers with 0 < low ≤ high{limit}, got {list(value)!r}")
    return pair[0], pair[1]


def _flip(flip: bool, draw: Draw, number: int, count: int) -> NDArray[np.bool_]:
    return draw(number) < 0.5 if flip else np.zeros(count, dtype=np.bool_)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized: ImageNet's training crop.

    Area uniform in `scale` (fraction of the image), aspect ratio w/h log-uniform in `ratio`; ten tries to fit a box
    into the image, then the largest centred box whose ratio is allowed. This is torchvision's sampling law.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    TRIES = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _positive_int("RandomResizedCrop.size", self.size))
        object.__setattr__(self, "scale", _interval("RandomResizedCrop.scale", self.scale, 1.0))
        object.__setattr__(self, "ratio", _interval("RandomResizedCrop.ratio", self.ratio, math.inf))

    def check(self, heights: Ints, widths: Ints) -> None:
        """Any image will do."""

    def boxes(self, heights: Ints, widths: Ints, draw: Draw) -> Boxes:
        """Draws 0 … 19 are area and ratio of each try, 20 and 21 the position, 22 the flip."""
        area, log_ratio = heights * widths, np.log(self.ratio)
        height, width = self._fallback(heights, widths)
        pending = np.ones(len(heights), dtype=np.bool_)
        for attempt in range(self.TRIES):
            target = area * (self.scale[0] + draw(2 * attempt) * (self.scale[1] - self.scale[0]))
            aspect = np.exp(log_ratio[0] + draw(2 * attempt + 1) * (log_ratio[1] - log_ratio[0]))
            w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
            h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
            fits = pending & (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
            height, width = np.where(fits, h, height), np.where(fits, w, width)
            pending &= ~fits
            if not pending.any():
                break
        position = 2 * self.TRIES
        top = np.floor(draw(position) * (heights - height + 1)).astype(np.int64)
        left = np.floor(draw(position + 1) * (widths - width + 1)).astype(np.int64)
        top = np.where(pending, (heights - height) // 2, top)
        left = np.where(pending, (widths - width) // 2, left)
        return Boxes(top, left, height, width, _flip(self.flip, draw, position + 2, len(heights)))

    def _fallback(self, heights: Ints, widths: Ints) -> tuple[Ints, Ints]:
        """The whole image, cut to the nearest allowed aspect ratio."""
        narrowest, widest = self.ratio
        height = np.minimum(heights, np.rint(widths / narrowest).astype(np.int64))
        width = np.minimum(widths, np.rint(heights * widest).astype(np.int64))
        return np.maximum(height, 1), np.maximum(width, 1)


@dataclass(frozen=True)
class PadCrop:
    """A random shift by up to `padding` pixels each way, black where the image ends: the small-image crop.

    Same as zero-padding all sides and cropping at a uniform offset. Stored images must be size × size.
    """

    size: int
    padding: int
    flip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _positive_int("PadCrop.size", self.size))
        if isinstance(self.padding, bool) or int(self.padding) != self.padding or self.padding < 0:
            raise ValueError(f"PadCrop.padding must be a whole number of pixels ≥ 0, got {self.padding!r}")
        object.__setattr__(self, "padding", int(self.padding))

    def check(self, heights: Ints, widths: Ints) -> None:
        """Raise ValueError unless all images are size × size."""
        wrong = (heights != self.size) | (widths != self.size)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"PadCrop(size={self.size}) needs stored images of exactly {self.size}×{self.size} pixels, but "
                f"record {first} is {heights[first]}×{widths[first]} (height×width). Use RandomResizedCrop, or write "
                f"the data at {self.size} pixels."
            )

    def boxes(self, heights: Ints, widths: Ints, draw: Draw) -> Boxes:
        """Draws 0 and 1 are the position, 2 the flip."""
        choices = 2 * self.padding + 1
        top = np.floor(draw(0) * choices).astype(np.int64) - self.padding
        left = np.floor(draw(1) * choices).astype(np.int64) - self.padding
        side = np.full(len(heights), self.size, dtype=np.int64)
        return Boxes(top, left, side, side, _flip(self.flip, draw, 2, len(heights)))


@dataclass(frozen=True)
class CenterCrop:
    """The shorter side resized to size/ratio pixels, the centre cut out: validation's crop (256, then 224).

    The box of the stored image that torchvision's Resize and CenterCrop show, in one interpolation: sides that are
    rounded to whole pixels there are rounded here too.
    """

    size: int
    ratio: float = 224 / 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _positive_int("CenterCrop.size", self.size))
        if not 0 < self.ratio <= 1:
            raise ValueError(f"CenterCrop.ratio must lie in (0, 1], got {self.ratio!r}")

    def check(self, heights: Ints, widths: Ints) -> None:
        """Any image will do."""

    def boxes(self, heights: Ints, widths: Ints, draw: Draw) -> Boxes:
        """No draws: the box depends on the image's size only."""
        shorter = np.minimum(heights, widths)
        to = round(self.size / self.ratio)

        def edge(side: Ints) -> tuple[Floats, Floats]:
            resized = to * side // shorter  # the longer side is cut to a whole number, as torchvision does
            scale = side / resized
            return np.rint((resized - self.size) / 2) * scale, self.size * scale

        (top, height), (left, width) = edge(heights), edge(widths)
        centred = np.zeros(len(heights), dtype=np.bool_)
        return Boxes(top, left, height, width, centred, cut_first=False)
