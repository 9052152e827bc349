"""Online convolutional re-parameterization (OREPA; Hu et al., CVPR 2022, arXiv 2204.00826)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.model.affine import Affine, identity_map
from repvgg.model.branches import Branch, ConvShape
from repvgg.model.layers import weight_without_hooks

#: Channels between the two convolutions of the separable one, per input channel.
EXPANSION = 8


class Orepa(Branch):
    """Six linear branches, each scaled per output channel, which are one kernel already while they train.

    No branch has a BN, so that kernels are summed in place of maps, and training costs one convolution per layer (and
    the sum). The branches, and their scales at first (``OREPA`` of the authors' code):

    - ``conv``: k×k (0.25);
    - ``average``: 1×1, then a k×k average (0.25);
    - ``prior``: 1×1, then a fixed k×k filter per output channel, see :func:`frequency_prior` (0);
    - ``first`` and ``second``: 1×1 of the input's channels, a kernel of zeros plus the identity, then k×k (0.5);
    - ``point``: 1×1 (1);
    - ``depthwise`` and ``pointwise``: k×k of each channel by itself into 8, then 1×1 (0.5).

    Kernels start as theirs do (He et al. 2015, uniform, gain √2). None has a bias.

    Args:
        shape: the block's convolution.
        kernel_size: k, odd.

    Raises:
        ValueError: an even ``kernel_size``.
    """

    def __init__(self, shape: ConvShape, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not odd: it has no centre to align with other branches")
        self.shape, self.kernel_size = shape, kernel_size
        channels, outputs, groups = shape.in_channels, shape.out_channels, shape.groups

        # Kernels lie in convolutions, whose type says that they are decayed. These are never called.
        def conv(inputs: int, outputs: int, kernel_size: int, groups: int = groups) -> nn.Conv2d:
            made = nn.Conv2d(inputs, outputs, kernel_size, groups=groups, bias=False)
            nn.init.kaiming_uniform_(made.weight)
            return made

        self.conv = conv(channels, outputs, kernel_size)
        self.average = conv(channels, outputs, 1)
        self.prior = conv(channels, outputs, 1)
        self.first = conv(channels, channels, 1)
        nn.init.zeros_(self.first.weight)
        self.second = conv(channels, outputs, kernel_size)
        self.point = conv(channels, outputs, 1)
        self.depthwise = conv(channels, EXPANSION * channels, kernel_size, groups=channels)
        self.pointwise = conv(EXPANSION * channels, outputs, 1)
        at_first = torch.tensor([0.25, 0.25, 0, 0.5, 1, 0.5])
        self.scale = nn.Parameter(at_first[:, None].repeat(1, outputs))  # branch × output channel
        self.register_buffer("frequencies", frequency_prior(outputs, kernel_size), persistent=False)

    def _tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """What the kernel is computed from, in ``dtype``: see :func:`orepa_kernel`."""
        maps = (self.conv, self.average, self.prior)
        composed = (self.first, self.second, self.point, self.depthwise, self.pointwise)
        tensors = (*map(weight_without_hooks, (*maps, *composed)), self.scale, self.get_buffer("frequencies"))
        return [tensor.to(device, dtype) for tensor in tensors]

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉."""
        shape = self.shape
        kernel = orepa_kernel(self._tensors(self.conv.weight.dtype, self.conv.weight.device), shape.groups)
        padding = shape.dilation * (self.kernel_size // 2)
        return F.conv2d(x, kernel, None, shape.stride, padding, shape.dilation, shape.groups)

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """The kernel that it trains with."""
        kernel = orepa_kernel(self._tensors(dtype, device), self.shape.groups)
        return Affine(kernel, kernel.new_zeros(len(kernel)))


@torch.fx.wrap  # one node of a traced graph
def orepa_kernel(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """The sum of the scaled branches, O × I/g × k × k.

    Args:
        tensors: the weights of ``conv``, ``average``, ``prior``, ``first``, ``second``, ``point``, ``depthwise`` and
            ``pointwise``, the scales and the frequencies, all of one precision.
        groups: of the block.
    """
    conv, average, prior, first, second, point, depthwise, pointwise, scales, frequencies = tensors
    k = conv.shape[-1]
    none = scales.new_zeros(len(conv))
    identity = identity_map(len(first), groups, dtype=conv.dtype, device=conv.device)
    depthwise = depthwise.unflatten(0, (groups, -1, EXPANSION))[:, :, :, 0]
    pointwise = pointwise[:, :, 0, 0].unflatten(0, (groups, -1)).unflatten(2, (-1, EXPANSION))
    branches = [
        conv,
        average.expand(-1, -1, k, k) / k**2,
        prior * frequencies[:, None],
        (identity + Affine(first, identity.bias)).then(Affine(second, none), groups).kernel,
        point,
        # g groups, i channels of one, m of the 8 that each becomes, o outputs of a group.
        torch.einsum("gimhw,goim->goihw", depthwise, pointwise).flatten(0, 1),
    ]
    total = Affine(torch.zeros_like(branches[0]), none)
    for scale, kernel in zip(scales, branches, strict=True):
        total = total + Affine(kernel, none).scaled(scale, none)
    return total.kernel


def frequency_prior(channels: int, kernel_size: int) -> Tensor:
    """Cosines, channels × k × k: along the rows for the first half of the channels, along the columns for the others.

    Channel c of a half (from 0) holds cos(π (p + 1/2) (c + 1) / k) at row or column p; frequencies above k are aliases
    of lower ones, as in the authors' code.
    """
    half = (channels + 1) // 2
    number = torch.arange(channels)
    frequency = torch.where(number < half, number, number - channels / 2) + 1
    place = torch.arange(kernel_size) + 0.5
    wave = torch.cos(math.pi / kernel_size * frequency[:, None] * place)
    rows = (number < half)[:, None, None]
    return torch.where(rows, wave[:, :, None], wave[:, None, :]).expand(-1, kernel_size, kernel_size).contiguous()
