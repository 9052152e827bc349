"""DiracNet's parameterization of a convolution (Table 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.model.affine import Affine, identity_map, require_geometry
from repvgg.model.branches import Branch, ConvShape
from repvgg.model.layers import weight_without_hooks


class Dirac(Branch):
    """A convolution with kernel ``diag(a) I + diag(b) W_norm`` (Zagoruyko and Komodakis, arXiv 1706.00388, section 3).

    W_norm has filters of Euclidean length 1. a and b hold a factor per output channel, 1 and 0.1 at first. Where input
    and output differ in shape there is no I and no a, as RepVGG has no identity there.

    Args:
        shape: the block's convolution.
        kernel_size: odd.

    Raises:
        ValueError: an even ``kernel_size``.
    """

    def __init__(self, shape: ConvShape, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not odd: it has no centre where I could be")
        self.shape = shape
        self.conv = nn.Conv2d(
            shape.in_channels,
            shape.out_channels,
            kernel_size,
            stride=shape.stride,
            padding=shape.dilation * (kernel_size // 2),
            dilation=shape.dilation,
            groups=shape.groups,
            bias=False,
        )
        self.a = nn.Parameter(torch.ones(shape.out_channels)) if shape.keeps_shape else None
        self.b = nn.Parameter(torch.full((shape.out_channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉."""
        conv = self.conv
        kernel = dirac_kernel(conv.weight, self.a, self.b, conv.groups)
        return F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        """I and the normalised filters, each scaled; no bias."""
        shape = self.shape
        require_geometry(self.conv, stride=shape.stride, dilation=shape.dilation, groups=shape.groups)
        weight = weight_without_hooks(self.conv).to(device, dtype)
        return Affine(dirac_kernel(weight, self.a, self.b, shape.groups), weight.new_zeros(len(weight)))


@torch.fx.wrap  # one node of a traced graph
def dirac_kernel(weight: Tensor, a: Tensor | None, b: Tensor, groups: int) -> Tensor:
    """``diag(a) I + diag(b) W_norm`` of W (O × I/g × k × k), in W's precision; no I without a."""
    none = weight.new_zeros(len(weight))
    lengths = torch.linalg.vector_norm(weight, dim=(1, 2, 3)).clamp_min(1e-12)  # a filter of zeros stays one
    total = Affine(weight, none).scaled(b.to(weight) / lengths, none)
    if a is None:
        return total.kernel
    identity = identity_map(len(weight), groups, dtype=weight.dtype, device=weight.device)
    return (total + identity.scaled(a.to(weight), none)).kernel
