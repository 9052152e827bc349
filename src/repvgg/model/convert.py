"""From the train form to the deploy form, and the proof that both are one function."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.model.affine import Affine, folded
from repvgg.model.block import Block, FoldedBlock, FusedBlock, memory_format_of
from repvgg.model.branches import Branch
from repvgg.model.fused import has_hooks
from repvgg.model.layers import NotAffineError, as_evaluated, computes_weight, copied, replaced, unwrapped
from repvgg.model.tensorfile import some


@torch.no_grad()
def to_deploy(model: nn.Module, *, fold_dtype: torch.dtype = torch.float64) -> nn.Module:
    """A new model in eval mode in which every :class:`Block` is one convolution (paper, section 3.3).

    ``model`` may contain blocks anywhere, may be compiled or wrapped in DistributedDataParallel, and is left as it
    is: parameters, buffers, modes, and the random generators. Everything that is not a block is copied. A model
    without blocks (already deployed, say) is copied too.

    A block with a nonlinearity in a branch becomes a :class:`FoldedBlock`, a sum of convolutions, where its branches
    say how (:meth:`Branch.summand`); :func:`not_fused` names such layers.

    To differentiate through the fold, take :meth:`Block.affine` instead.

    A convolution whose block is frozen is frozen. What a fold would leave out is an error, but for hooks, which are
    warned of: nothing is left in the deploy form that would call them.

    Args:
        model: any module.
        fold_dtype: precision of the folding; each layer is cast to its own dtype last, so that half and bfloat16
            models lose nothing more than that one rounding.

    Raises:
        NotAffineError: a layer that no convolution equals (padding that is not of zeros, a subclass with a forward of
            its own, a norm without running statistics), or a branch that says of no convolution how it is deployed.
        ValueError: branches whose kernels do not add up. Each message names the layer.
    """
    # deepcopy looks an object up in the memo before it copies: what stands there takes the object's place wherever
    # it occurs, and blocks that are shared stay shared.
    memo: dict[int, object] = {}
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    for name, block in blocks.items():
        memo[id(block)] = _deployed(name, block, fold_dtype)
    for what, names in (
        ("hooks are not carried over to the deploy form, which has one convolution in the place of", _hooked(blocks)),
        ("these are branches outside of a Block, as in a traced model, and stay unconverted:", _stray(model)),
    ):
        if names:
            warnings.warn(f"{what} {some(names)}", stacklevel=3)
    for module in reversed(list(model.modules())):  # inner wrappers before outer ones
        inner = unwrapped(module)
        if inner is not module:
            memo[id(module)] = copied(inner, memo)
    return copied(model, memo).eval()


def _hooked(blocks: dict[str, Block]) -> list[str]:
    """Modules in whose place the deploy form has none, and whose calls somebody follows."""
    found: dict[str, None] = {}
    for name, block in blocks.items():
        for inner, module in (("", block), *_replaced(block)):
            if has_hooks(module) and not all(map(computes_weight, _hooks(module))):
                found[_join(name, inner) or "this block"] = None
    return list(found)


def _replaced(block: Block) -> Iterator[tuple[str, nn.Module]]:
    yield from block.branches.named_modules(prefix="branches")
    yield from block.norm.named_modules(prefix="norm")


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        yield from hooks.values()


def _stray(model: nn.Module) -> list[str]:
    """Branches that no block holds; of a model that was traced, which has other classes, what has their names."""
    inside = {id(part) for block in model.modules() if isinstance(block, Block) for part in block.modules()}
    traced = tuple(
        name for name, module in model.named_modules() if isinstance(module, fx.GraphModule | torch.jit.ScriptModule)
    )
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if id(module) not in inside
        and (isinstance(module, Branch) or (name.startswith(traced) and re.search(r"(^|\.)branches\.\d+$", name)))
    ]


def _join(block: str, inner: str) -> str:
    return ".".join(filter(None, [block, inner]))


def _deployed(name: str, block: Block, fold_dtype: torch.dtype) -> FusedBlock | FoldedBlock:
    try:
        with as_evaluated(block):
            return _convolutions(block, fold_dtype)
    except ValueError as error:
        layer = error.layer if isinstance(error, NotAffineError) else None
        names = {id(module): _join(name, inner) for inner, module in block.named_modules()}
        where = f"layer '{found}'" if (found := names.get(id(layer), name)) else "this block"
        if isinstance(error, NotAffineError):
            raise NotAffineError(f"{where}: {error}", layer) from error
        raise ValueError(f"{where} cannot be fused: {error}") from error


def _convolutions(block: Block, fold_dtype: torch.dtype) -> FusedBlock | FoldedBlock:
    # The ReLU of a deployed layer overwrites the convolution's output, which nothing else reads: one map less to write.
    plain = type(block.activation) is nn.ReLU and not has_hooks(block.activation) and not replaced(block.activation)
    activation = nn.ReLU(inplace=True) if plain else copied(block.activation)
    se = copied(block.se)
    trains = any(p.requires_grad for part in (block.branches, block.norm) for p in part.parameters())
    try:
        fused = FusedBlock(_folded(block.maps(fold_dtype), block.norm, block), block.shape, se, activation)
        fused.conv.requires_grad_(trains)
        return fused
    except NotAffineError:
        parts = [
            FusedBlock(_folded([part.affine], nn.Identity(), block), part.shape, nn.Identity(), part.activation)
            for part in block.summands(fold_dtype)
        ]
        for part in parts:
            part.conv.requires_grad_(trains)
        return FoldedBlock(parts, copied(block.norm), se, activation)


def _folded(maps: Sequence[Affine], norm: nn.Module, block: Block) -> Affine:
    """With the dtype and memory format of the block."""
    kernels = (p for module in block.modules() if isinstance(module, nn.Conv2d) for p in module.parameters())
    like = next((t for t in chain(kernels, block.parameters(), block.buffers()) if t.is_floating_point()), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    return folded(maps, norm, dtype=dtype, memory_format=memory_format_of(block))


def not_fused(deployed: nn.Module) -> list[str]:
    """The layers of a deploy form that are more than one convolution, because a branch has a nonlinearity.

    Shortcuts across layers are not of a layer: see :func:`repvgg.model.count_shortcuts`.
    """
    return [name for name, module in deployed.named_modules() if isinstance(module, FoldedBlock)]


@dataclass(frozen=True)
class Equivalence:
    """How far two forms' logits are apart; state ``dtype`` with every figure.

    Attributes:
        max_abs: largest absolute difference.
        rel_l2: ‖a − b‖₂ / ‖a‖₂ over all logits; see :func:`relative`.
        top1_agreement: share of inputs with the same argmax, a fraction of 1.
        dtype: the precision both were evaluated in.
    """

    max_abs: float
    rel_l2: float
    top1_agreement: float
    dtype: str

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.max_abs:.3g}, relative L2 {self.rel_l2:.3g}, "
            f"top-1 agreement {self.top1_agreement:.4f} ({self.dtype})"
        )


def relative(difference: Tensor, reference: Tensor) -> Tensor:
    """``difference / reference`` of two norms; nothing beside nothing (0/0) is 0, and what is not finite stays so."""
    return torch.where((difference == 0) & (reference == 0), 0.0, difference / reference)


@torch.no_grad()
def equivalence(a: nn.Module, b: nn.Module, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Equivalence:
    """Evaluate copies of both forms on ``x`` in eval mode and in ``dtype``, and say how far apart they are.

    "The outputs differ" is nearly always a missing ``.eval()``, or a comparison in low precision: both are taken
    care of here, and neither model is touched.

    Args:
        a, b: the two forms.
        x: one batch, N × channels × H × W.
        dtype: in float64 what is left is the rounding of the deployed weights to their own dtype, about 1e-8
            relative for float32; of ``model.double()`` and its deploy form, the identity itself, about 1e-15.
            float32 shows what a deployed network will show.
    """
    logits = [copied(unwrapped(model)).to(dtype).eval()(x.to(dtype)) for model in (a, b)]
    difference = logits[0] - logits[1]
    return Equivalence(
        max_abs=difference.abs().max().item(),
        rel_l2=relative(difference.norm(), logits[0].norm()).item(),
        top1_agreement=(logits[0].argmax(1) == logits[1].argmax(1)).double().mean().item(),
        dtype=str(dtype).removeprefix("torch."),
    )
