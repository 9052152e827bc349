"""What a block sums. A branch computes, and says which affine map it is now.

A design of your own is one class with these two methods, or, made of the classes here, only a YAML file in
``conf/ablation``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repvgg.model.affine import Affine, conv_as_affine, identity_map
from repvgg.model.fused import every
from repvgg.model.layers import NotAffineError


@dataclass(frozen=True)
class ConvShape:
    """What a block's branches have in common: the convolution that they all fuse into.

    Raises:
        ValueError: channels that the groups do not divide, or a stride or dilation below 1.
    """

    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide {self.in_channels} input and {self.out_channels} output channels"
            )
        if min(self.in_channels, self.out_channels, self.stride, self.groups, self.dilation) < 1:
            raise ValueError(f"channels, stride, groups and dilation are at least 1: {self}")

    @property
    def keeps_shape(self) -> bool:
        """Whether an output has the shape of its input, so that an identity branch can exist."""
        return self.in_channels == self.out_channels and self.stride == 1


class Branch(nn.Module):
    """One summand of a block: N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The map that this branch is in eval mode, computed in ``dtype`` and differentiable in the parameters.

        Raises:
            NotAffineError: the branch is no such map; this default is for branches with a nonlinearity inside.
        """
        raise NotAffineError(
            f"{type(self).__name__} says of no affine map that it equals it: a block with such a branch cannot "
            "become one convolution. Give the class an affine() method (summand() where a nonlinearity follows a map), "
            "or train without this branch",
            self,
        )

    def summand(self, shape: ConvShape, dtype: torch.dtype, device: torch.device) -> Summand:
        """What computes this branch in the deploy form of a block that has a nonlinearity in a branch.

        Args:
            shape: the block's convolution.
            dtype: the precision of the folding.
            device: of the block.

        Raises:
            NotAffineError: the branch is no map followed by an activation; this default, no map.
        """
        return Summand(self.affine(dtype, device), shape, nn.Identity())


@dataclass(frozen=True)
class Summand:
    """``activation(affine(x))``: a branch, deployed in a block that cannot become one convolution.

    Attributes:
        affine: the map.
        shape: the convolution that it is; the groups may be others than the block's.
        activation: ``nn.Identity`` for none.
    """

    affine: Affine
    shape: ConvShape
    activation: nn.Module


class Normed(Branch):
    """A map and then its BatchNorm: a block may normalise, sum and rectify such branches at once while it trains.

    Attributes:
        bn: the BatchNorm, or ``nn.Identity``.
        subsample: of how many rows and columns of the input the branch reads one.
        makes_map: ``before_norm`` gives a new map, which no backward but the BatchNorm's reads.
    """

    bn: nn.Module
    subsample = 1
    makes_map = False

    def before_norm(self, x: Tensor) -> Tensor:
        """The pixels that the branch reads, to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉, not yet normalised."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""
        normalized: Tensor = self.bn(self.before_norm(every(x, self.subsample)))
        return normalized


#: Makes a branch for a shape, or None where the design has none there. What the YAML files of conf/ablation list.
BranchFactory = Callable[[ConvShape], Branch | None]


class ConvBN(Normed):
    """A k×k' convolution without bias and its BatchNorm; k = k' = 1 is the paper's 1×1 branch (section 3.2).

    Args:
        shape: the block's convolution.
        kernel_size: odd, one number for a square or two: (1, 3) and (3, 1) are ACB's (Table 7).
        norm: False leaves the BatchNorm out (post-addition BN of Table 7; the 1×1 branch of QARepVGG).

    Raises:
        ValueError: an even ``kernel_size``.
    """

    makes_map = True

    def __init__(self, shape: ConvShape, kernel_size: int | Sequence[int] = 3, norm: bool = True) -> None:
        super().__init__()
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if min(height, width) < 1 or not height % 2 or not width % 2:
            raise ValueError(f"kernel_size={kernel_size} is not odd: it has no centre to align with other branches")
        # A 1×1 convolution with stride s reads every s-th pixel and nothing else. Taking those pixels first is the
        # same map; the strided kernel's backward in channels_last writes outside of its memory on a CPU (torch 2.13,
        # fewer than 16 input channels, large maps: stage 0's 1×1 branch exactly).
        pointwise = height == width == 1
        self.shape = shape
        self.subsample = shape.stride if pointwise else 1
        self.conv = nn.Conv2d(
            shape.in_channels,
            shape.out_channels,
            (height, width),
            stride=1 if pointwise else shape.stride,
            padding=(shape.dilation * (height // 2), shape.dilation * (width // 2)),
            dilation=shape.dilation,
            groups=shape.groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(shape.out_channels) if norm else nn.Identity()

    def before_norm(self, x: Tensor) -> Tensor:
        """The convolution."""
        convolved: Tensor = self.conv(x)
        return convolved

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The kernel, scaled by the BatchNorm (equation 3)."""
        stride, dilation, groups = self.shape.stride // self.subsample, self.shape.dilation, self.shape.groups
        convolution = conv_as_affine(self.conv, dtype, device, stride=stride, dilation=dilation, groups=groups)
        if self.subsample > 1 and convolution.shape[2:] != (1, 1):
            raise NotAffineError("a kernel above 1x1 on every n-th pixel is no strided convolution", self.conv)
        return convolution.then_norm(self.bn)


class Identity(Normed):
    """The identity and its BatchNorm (paper, section 3.2), or the bare identity of Table 7.

    Args:
        shape: the block's convolution; it must keep the shape of its input.
        norm: False leaves the BatchNorm out.

    Raises:
        ValueError: a shape with other output channels than input channels, or with a stride.
    """

    def __init__(self, shape: ConvShape, norm: bool = True) -> None:
        super().__init__()
        if not shape.keeps_shape:
            raise ValueError(f"no identity from {shape}: use Identity.where_it_fits to leave it out there")
        self.channels, self.groups = shape.in_channels, shape.groups
        self.bn = nn.BatchNorm2d(shape.out_channels) if norm else nn.Identity()

    @classmethod
    def where_it_fits(cls, shape: ConvShape, norm: bool = True) -> Identity | None:
        """The branch, or None where input and output differ in shape (the first block of every stage)."""
        return cls(shape, norm) if shape.keeps_shape else None

    def before_norm(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """A 1×1 kernel of zeros and ones, scaled by the BatchNorm."""
        return identity_map(self.channels, self.groups, dtype=dtype, device=device).then_norm(self.bn)

    def summand(self, shape: ConvShape, dtype: torch.dtype, device: torch.device) -> Summand:
        """A factor and a bias per channel: as many groups as channels, whatever the block has."""
        per_channel = identity_map(self.channels, self.channels, dtype=dtype, device=device).then_norm(self.bn)
        return Summand(per_channel, replace(shape, groups=self.channels), nn.Identity())
