"""``relu(Σ bn_k(z_k))`` of a training step in one operation, where that is faster: channels_last maps on a CPU.

Layer by layer, three BatchNorms, two sums and a ReLU read or write a block's maps 38 times a step; the compiled kernel
(``_normsum.cpp``) does it in 20, keeps no more for the backward and allocates no map in between. Elsewhere (GPUs, other
layouts, mixed dtypes, torch.compile, which fuses by itself) the same is computed by torch's own operations.

Letters: N images, C channels, H × W pixels, R = N · H · W.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

try:
    from repvgg.model import _normsum
except ImportError as error:
    raise ImportError(
        "repvgg.model._normsum is not compiled (or for another Python): make setup, or pip install --editable ."
    ) from error

#: Of the kernel, by the maps' dtype; parameters and statistics are float64 with float64 maps, else float32.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
#: Summands that the kernel has code for.
MAX_TERMS = 4

_enabled: ContextVar[bool] = ContextVar("enabled", default=True)


@contextmanager
def unfused() -> Iterator[None]:
    """Compute layer by layer here, with torch's own operations: what others do, to compare with."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def normalized_sum(
    maps: Sequence[Tensor], norms: Sequence[nn.Module], *, relu: bool, spent: Sequence[bool] | None = None
) -> Tensor:
    """``Σ norm(map)``, with a ReLU after it if ``relu``; running statistics move as BatchNorm's own forward moves them.

    Args:
        maps: N × C × H × W each.
        norms: of every map, ``nn.Identity`` for none.
        relu: whether a ReLU follows.
        spent: of every map, whether nothing else reads it. The backward then writes its gradient in its place, and
            allocates nothing; a second backward through the same graph is an error of torch's. None: none of them.

    Returns:
        N × C × H × W.
    """
    if not torch.compiler.is_compiling() and _enabled.get() and _fits(maps, norms):
        batchnorms = tuple(norm if isinstance(norm, nn.BatchNorm2d) else None for norm in norms)
        for norm in batchnorms:
            if norm is not None and norm.track_running_stats and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        parameters = [p for norm in batchnorms if norm is not None for p in (norm.weight, norm.bias)]
        summed: Tensor = _NormalizedSum.apply(relu, batchnorms, tuple(spent or [False] * len(maps)), *maps, *parameters)
        return summed
    total: Tensor = reduce(operator.add, (norm(z) for norm, z in zip(norms, maps, strict=True)))
    return F.relu(total) if relu else total


def every(x: Tensor, n: int) -> Tensor:
    """Of N × C × H × W, every ``n``-th row and column, from the first."""
    return x if n == 1 else x[:, :, ::n, ::n]


def shared(x: Tensor, subsamples: Sequence[int], *, spent: bool) -> list[Tensor]:
    """One map as each of its readers reads it: :func:`every` of each of ``subsamples``.

    Args:
        x: N × C × H × W.
        subsamples: of each reader.
        spent: whether nobody else reads the gradients of what the readers read. That of the few pixels is then added to
            that of all in its place; autograd by itself would spread it over a map of zeros, and add two maps.
    """
    few = {n for n in subsamples if n > 1}
    if torch.compiler.is_compiling() or not (spent and _enabled.get() and 1 in subsamples and len(few) == 1):
        return [every(x, n) for n in subsamples]
    whole, pixels = _WholeAndPixels.apply(x, *few)
    return [whole if n == 1 else pixels for n in subsamples]


class _WholeAndPixels(torch.autograd.Function):
    """Of a map and n: the map, and every n-th row and column of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """N × C × H × W and N × C × ⌈H/n⌉ × ⌈W/n⌉, both of the same memory."""
        ctx.n = n
        return x.view_as(x), every(x, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Of the map."""
        whole, pixels = gradients
        every(whole, ctx.n).add_(pixels)
        return whole, None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be told when this module itself is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fits(maps: Sequence[Tensor], norms: Sequence[nn.Module]) -> bool:
    first = maps[0]
    if (
        first.device.type != "cpu"
        or first.dtype not in _DTYPES
        or first.ndim != 4
        or first.numel() <= first.shape[1]  # one value per channel: BatchNorm says that it cannot
        or len(maps) > MAX_TERMS
    ):
        return False
    for z in maps:
        if z.dtype != first.dtype or z.shape != first.shape or z.device != first.device:
            return False
        if not z.is_contiguous(memory_format=torch.channels_last):
            return False
    numbers = torch.float64 if first.dtype == torch.float64 else torch.float32
    normalized = False
    for norm in norms:
        if type(norm) is nn.Identity:
            continue
        # SyncBatchNorm and other kinds are subclasses of the same base, but not this class.
        if type(norm) is not nn.BatchNorm2d or not norm.training or has_hooks(norm):
            return False
        if norm.weight is None or norm.weight.dtype != numbers or norm.running_mean is None or norm.momentum is None:
            return False
        normalized = True
    return normalized


class _NormalizedSum(torch.autograd.Function):
    """Of: whether a ReLU follows; of each map, a BatchNorm or None, and whether it is spent; maps; parameters."""

    @staticmethod
    def forward(
        ctx: Any, relu: bool, norms: tuple[nn.BatchNorm2d | None, ...], spent: tuple[bool, ...], *tensors: Tensor
    ) -> Tensor:
        """The sum, N × C × H × W."""
        maps = tensors[: len(norms)]
        first = maps[0]
        out = torch.empty_like(first)
        statistics = first.new_empty((len(norms), 2, first.shape[1]), dtype=torch.float64)
        ctx.relu, ctx.norms, ctx.spent = relu, norms, spent
        ctx.save_for_backward(statistics, *tensors, *([out] if relu else []))
        if not isinstance(first, FakeTensor):  # else memory is being planned, and there is nothing to compute
            terms = tuple(
                _term(z)
                if norm is None
                else _term(z, None, norm.weight, norm.bias, *_running(norm), None, None, statistics[k], norm)
                for k, (z, norm) in enumerate(zip(maps, norms, strict=True))
            )
            _normsum.forward(*_shape(first, relu), 0, out.data_ptr(), terms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of every argument of the forward."""
        statistics, *tensors = ctx.saved_tensors
        maps, parameters = tensors[: len(ctx.norms)], tensors[len(ctx.norms) :]
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        dmaps: list[Tensor | None] = []
        for z, spent, wanted in zip(maps, ctx.spent, ctx.needs_input_grad[3:], strict=False):
            if wanted and spent:
                torch.autograd.graph.increment_version(z)
                dmaps.append(z.detach())
            else:
                dmaps.append(torch.empty_like(z) if wanted else None)
        y = parameters.pop() if ctx.relu else None
        dparameters = [torch.empty_like(parameter) for parameter in parameters]
        if not isinstance(dy, FakeTensor):
            pairs = zip(parameters[::2], dparameters[::2], dparameters[1::2], strict=True)
            terms = []
            for k, (z, dz, norm) in enumerate(zip(maps, dmaps, ctx.norms, strict=True)):
                if norm is None:
                    terms.append(_term(z, dz))
                else:
                    weight, dweight, dbias = next(pairs)
                    terms.append(_term(z, dz, weight, None, None, None, dweight, dbias, statistics[k], norm))
            _normsum.backward(*_shape(dy, ctx.relu), dy.data_ptr(), _address(y), tuple(terms))
        return (None, None, None, *dmaps, *dparameters)


def _term(
    z: Tensor,
    dz: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    statistics: Tensor | None = None,
    norm: nn.BatchNorm2d | None = None,
) -> tuple[float, ...]:
    """A ``Term`` of the kernel: addresses, 0 for what is not there or not wanted, then ε and the momentum."""
    tensors = (z, dz, weight, bias, running_mean, running_var, dweight, dbias, statistics)
    return (*map(_address, tensors), norm.eps if norm else 0.0, (norm.momentum or 0.0) if norm else 0.0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that this forward is to move."""
    return (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)


def _shape(z: Tensor, relu: bool) -> tuple[int, int, bool, int, int]:
    return _DTYPES[z.dtype], torch.get_num_threads(), relu, z.numel() // z.shape[1], z.shape[1]
