"""The algebra of re-parameterization: pure functions on the affine maps that a block's branches are.

Every re-parameterizable thing is ``x -> conv2d(x, kernel, padding=dilation * (k // 2)) + bias`` (paper, section 3.3,
Figure 4). Two such maps add, one of them followed by an eval-mode batch normalisation is another, and so is a 1×1 map
followed by any: that is all.

Letters: O output channels, I input channels, g groups, k kernel size (odd).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.model.layers import NotAffineError, copied, in_order, other_forward, unwrapped


class Affine:
    """The map ``x -> conv2d(x, kernel) + bias``, zero-padded so that the kernel's centre sits on the pixel.

    Stride, groups and dilation belong to the block, not to the map: only maps of one block are ever added. A map is
    never changed; what its methods give is new.

    Args:
        kernel: O × I/g × k × k', both sizes odd; of any precision that the bias' can hold.
        bias: O. Its dtype is the map's.
        factor: O, of each output channel's kernel, where it is not multiplied in yet; None for 1. A network's kernels
            are most of its memory: scaling them one BatchNorm after another would copy them each time.

    Raises:
        ValueError: an even kernel, which has no centre to align with others, or shapes that do not fit.
    """

    def __init__(self, kernel: Tensor, bias: Tensor, factor: Tensor | None = None) -> None:
        if kernel.ndim != 4:
            raise ValueError(f"a kernel is O x I/g x k x k, this one has shape {tuple(kernel.shape)}")
        if any(size % 2 == 0 for size in kernel.shape[2:]):
            size = "x".join(map(str, kernel.shape[2:]))
            raise ValueError(f"a {size} kernel has no centre pixel: only odd sizes can be added and fused")
        if bias.shape != kernel.shape[:1]:
            raise ValueError(f"bias of shape {tuple(bias.shape)} for a kernel of {kernel.shape[0]} output channels")
        self._kernel, self.bias, self._factor = kernel, bias, factor

    @property
    def kernel(self) -> Tensor:
        """O × I/g × k × k', of the bias' dtype."""
        if self._factor is None:
            return self._kernel.to(self.bias.dtype)
        return (self._kernel * self._factor[:, None, None, None]).to(self.bias.dtype)

    @property
    def shape(self) -> torch.Size:
        """Of the kernel."""
        return self._kernel.shape

    def rows(self, first: int, last: int) -> Affine:
        """The map to output channels ``first`` to ``last - 1``."""
        factor = None if self._factor is None else self._factor[first:last]
        return Affine(self._kernel[first:last], self.bias[first:last], factor)

    def __add__(self, other: Affine) -> Affine:
        """The sum of both maps; the smaller kernel is zero-padded about its centre (paper, section 3.3)."""
        height, width = _common_size([self, other])
        a, b = self.padded_to(height, width).kernel, other.padded_to(height, width).kernel
        if a.shape != b.shape:
            raise ValueError(f"kernels {tuple(a.shape)} and {tuple(b.shape)} are not of one block")
        return Affine(a + b, self.bias + other.bias)

    def padded_to(self, height: int, width: int) -> Affine:
        """The same map with a kernel of at least ``height`` × ``width``, zeros around its centre."""
        rows = (height - self.shape[2]) // 2
        columns = (width - self.shape[3]) // 2
        if not rows and not columns:
            return self  # F.pad would copy what is most of the work: the 3×3 kernel
        return Affine(F.pad(self._kernel, (columns, columns, rows, rows)), self.bias, self._factor)

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """This map followed by ``y -> scale * y + shift`` per output channel (scale, shift: O)."""
        factor = scale if self._factor is None else self._factor * scale
        return Affine(self._kernel, self.bias * scale + shift, factor)

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
        if self.shape[2:] != (1, 1):
            raise ValueError(f"only a 1x1 kernel is composed with another, this one is {tuple(self.shape)}")
        if self.shape[0] != outer.shape[1] * groups:
            raise ValueError(f"{self.shape[0]} outputs for a kernel {tuple(outer.shape)} of groups={groups}")
        # m: the channels in between, of one group.
        first = self.kernel[:, :, 0, 0].unflatten(0, (groups, -1))
        second = outer.kernel.unflatten(0, (groups, -1))
        kernel = torch.einsum("gmi,gomhw->goihw", first, second).flatten(0, 1)
        bias = torch.einsum("gm,gomhw->go", self.bias.unflatten(0, (groups, -1)), second).flatten()
        return Affine(kernel, bias + outer.bias)

    def then_norm(self, norm: nn.Module) -> Affine:
        """This map followed by ``norm`` as it is in eval mode (equation 3); ``nn.Identity`` changes nothing."""
        total = self
        for layer in in_order(norm):
            total = total.scaled(*norm_as_affine(layer, self.bias))
        return total


#: Numbers that are folded at a time: what the second-level cache of a core holds, in float64.
PIECE = 1 << 17


def folded(
    maps: Sequence[Affine], norm: nn.Module, *, dtype: torch.dtype, memory_format: torch.memory_format
) -> Affine:
    """``norm(sum of maps)`` cast to ``dtype``: the bits of adding, normalising and casting one after another.

    That would write and read every kernel again and again, in the precision of the folding. Here a few output channels
    at a time go through all of it, so that a network is read and written once.

    Args:
        maps: of one block; their bias' dtype is the precision of the folding.
        norm: a BatchNorm as it is in eval mode, or ``nn.Identity``.
        dtype: of the result.
        memory_format: of the result.

    Raises:
        NotAffineError: a norm that cannot be folded.
        ValueError: maps that are not of one block.
    """
    bias = reduce(operator.add, (m.bias for m in maps))
    scale = None
    for layer in in_order(norm):
        factor, shift = norm_as_affine(layer, bias)
        bias = bias * factor + shift
        scale = factor if scale is None else scale * factor
    channels, inputs = maps[0].shape[:2]
    if any(m.shape[:2] != (channels, inputs) for m in maps):
        raise ValueError(f"kernels {', '.join(str(tuple(m.shape)) for m in maps)} are not of one block")
    height, width = _common_size(maps)
    size = (channels, inputs, height, width)
    kernel = torch.empty(size, dtype=dtype, device=bias.device, memory_format=memory_format)
    rows = max(1, PIECE // kernel[0].numel())
    for first in range(0, channels, rows):
        piece = maps[0].rows(first, first + rows).padded_to(height, width).kernel
        for m in maps[1:]:
            top, left = (height - m.shape[2]) // 2, (width - m.shape[3]) // 2
            piece = piece.clone() if m is maps[1] else piece  # it may be a view of the network's own kernel
            piece[:, :, top : top + m.shape[2], left : left + m.shape[3]] += m.rows(first, first + rows).kernel
        if scale is not None:
            piece = piece * scale[first : first + rows, None, None, None]
        kernel[first : first + rows] = piece
    return Affine(kernel, bias.to(dtype))


def _common_size(maps: Iterable[Affine]) -> tuple[int, int]:
    heights, widths = zip(*(m.shape[2:] for m in maps), strict=True)
    return max(heights), max(widths)


def conv_as_affine(
    layer: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padded: bool = True,
) -> Affine:
    """The map that a convolution is, in ``dtype``; of a ``Sequential``, with the norms after the convolution.

    Args:
        layer: an ``nn.Conv2d`` that computes as torch's does, with or without a bias, whatever computes its weight.
        dtype: the precision of the folding.
        device: of the result.
        stride, dilation, groups: those of the branch; the layer must have them.
        padded: with zeros, so that the kernel's centre sits on the pixel; False: not at all.

    Raises:
        NotAffineError: anything else. The message says what.
    """
    first, *norms = in_order(layer) or [unwrapped(layer)]
    if why := other_forward(first, nn.Conv2d):
        raise NotAffineError(f"{type(first).__name__} {why}: it cannot be folded into a kernel", first)
    require_geometry(first, stride=stride, dilation=dilation, groups=groups, padded=padded)
    convolution: Any = first
    kernel, bias = convolution.weight.to(device), convolution.bias
    shift = torch.zeros(len(kernel), dtype=dtype, device=device) if bias is None else bias.to(device, dtype)
    total = Affine(kernel, shift)
    for norm in norms:
        total = total.then_norm(norm)
    return total


def require_geometry(conv: nn.Module, *, stride: int, dilation: int, groups: int, padded: bool = True) -> None:
    """Refuse an ``nn.Conv2d`` that moves over the image in another way than its branch was made for.

    Args:
        conv: the layer.
        stride, dilation, groups, padded: see :func:`conv_as_affine`.

    Raises:
        NotAffineError: the message names every value that differs.
    """
    kernel: Tensor = conv.weight  # type: ignore[assignment]
    dilations = _pair(conv.dilation)
    centred = tuple(d * (k // 2) for d, k in zip(dilations, kernel.shape[2:], strict=True))
    named = {"same": centred, "valid": (0, 0)}
    padding = named[conv.padding] if isinstance(conv.padding, str) else _pair(conv.padding)
    pointwise = kernel.shape[2:] == (1, 1)
    wanted = {
        "stride": (_pair(conv.stride), (stride, stride)),
        "padding": (padding, centred if padded else (0, 0)),
        "dilation": ((dilation,) * 2 if pointwise else dilations, (dilation, dilation)),
        "groups": (conv.groups, groups),
        "padding_mode": ("zeros" if padding == (0, 0) else conv.padding_mode, "zeros"),
    }
    other = [
        f"{name}={has!r} where its branch folds {name}={wants!r}"
        for name, (has, wants) in wanted.items()
        if has != wants
    ]
    if other:
        raise NotAffineError(f"{type(conv).__name__} has {', '.join(other)}", conv)
    if not kernel.is_floating_point():
        raise NotAffineError(f"{type(conv).__name__} has a kernel of {kernel.dtype}: only real numbers fold", conv)


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type, return-value]


def norm_as_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``γ / sqrt(σ² + ε)`` and shift ``β − μ γ / sqrt(σ² + ε)`` of an eval-mode BatchNorm (equation 2).

    Args:
        norm: BatchNorm2d or SyncBatchNorm, or a module with their tensors whose own forward is found to compute this,
            as the FrozenBatchNorm2d of torchvision and others does.
        like: of the dtype and device wanted.

    Returns:
        scale and shift, each of shape (channels,).

    Raises:
        NotAffineError: ``norm`` is none of these, or has no running statistics and so no fixed scale.
    """
    name = type(norm).__name__
    why = other_forward(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
    if why and not (hasattr(norm, "running_mean") and hasattr(norm, "running_var")):
        raise NotAffineError(f"{name} is not a batch normalisation: it cannot be folded into a kernel", norm)
    if norm.running_mean is None or norm.running_var is None:
        raise NotAffineError(f"{name} keeps no running statistics (track_running_stats=False): nothing to fold", norm)
    if why and not _computes_the_formula(norm):
        raise NotAffineError(f"{name} computes something else than a BatchNorm in eval mode: it cannot be folded", norm)
    return _scale_and_shift(norm, like)


def _scale_and_shift(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = (norm.running_var.to(like) + getattr(norm, "eps", 1e-5)).rsqrt()
    if weight is not None:
        scale = scale * weight.to(like)
    shift = -norm.running_mean.to(like) * scale
    if bias is not None:
        shift = shift + bias.to(like)
    return scale, shift


@torch.no_grad()
def _computes_the_formula(norm: nn.Module) -> bool:
    """Compare a copy, its tensors drawn at random, with equation 2 on maps of both signs and many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    exact = copied(norm).to_empty(device="cpu").double().eval()
    for tensor in (*exact.parameters(), *exact.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0, generator=generator)
    exact._forward_hooks.clear()  # which are not carried over
    size = (2, len(exact.running_mean), 7, 5)  # type: ignore[arg-type]
    powers = torch.randint(-2, 6, size, generator=generator)
    images = torch.randn(size, generator=generator, dtype=torch.float64) * 10.0**powers
    found = exact(images)  # after which weights that a hook computes are new
    scale, shift = _scale_and_shift(exact, images)
    return torch.allclose(found, images * scale[:, None, None] + shift[:, None, None], rtol=1e-9, atol=1e-9)


def identity_map(channels: int, groups: int, *, dtype: torch.dtype, device: torch.device) -> Affine:
    """The identity as a 1×1 grouped convolution: channel i of a group reads channel i of that group."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, dtype=torch.uint8, device=device)
    rows = torch.arange(channels, device=device)
    kernel[rows, rows % (channels // groups)] = 1
    return Affine(kernel, torch.zeros(channels, dtype=dtype, device=device))
