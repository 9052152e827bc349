"""The composed branches of the diverse branch block (DBB; Ding et al., CVPR 2021, arXiv 2103.13425, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.model.affine import Affine, conv_as_affine, identity_map, norm_as_affine
from repvgg.model.branches import Branch, ConvShape
from repvgg.model.layers import NotAffineError, in_order, other_forward, unwrapped


class _Pointwise(nn.Module):
    """A 1×1 convolution and its BatchNorm, padded with what they make of zeros (their section 3.2, transform III).

    In training too, that border is of the running statistics, as in the authors' code: the batch's are of the image.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, padding: int) -> None:
        super().__init__()
        self.padding, self.groups = padding, groups
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × (H + 2 padding) × (W + 2 padding)."""
        y = self.bn(self.conv(x))
        scale, of_zeros = norm_as_affine(self.bn, y if self.bn.weight is None else self.bn.weight)
        if (bias := getattr(self.conv, "bias", None)) is not None:
            of_zeros = of_zeros + scale * bias
        frame = F.pad(y.new_zeros(y.shape[2:]), (self.padding,) * 4, value=1.0)
        return F.pad(y, (self.padding,) * 4) + of_zeros.to(y.dtype)[:, None, None] * frame

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The kernel, scaled by the BatchNorm."""
        if in_order(self.conv) != [unwrapped(self.conv)]:  # the border would not know its bias
            raise NotAffineError(f"{type(self.conv).__name__} is not a Conv2d", self.conv)
        return conv_as_affine(self.conv, dtype, device, groups=self.groups).then_norm(self.bn)


def _padding(shape: ConvShape, kernel_size: int) -> int:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not odd: it has no centre to align with other branches")
    return shape.dilation * (kernel_size // 2)


class PointwiseConv(Branch):
    """1×1 convolution, BN, k×k convolution, BN (DBB's "1×1 – K×K").

    The first keeps the number of channels and starts as the identity (their section 4.1).

    Args:
        shape: the block's convolution.
        kernel_size: of the second, odd.

    Raises:
        ValueError: an even ``kernel_size``.
    """

    def __init__(self, shape: ConvShape, kernel_size: int = 3) -> None:
        super().__init__()
        self.shape = shape
        channels = shape.in_channels
        self.first = _Pointwise(channels, channels, shape.groups, _padding(shape, kernel_size))
        nn.init.dirac_(self.first.conv.weight, shape.groups)
        self.conv = nn.Conv2d(
            channels,
            shape.out_channels,
            kernel_size,
            stride=shape.stride,
            dilation=shape.dilation,
            groups=shape.groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(shape.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉."""
        return self.bn(self.conv(self.first(x)))

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """Both convolutions as one."""
        stride, dilation, groups = self.shape.stride, self.shape.dilation, self.shape.groups
        outer = conv_as_affine(self.conv, dtype, device, stride=stride, dilation=dilation, groups=groups, padded=False)
        if any(dilation * (size // 2) != self.first.padding for size in outer.shape[2:]):
            raise NotAffineError(f"a kernel {tuple(outer.shape)} after padding by {self.first.padding}", self.conv)
        return self.first.affine(dtype, device).then(outer, groups).then_norm(self.bn)


class PointwiseAverage(Branch):
    """1×1 convolution, BN, k×k average with the block's stride, BN (DBB's "1×1 – AVG").

    Args:
        shape: the block's convolution.
        kernel_size: of the average, odd.

    Raises:
        ValueError: an even ``kernel_size``, or a dilated block: torch's average pooling has no dilation.
    """

    def __init__(self, shape: ConvShape, kernel_size: int = 3) -> None:
        super().__init__()
        if shape.dilation != 1:
            raise ValueError(f"no average pooling with dilation={shape.dilation}: leave PointwiseAverage out there")
        self.shape = shape
        self.first = _Pointwise(shape.in_channels, shape.out_channels, shape.groups, _padding(shape, kernel_size))
        self.average = nn.AvgPool2d(kernel_size, shape.stride)
        self.bn = nn.BatchNorm2d(shape.out_channels)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉."""
        return self.bn(self.average(self.first(x)))

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The average as a convolution of each channel with itself, after the 1×1."""
        channels, groups, k, pool = self.shape.out_channels, self.shape.groups, self.kernel_size, self.average
        if other_forward(pool, nn.AvgPool2d) or pool.extra_repr() != nn.AvgPool2d(k, self.shape.stride).extra_repr():
            raise NotAffineError(f"{pool} is not the {k}x{k} average of stride {self.shape.stride} that folds", pool)
        own = identity_map(channels, groups, dtype=dtype, device=device)
        average = Affine(own.kernel.expand(-1, -1, k, k) / k**2, own.bias)
        return self.first.affine(dtype, device).then(average, groups).then_norm(self.bn)
