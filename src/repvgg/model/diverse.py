"""The composed branches of the diverse branch block (DBB; Ding et al., CVPR 2021, arXiv 2103.13425, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.model.affine import Affine, identity_map, norm_as_affine
from repvgg.model.branches import Branch, ConvShape


class _Pointwise(nn.Module):
    """A 1×1 convolution and its BatchNorm, padded with what they make of zeros (their section 3.2, transform III).

    In training too, that border is of the running statistics, as in the authors' code: the batch's are of the image.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × (H + 2 padding) × (W + 2 padding)."""
        y = self.bn(self.conv(x))
        of_zeros = norm_as_affine(self.bn, self.bn.weight)[1].to(y.dtype)[:, None, None]
        frame = F.pad(y.new_zeros(y.shape[2:]), (self.padding,) * 4, value=1.0)
        return F.pad(y, (self.padding,) * 4) + of_zeros * frame

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The kernel, scaled by the BatchNorm."""
        kernel = self.conv.weight.to(device, dtype)
        return Affine(kernel, kernel.new_zeros(len(kernel))).then_norm(self.bn)


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
        kernel = self.conv.weight.to(device, dtype)
        outer = Affine(kernel, kernel.new_zeros(len(kernel)))
        return self.first.affine(dtype, device).then(outer, self.conv.groups).then_norm(self.bn)


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
        self.first = _Pointwise(shape.in_channels, shape.out_channels, shape.groups, _padding(shape, kernel_size))
        self.average = nn.AvgPool2d(kernel_size, shape.stride)
        self.bn = nn.BatchNorm2d(shape.out_channels)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉."""
        return self.bn(self.average(self.first(x)))

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The average as a convolution of each channel with itself, after the 1×1."""
        channels, groups, k = self.bn.num_features, self.first.conv.groups, self.kernel_size
        own = identity_map(channels, groups, dtype=dtype, device=device)
        average = Affine(own.kernel.expand(-1, -1, k, k) / k**2, own.bias)
        return self.first.affine(dtype, device).then(average, groups).then_norm(self.bn)
