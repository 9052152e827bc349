"""How a layer computes in eval mode: whether it is one of torch's that can be folded, and with which tensors.

Folding reads tensors. Whatever else a layer does (a forward of its own, a hook, a parametrization, pruning) would be
lost in silence, so each layer is checked here first, and an error names what cannot be folded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


class NotAffineError(ValueError):
    """A block, a branch or a layer that no convolution equals.

    Attributes:
        layer: the module that the message is about; its qualified name is known to who holds the whole model.
    """

    def __init__(self, message: str, layer: nn.Module | None = None) -> None:
        super().__init__(message)
        self.layer = layer


#: What a module's output is made by, in nn.Module, nn.Conv2d, nn.BatchNorm2d, Normed and Block.
COMPUTING = ("__call__", "forward", "_conv_forward", "_check_input_dim", "before_norm", "_forward", "_sum")


def unwrapped(module: nn.Module) -> nn.Module:
    """What a compiled or DDP-wrapped module wraps, the module itself otherwise."""
    if isinstance(module, DistributedDataParallel):
        return module.module
    # What is not imported has compiled nothing; importing it takes longer than converting does.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        inner: nn.Module = module._orig_mod
        return inner
    return module


def other_forward(layer: nn.Module, *kinds: type[nn.Module]) -> str:
    """Why a layer does not compute as one of ``kinds`` do, empty if it does; a subclass may override anything else."""
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if kind is None:
        return f"is no {' or '.join(kind.__name__ for kind in kinds)}"
    if (own := replaced(layer)) is not None:
        return f"has a {own}() of its own, set on the instance"
    overridden = next((name for name in COMPUTING if getattr(type(layer), name, 0) is not getattr(kind, name, 0)), None)
    return "" if overridden is None else f"overrides {kind.__name__}.{overridden}()"


def replaced(module: nn.Module) -> str | None:
    """The method that computes its output and that somebody has replaced on the instance, if any."""
    return next((name for name in COMPUTING if name in vars(module)), None)


def in_order(layer: nn.Module) -> list[nn.Module]:
    """The layers that a layer applies one after another: of a ``Sequential`` its own, without those that do nothing."""
    layer = unwrapped(layer)
    if not other_forward(layer, nn.Sequential):
        return [inner for child in layer.children() for inner in in_order(child)]
    does_nothing = not other_forward(layer, nn.Identity) or (
        isinstance(layer, _DropoutNd) and type(layer).__module__ == _DropoutNd.__module__ and replaced(layer) is None
    )
    return [] if does_nothing else [layer]


def require_own_map(module: nn.Module, says: str) -> None:
    """Refuse a module that computes in another way than the class knew which says what map the module is.

    Args:
        module: a branch or a block.
        says: the method that says it, such as ``affine``.

    Raises:
        NotAffineError: its forward was overridden in a class further down, or on the instance.
    """
    name = replaced(module) or _overridden(type(module), says)  # type: ignore[arg-type]
    if name is not None:
        raise NotAffineError(
            f"{type(module).__name__} computes with a {name}() of its own, of which {says}(), inherited, knows "
            f"nothing. Give the class {'' if says == 'maps' else 'an '}{says}() too",
            module,
        )


@cache
def _overridden(kind: type[nn.Module], says: str) -> str | None:
    """The method that computes, of a class that does not know ``says`` as it is defined further up."""
    who_says = _definer(kind, says)
    for name in COMPUTING:
        computes = _definer(kind, name)
        if computes is not None and who_says is not None and not issubclass(who_says, computes):
            return name
    return None


def _definer(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def computes_weight(hook: Callable[..., Any]) -> bool:
    """Whether a forward pre-hook only computes a weight from trained tensors: pruning, weight_norm, spectral_norm."""
    return isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm)


def weight_without_hooks(layer: nn.Module) -> Tensor:
    """The weight of a layer that is never called: a parametrization computes it, a hook before a call does not.

    Raises:
        NotAffineError: a hook was to compute it.
    """
    if any(map(computes_weight, layer._forward_pre_hooks.values())):
        raise NotAffineError(
            f"{type(layer).__name__} is pruned or normalised by a hook, and its branch reads the weight without "
            "calling the layer, so that the hook never runs. Use torch.nn.utils.parametrize, or prune.remove()",
            layer,
        )
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def copied(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A deep copy, also where a hook computes weights (pruning), which deepcopy by itself refuses.

    Args:
        model: any module.
        memo: deepcopy's own.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextmanager
def as_evaluated(module: nn.Module) -> Iterator[None]:
    """Every weight is what an eval-mode forward would compute: of pruning, weight_norm, spectral_norm in either style.

    Afterwards modes and tensors are as they were. Without eval mode, reading a spectral norm would iterate it.
    """
    modules = list(module.modules())
    training = [m for m in modules if m.training]
    computed: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for m in training:
            m.training = False
        for m in modules:
            for hook in filter(computes_weight, m._forward_pre_hooks.values()):
                made: Any = hook
                name = made._tensor_name if isinstance(hook, BasePruningMethod) else made.name
                computed.append((m, name, getattr(m, name)))
                hook(m, ())
        yield
    finally:
        for m, name, tensor in reversed(computed):
            setattr(m, name, tensor)
        for m in training:
            m.training = True
