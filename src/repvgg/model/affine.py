"""The algebra of re-parameterization: pure functions on the affine maps that a block's branches are.

Every re-parameterizable thing is ``x -> conv2d(x, kernel, padding=dilation * (k // 2)) + bias`` (paper, section 3.3,
Figure 4). Two such maps add, one of them followed by an eval-mode batch normalisation is another, and so is a 1×1 map
followed by any: that is all.

Letters: O output channels, I input channels, g groups, k kernel size (odd).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """The map ``x -> conv2d(x, kernel) + bias``, zero-padded so that the kernel's centre sits on the pixel.

    Stride, groups and dilation belong to the block, not to the map: only maps of one block are ever added.

    Attributes:
        kernel: O × I/g × k × k', both sizes odd.
        bias: O.

    Raises:
        ValueError: an even kernel, which has no centre to align with others, or shapes that do not fit.
    """

    kernel: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.kernel.ndim != 4:
            raise ValueError(f"a kernel is O x I/g x k x k, this one has shape {tuple(self.kernel.shape)}")
        if any(size % 2 == 0 for size in self.kernel.shape[2:]):
            size = "x".join(map(str, self.kernel.shape[2:]))
            raise ValueError(f"a {size} kernel has no centre pixel: only odd sizes can be added and fused")
        if self.bias.shape != self.kernel.shape[:1]:
            raise ValueError(
                f"bias of shape {tuple(self.bias.shape)} for a kernel of {self.kernel.shape[0]} output channels"
            )

    def __add__(self, other: Affine) -> Affine:
        """The sum of both maps; the smaller kernel is zero-padded about its centre (paper, section 3.3)."""
        height = max(self.kernel.shape[2], other.kernel.shape[2])
        width = max(self.kernel.shape[3], other.kernel.shape[3])
        a, b = self.padded_to(height, width), other.padded_to(height, width)
        if a.kernel.shape != b.kernel.shape:
            raise ValueError(f"kernels {tuple(a.kernel.shape)} and {tuple(b.kernel.shape)} are not of one block")
        return Affine(a.kernel + b.kernel, a.bias + b.bias)

    def padded_to(self, height: int, width: int) -> Affine:
        """The same map with a kernel of at least ``height`` × ``width``, zeros around its centre."""
        rows = (height - self.kernel.shape[2]) // 2
        columns = (width - self.kernel.shape[3]) // 2
        if not rows and not columns:
            return self  # F.pad would copy what is most of the work: the 3×3 kernel
        return Affine(F.pad(self.kernel, (columns, columns, rows, rows)), self.bias)

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """This map followed by ``y -> scale * y + shift`` per output channel (scale, shift: O)."""
        return Affine(self.kernel * scale[:, None, None, None], self.bias * scale + shift)

    def then(self, outer: Affine, groups: int = 1) -> Affine:
        """This pointwise map followed by ``outer``, whose input is padded with this bias (DBB, arXiv 2103.13425, 3.2).

        This map's output over an image continued with zeros is its bias there; so padded, ``outer`` sees what it would
        see if only the image were padded. Padded with zeros, the borders would be another function, and no convolution.

        Args:
            outer: of as many input channels as this map has outputs.
            groups: of both maps.

        Raises:
            ValueError: a kernel of this map larger than 1×1, or channels that do not fit.
        """
        if self.kernel.shape[2:] != (1, 1):
            raise ValueError(f"only a 1x1 kernel is composed with another, this one is {tuple(self.kernel.shape)}")
        if self.kernel.shape[0] != outer.kernel.shape[1] * groups:
            raise ValueError(
                f"{self.kernel.shape[0]} outputs for a kernel {tuple(outer.kernel.shape)} of groups={groups}"
            )
        # m: the channels in between, of one group.
        first = self.kernel[:, :, 0, 0].unflatten(0, (groups, -1))
        second = outer.kernel.unflatten(0, (groups, -1))
        kernel = torch.einsum("gmi,gomhw->goihw", first, second).flatten(0, 1)
        bias = torch.einsum("gm,gomhw->go", self.bias.unflatten(0, (groups, -1)), second).flatten()
        return Affine(kernel, bias + outer.bias)

    def then_norm(self, norm: nn.Module) -> Affine:
        """This map followed by ``norm`` as it is in eval mode (equation 3); ``nn.Identity`` changes nothing."""
        return self if isinstance(norm, nn.Identity) else self.scaled(*norm_as_affine(norm, self.kernel))


def norm_as_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``γ / sqrt(σ² + ε)`` and shift ``β − μ γ / sqrt(σ² + ε)`` of an eval-mode BatchNorm (equation 2).

    Returns:
        scale and shift, each of shape (channels,), with the dtype and device of ``like``.

    Raises:
        ValueError: ``norm`` is no BatchNorm with running statistics, so it has no fixed scale.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"{type(norm).__name__} is not a batch normalisation, it cannot be folded into a kernel")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("this BatchNorm keeps no running statistics (track_running_stats=False): nothing to fold")
    scale = (norm.running_var.to(like) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(like)
    shift = -norm.running_mean.to(like) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(like)
    return scale, shift


def identity_map(channels: int, groups: int, *, dtype: torch.dtype, device: torch.device) -> Affine:
    """The identity as a 1×1 grouped convolution: channel i of a group reads channel i of that group."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, dtype=dtype, device=device)
    rows = torch.arange(channels, device=device)
    kernel[rows, rows % (channels // groups)] = 1
    return Affine(kernel, torch.zeros(channels, dtype=dtype, device=device))
