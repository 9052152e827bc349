"""From the train form to the deploy form, and the proof that both are one function."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repvgg.model.affine import Affine, folded
from repvgg.model.block import Block, FoldedBlock, FusedBlock, memory_format_of
from repvgg.model.branches import NotAffineError


@torch.no_grad()
def to_deploy(model: nn.Module, *, fold_dtype: torch.dtype = torch.float64) -> nn.Module:
    """A new model in eval mode in which every :class:`Block` is one convolution (paper, section 3.3).

    ``model`` may contain blocks anywhere, may be compiled or wrapped in DistributedDataParallel, and is left as it
    is: parameters, buffers, modes, and the random generators. Everything that is not a block is copied. A model
    without blocks (already deployed, say) is copied too.

    A block with a nonlinearity in a branch becomes a :class:`FoldedBlock`, a sum of convolutions, where its branches
    say how (:meth:`Branch.summand`); :func:`not_fused` names such layers.

    To differentiate through the fold, take :meth:`Block.affine` instead.

    Args:
        model: any module.
        fold_dtype: precision of the folding; each layer is cast to its own dtype last, so that half and bfloat16
            models lose nothing more than that one rounding.

    Raises:
        NotAffineError: a block holds a branch that says of no convolution how it is deployed; the message names the
            layer.
    """
    # deepcopy looks an object up in the memo before it copies: what stands there takes the object's place wherever
    # it occurs, and blocks that are shared stay shared.
    memo: dict[int, object] = {}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            memo[id(module)] = _deployed(name, module, fold_dtype)
    for module in reversed(list(model.modules())):  # inner wrappers before outer ones
        inner = _unwrapped(module)
        if inner is not module:
            memo[id(module)] = copy.deepcopy(inner, memo)
    deployed: nn.Module = copy.deepcopy(model, memo)
    return deployed.eval()


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a compiled or DDP-wrapped module wraps, the module itself otherwise."""
    if isinstance(module, DistributedDataParallel):
        return module.module
    # What is not imported has compiled nothing; importing it takes longer than converting does.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        inner: nn.Module = module._orig_mod
        return inner
    return module


def _deployed(name: str, block: Block, fold_dtype: torch.dtype) -> FusedBlock | FoldedBlock:
    where = f"layer '{name}'" if name else "this block"
    # The ReLU of a deployed layer overwrites the convolution's output, which nothing else reads: one map less to write.
    activation = nn.ReLU(inplace=True) if type(block.activation) is nn.ReLU else copy.deepcopy(block.activation)
    se = copy.deepcopy(block.se)
    try:
        try:
            return FusedBlock(_folded(block.maps(fold_dtype), block.norm, block), block.shape, se, activation)
        except NotAffineError:
            parts = [
                FusedBlock(_folded([part.affine], nn.Identity(), block), part.shape, nn.Identity(), part.activation)
                for part in block.summands(fold_dtype)
            ]
            return FoldedBlock(parts, copy.deepcopy(block.norm), se, activation)
    except NotAffineError as error:
        raise NotAffineError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be fused: {error}") from error


def _folded(maps: Sequence[Affine], norm: nn.Module, block: Block) -> Affine:
    """With the dtype and memory format of the block."""
    parameter = next(block.parameters(), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
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
        rel_l2: ‖a − b‖₂ / ‖a‖₂ over all logits.
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
    logits = [copy.deepcopy(_unwrapped(model)).to(dtype).eval()(x.to(dtype)) for model in (a, b)]
    difference = logits[0] - logits[1]
    return Equivalence(
        max_abs=difference.abs().max().item(),
        rel_l2=(difference.norm() / logits[0].norm()).item(),
        top1_agreement=(logits[0].argmax(1) == logits[1].argmax(1)).double().mean().item(),
        dtype=str(dtype).removeprefix("torch."),
    )
