"""Augmentation of whole training batches on the device: RandAugment on the pixels, mixup of images and labels.

The random numbers come from a numpy generator that the caller seeds (:func:`batch_generator`), so they are the same on
any device, and no other generator of the run is touched. N images per batch, uint8, N × 3 × H × W, RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Magnitudes go from 0 to this (Cubuk et al. 2020, and mmpretrain's ``total_level``).
TOP_LEVEL = 10


def batch_generator(seed: int, rank: int, epoch: int, batch: int) -> np.random.Generator:
    """A generator of its own for every batch: what a resumed run draws does not depend on what came before.

    numpy hashes the four numbers (``SeedSequence``).
    """
    return np.random.default_rng((seed, rank, epoch, batch))


def _luma(images: Tensor) -> Tensor:
    """Grey values, N × 1 × H × W: ITU-R 601-2 in PIL's fixed point."""
    weights = torch.tensor([19595, 38470, 7471], device=images.device, dtype=torch.int32).view(1, 3, 1, 1)
    return ((images.to(torch.int32) * weights).sum(1, keepdim=True, dtype=torch.int32) + 0x8000) >> 16


def _blend(dull: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``dull + factor (images − dull)``, cut to 0 … 255 and rounded down: PIL's Image.blend. factor: N."""
    dull = dull.to(torch.float32)
    return (dull + factor.view(-1, 1, 1, 1) * (images - dull)).clamp_(0, 255).to(torch.uint8)


def _histograms(images: Tensor) -> Tensor:
    """Counts of every value in every channel, N × 3 × 256."""
    values = images.flatten(2).long()
    return values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))


def _looked_up(table: Tensor, images: Tensor) -> Tensor:
    """Every value replaced by its entry in its channel's table, N × 3 × 256."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view(images.shape)


def auto_contrast(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Stretch every channel to 0 … 255; as PIL's ImageOps.autocontrast."""
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    low, high = images.amin((2, 3)).double()[..., None], images.amax((2, 3)).double()[..., None]
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)  # 255 / tensor would be 255 times a reciprocal
    stretched = (values * scale + -low * scale).clamp(0, 255)  # in PIL's order of operations
    return _looked_up(torch.where(high > low, stretched, values), images)


def equalize(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Make every channel's histogram flat; as PIL's ImageOps.equalize."""
    counts = _histograms(images)
    pixels = counts.sum(2, keepdim=True)
    of_the_brightest = counts.gather(2, images.amax((2, 3)).long()[..., None])
    step = (pixels - of_the_brightest) // 255
    before = counts.cumsum(2) - counts
    flat = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return _looked_up(torch.where(step > 0, flat, torch.arange(256, device=images.device)), images)


def invert(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """255 − value."""
    return 255 - images


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Counter-clockwise about the centre, nearest pixel."""
    height, width = images.shape[2:]
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    rows = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    return _warp(images, torch.stack(rows, 1), fill, smooth=False)


def posterize(images: Tensor, bits: Tensor, fill: Tensor) -> Tensor:
    """Keep the highest ``bits``, rounded up to a whole number, of every value."""
    mask = 256 - 2 ** (8 - bits.ceil())
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor, fill: Tensor) -> Tensor:
    """Invert what is not below the threshold."""
    return torch.where(images < threshold.view(-1, 1, 1, 1), images, 255 - images)


def solarize_add(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Add the amount, rounded down, to what is below 128."""
    brighter = (images.to(torch.int32) + amount.to(torch.int32).view(-1, 1, 1, 1)).clamp_max_(255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def color(images: Tensor, change: Tensor, fill: Tensor) -> Tensor:
    """Saturation times 1 + change; as PIL's ImageEnhance.Color."""
    return _blend(_luma(images), images, 1 + change)


def contrast(images: Tensor, change: Tensor, fill: Tensor) -> Tensor:
    """Contrast about the mean grey times 1 + change; as PIL's ImageEnhance.Contrast."""
    grey = (_luma(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(grey, images, 1 + change)


def brightness(images: Tensor, change: Tensor, fill: Tensor) -> Tensor:
    """Values times 1 + change; as PIL's ImageEnhance.Brightness."""
    return _blend(images.new_zeros(1, 1, 1, 1), images, 1 + change)


def sharpness(images: Tensor, change: Tensor, fill: Tensor) -> Tensor:
    """Away from or towards a smoothed image, whose border is the image's; as PIL's ImageEnhance.Sharpness."""
    sharp = images.to(torch.float32)
    smooth = sharp.clone()
    inner = sharp[:, :, 1:-1, 1:-1]
    # 3×3 ones, 5 in the middle, over 13: never halfway between two whole numbers, so that rounding is safe.
    smooth[:, :, 1:-1, 1:-1] = ((F.avg_pool2d(sharp, 3, stride=1) * 9 + inner * 4) / 13).round()
    return _blend(smooth, images, 1 + change)


def shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Row y moves by factor · y pixels, bilinear."""
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    return _warp(images, torch.stack([one, factor, zero, zero, one, zero], 1), fill, smooth=True)


def shear_y(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Column x moves by factor · x pixels, bilinear."""
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    return _warp(images, torch.stack([one, zero, zero, factor, one, zero], 1), fill, smooth=True)


def translate_x(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """To the left by this share of the width, nearest pixel."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return _warp(images, torch.stack([one, zero, share * images.shape[3], zero, one, zero], 1), fill, smooth=False)


def translate_y(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """Upwards by this share of the height, nearest pixel."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return _warp(images, torch.stack([one, zero, zero, zero, one, share * images.shape[2]], 1), fill, smooth=False)


def _warp(images: Tensor, matrices: Tensor, fill: Tensor, *, smooth: bool) -> Tensor:
    """PIL's Image.transform with an affine matrix a … f per image (N × 6).

    The output's pixel centre (x, y) shows the input at (a x + b y + c, d x + e y + f), and ``fill`` where that is
    outside.
    """
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = (torch.arange(height, device=images.device) + 0.5)[:, None]
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    column, row = a * x + b * y + c, d * x + e * y + f  # N × H × W each
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    flat = images.flatten(2)

    def pixels(rows: Tensor, columns: Tensor) -> Tensor:
        index = rows.clamp(0, height - 1).long() * width + columns.clamp(0, width - 1).long()
        return flat.gather(2, index.view(count, 1, -1).expand(-1, channels, -1)).view(images.shape)

    if smooth:
        left, top = (column - 0.5).floor(), (row - 0.5).floor()
        right, down = (column - 0.5 - left)[:, None], (row - 0.5 - top)[:, None]  # how far, 0 … 1
        upper = torch.lerp(pixels(top, left).float(), pixels(top, left + 1).float(), right)
        lower = torch.lerp(pixels(top + 1, left).float(), pixels(top + 1, left + 1).float(), right)
        warped = torch.lerp(upper, lower, down).to(torch.uint8)
    else:
        warped = pixels(row.floor(), column.floor())
    return torch.where(inside[:, None], warped, fill.view(1, -1, 1, 1))


@dataclass(frozen=True)
class Operation:
    """One way to change an image.

    Attributes:
        apply: images, an argument for each, and the colour of what comes from outside (3) to changed images.
        low, high: arguments at magnitudes 0 and 10.
        signed: whether half of the arguments are negated.
    """

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


#: mmpretrain's policies "timm_increasing" with their ranges, which are timm's `_RAND_INCREASING_TRANSFORMS`.
TIMM_INCREASING = (
    Operation(auto_contrast),
    Operation(equalize),
    Operation(invert),
    Operation(rotate, 0, 30, signed=True),
    Operation(posterize, 4, 0),
    Operation(solarize, 256, 0),
    Operation(solarize_add, 0, 110),
    Operation(color, 0, 0.9, signed=True),
    Operation(contrast, 0, 0.9, signed=True),
    Operation(brightness, 0, 0.9, signed=True),
    Operation(sharpness, 0, 0.9, signed=True),
    Operation(shear_x, 0, 0.3, signed=True),
    Operation(shear_y, 0, 0.3, signed=True),
    Operation(translate_x, 0, 0.45, signed=True),
    Operation(translate_y, 0, 0.45, signed=True),
)


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020) as mmpretrain trains RepVGG with it, each image with operations of its own.

    ``operations`` times: one of 15 operations at random, the same one again included; it is applied with
    ``probability``, at a normally distributed magnitude cut to 0 … 10. Shears are bilinear here, bicubic there.

    Args:
        operations: per image.
        magnitude: mean, 0 … 10.
        std: of the magnitude.
        probability: that a chosen operation is applied (mmpretrain and timm: 0.5).

    Raises:
        ValueError: a value out of range.
    """

    operations: int = 2
    magnitude: float = 7.0
    std: float = 0.5
    probability: float = 0.5

    def __post_init__(self) -> None:
        for name, low, high in (("operations", 1, 10), ("magnitude", 0, TOP_LEVEL), ("std", 0, TOP_LEVEL)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"recipe.rand_augment.{name}={getattr(self, name)} must lie in {low} … {high}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"recipe.rand_augment.probability={self.probability} must lie in 0 … 1")

    def __call__(self, images: Tensor, rng: np.random.Generator, fill: Sequence[float]) -> Tensor:
        """A new batch, uint8. ``fill``: three values, of what comes from outside the image (mmpretrain: the mean)."""
        if images.dtype != torch.uint8:
            raise ValueError(f"RandAugment works on uint8 pixels, got {images.dtype}")
        images = images.clone()
        colour = torch.tensor(np.rint(fill), dtype=torch.uint8).to(images.device, non_blocking=True)
        for _ in range(self.operations):
            number, arguments = self._draw(len(images), rng)
            order = np.argsort(number, kind="stable")
            # One copy to the device for all operations, and none that waits for it.
            rows = torch.from_numpy(order).to(images.device, non_blocking=True)
            values = torch.from_numpy(arguments[order]).to(images.device, non_blocking=True)
            ends = np.searchsorted(number[order], np.arange(len(TIMM_INCREASING) + 1))
            for operation, begin, end in zip(TIMM_INCREASING, ends[:-1], ends[1:], strict=True):
                if begin < end:
                    images[rows[begin:end]] = operation.apply(images[rows[begin:end]], values[begin:end], colour)
        return images

    def _draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Each image's operation (one past the last for none) and its argument."""
        number = rng.integers(len(TIMM_INCREASING), size=count)
        share = rng.normal(self.magnitude, self.std, count).clip(0, TOP_LEVEL) / TOP_LEVEL
        negated = rng.random(count) < 0.5
        applied = rng.random(count) < self.probability
        low, high, signed = (
            np.array([getattr(o, name) for o in TIMM_INCREASING]) for name in ("low", "high", "signed")
        )
        arguments = low[number] + share * (high - low)[number]
        arguments = np.where(signed[number] & negated, -arguments, arguments)
        return np.where(applied, number, len(TIMM_INCREASING)), arguments.astype(np.float32)


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Every image mixed with another of the batch, and its label too (Zhang et al. 2018, equation 1).

    λ ~ Beta(α, α), one per batch (as the paper's code and mmpretrain's).

    Args:
        images: N × C × H × W, floating point.
        labels: N, int64.

    Returns:
        λ x + (1 − λ) x', and shares of the classes N × num_classes of the images' dtype (at least float32).
    """
    share = rng.beta(alpha, alpha)
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device, non_blocking=True)
    dtype = torch.promote_types(images.dtype, torch.float32)
    targets = F.one_hot(labels, num_classes).to(dtype)
    return images * share + images[partner] * (1 - share), targets * share + targets[partner] * (1 - share)
