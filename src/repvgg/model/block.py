"""The block, ``activation(se(norm(sum of branches)))``, and the one convolution that it becomes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from repvgg.model.affine import Affine
from repvgg.model.branches import Branch, BranchFactory, ConvShape, Normed, Summand
from repvgg.model.fused import has_hooks, normalized_sum, shared
from repvgg.model.layers import NotAffineError, as_evaluated, require_own_map, unwrapped


class SqueezeExcite(nn.Module):
    """Channel attention of D2se (Hu et al. 2018): before the ReLU, hidden width C // 16, 1×1 convolutions.

    Pools over the whole map, so that any input size works.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, kernel_size=1)
        self.up = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """N × C × H × W to the same shape, each channel scaled by a factor in (0, 1)."""
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(pooled))))


class Block(nn.Module):
    """One layer of the network as it is trained: ``activation(se(norm(sum of branches)))`` (paper, equation 1).

    It knows neither which branches it has nor whether it is deployed: branches are a list, and the deploy form is
    another module, :class:`FusedBlock`.

    Args:
        shape: the convolution that the branches fuse into.
        branches: makes each branch, or None where a design has none at this shape.
        norm: a BatchNorm after the sum (post-addition BN of Table 7, QARepVGG).
        se_hidden: hidden width of a squeeze-and-excitation before the activation, 0 for none.

    Attributes:
        recomputes: keep only the input for the backward, and compute the block again there (activation checkpointing).

    Raises:
        ValueError: no branch is left at this shape.
    """

    def __init__(
        self, shape: ConvShape, branches: Sequence[BranchFactory], *, norm: bool = False, se_hidden: int = 0
    ) -> None:
        super().__init__()
        made = [make(shape) for make in branches]
        self.branches = nn.ModuleList(branch for branch in made if branch is not None)
        if not self.branches:
            raise ValueError(f"a block of {shape} is left with no branch: list one that exists at every shape")
        self.shape = shape
        self.norm = nn.BatchNorm2d(shape.out_channels) if norm else nn.Identity()
        self.se = SqueezeExcite(shape.out_channels, se_hidden) if se_hidden else nn.Identity()
        self.activation: nn.Module = nn.ReLU()
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            computed: Tensor = checkpoint(
                self._forward,
                x,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), _statistics_stay(self)),
            )
            return computed
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which fuses by itself
            return self.activation(self.se(self.norm(self._sum(x))))
        # Where nothing stands between the last sum and a ReLU, both are one operation.
        after = (self.norm, self.se, self.activation)
        rectified = type(self.activation) is nn.ReLU and type(self.se) is nn.Identity and not any(map(has_hooks, after))
        normed = type(self.norm) is not nn.Identity
        if not self.training:
            total = self.norm(self._sum(x))
            if rectified and not normed and self._owns_sum(x):
                return F.relu_(total)
            return self.activation(self.se(total))
        total = self._normalized_sum(x, relu=rectified and not normed)
        if normed:
            total = normalized_sum([total], [self.norm], relu=rectified)
        return total if rectified else self.activation(self.se(total))

    def _owns_sum(self, x: Tensor) -> bool:
        """Whether the sum of branches is a new map that no backward reads: it may be written over.

        Not in a graph, which may run with gradients later: torch.compile, torch.jit.trace, and torch.fx, whose inputs
        are no tensors.
        """
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor)
        return len(self.branches) > 1 and not (torch.is_grad_enabled() or traced)

    def _sum(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total: Tensor = first(x)
        owned = False  # a branch may give its input
        for branch in others:
            term = branch(x)
            total = total.add_(term) if owned and term.dtype == total.dtype else total + term
            owned = self._owns_sum(x)
        return total

    def _normalized_sum(self, x: Tensor, *, relu: bool) -> Tensor:
        branches = [b for b in self.branches if isinstance(b, Normed) and type(b).forward is Normed.forward]
        if len(branches) < len(self.branches) or any(map(has_hooks, branches)):
            total = self._sum(x)
            return F.relu(total) if relu else total
        # Who listens to a convolution may keep what it hears.
        heard = [any(map(has_hooks, b.modules())) for b in branches]
        spent = [b.makes_map and not h for b, h in zip(branches, heard, strict=True)]
        inputs = shared(x, [b.subsample for b in branches], spent=not any(heard))
        maps = [b.before_norm(read) for b, read in zip(branches, inputs, strict=True)]
        return normalized_sum(maps, [b.bn for b in branches], relu=relu, spent=spent)

    def affine(self, dtype: torch.dtype = torch.float64) -> Affine:
        """The one map that ``norm(sum of branches)`` is in eval mode, differentiable in the parameters.

        Args:
            dtype: the precision that the branches are folded in.

        Raises:
            NotAffineError: a branch is no affine map.
        """
        return reduce(operator.add, self.maps(dtype)).then_norm(self.norm)

    def maps(self, dtype: torch.dtype = torch.float64) -> list[Affine]:
        """What every branch is in eval mode; see :meth:`affine`."""
        require_own_map(self, "maps")
        device = self._device()
        with as_evaluated(self):
            return [branch.affine(dtype, device) for branch in self._readable()]

    def summands(self, dtype: torch.dtype = torch.float64) -> list[Summand]:
        """What the sum of branches is in eval mode, as few convolutions: all affine branches are one.

        Args:
            dtype: the precision that the branches are folded in.

        Raises:
            NotAffineError: a branch is no map followed by an activation either.
        """
        require_own_map(self, "maps")
        maps: list[Affine] = []
        others: list[Summand] = []
        device = self._device()
        with as_evaluated(self):
            for branch in self._readable():
                try:
                    maps.append(branch.affine(dtype, device))
                except NotAffineError:
                    others.append(branch.summand(self.shape, dtype, device))
        return [*([Summand(reduce(operator.add, maps), self.shape, nn.Identity())] if maps else []), *others]

    def _readable(self) -> list[Branch]:
        """The branches, each of which says what it computes.

        Raises:
            NotAffineError: a module that is no branch; a forward that its class's affine() or summand() does not know.
        """
        branches = [unwrapped(branch) for branch in self.branches]
        for module in self.branches.modules():
            for says in ("affine", "summand"):
                said = getattr(type(module), says, None)
                if said is not None and said is not getattr(Branch, says):
                    require_own_map(module, says)
        for branch in branches:
            if not isinstance(branch, Branch):
                raise NotAffineError(
                    f"{type(branch).__name__} is not a repvgg.model.Branch: it has no affine()", branch
                )
            if getattr(branch, "shape", self.shape) != self.shape:
                raise NotAffineError(f"{type(branch).__name__} is of {branch.shape}, its block of {self.shape}", branch)
        return branches  # type: ignore[return-value]

    def _device(self) -> torch.device:
        # A bare identity alone has no tensors; every other block is where its tensors are.
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Also under strict=False, where such a file would leave every branch as it was initialised.
        deployed = next(
            (key for key in state_dict if key.startswith((prefix + "conv.weight", prefix + "parts."))), None
        )
        if deployed is not None:
            raise ValueError(
                f"layer '{prefix.rstrip('.')}': these weights are of a deploy form (they hold '{deployed}'), "
                "the model is a train form. Branches cannot be recovered from their sum: load a checkpoint "
                "of the train form, or convert the model first with repvgg.model.to_deploy(model)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def _statistics_stay(module: nn.Module) -> Iterator[None]:
    """Running statistics are not moved: a batch that is computed a second time is not a second batch."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def memory_format_of(module: nn.Module) -> torch.memory_format:
    """The layout of a module's convolutions, and so of the images it wants."""
    for child in module.modules():
        # A 1×1 kernel lies in both layouts at once and says nothing.
        if isinstance(child, nn.Conv2d) and not child.weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


class FusedBlock(nn.Module):
    """One layer as it is deployed: a convolution with bias, SE where the block had one, activation (Figure 2 C).

    Args:
        affine: the fused map; its dtype, device and memory format are the layer's.
        shape: of the block it comes from.
        se: an SE module or ``nn.Identity``.
        activation: the block's.
    """

    def __init__(self, affine: Affine, shape: ConvShape, se: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        height, width = affine.shape[2:]
        # skip_init: initialising would draw random numbers, and conversion must not move the generator.
        self.conv = nn.utils.skip_init(
            nn.Conv2d,
            shape.in_channels,
            shape.out_channels,
            (height, width),
            stride=shape.stride,
            padding=(shape.dilation * (height // 2), shape.dilation * (width // 2)),
            dilation=shape.dilation,
            groups=shape.groups,
            device="meta",
        )
        self.conv.weight = nn.Parameter(affine.kernel.detach())
        self.conv.bias = nn.Parameter(affine.bias.detach())
        self.se = se
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""
        return self.activation(self.se(self.conv(x)))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _refuse_train_form(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FoldedBlock(nn.Module):
    """One layer that no convolution equals, as it is deployed: ``activation(se(norm(sum of parts)))``.

    Args:
        parts: a convolution for every branch with a nonlinearity, one for all others; BN is folded into them.
        norm: the block's own, which a nonlinearity keeps apart from the convolutions, or ``nn.Identity``.
        se: an SE module or ``nn.Identity``.
        activation: the block's.
    """

    def __init__(self, parts: Sequence[FusedBlock], norm: nn.Module, se: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.norm = norm
        self.se = se
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""
        total = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return self.activation(self.se(self.norm(total)))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _refuse_train_form(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse_train_form(state_dict: Mapping[str, Any], prefix: str) -> None:
    if any(key.startswith(prefix + "branches.") for key in state_dict):
        raise ValueError(
            f"layer '{prefix.rstrip('.')}': these weights are of a train form (they hold '{prefix}branches.*'), "
            "the model is a deploy form. Load them into the train form, then call repvgg.model.to_deploy(model)"
        )
