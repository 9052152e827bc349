"""What the optimiser decays, and the learning rate of every step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from repvgg.model import Affine, Block, ConvBN, Identity, norm_as_affine

#: Modules whose ``weight`` is a kernel; everything else (BatchNorm's γ and β, biases) is not decayed.
KERNEL_MODULES = (nn.modules.conv._ConvNd, nn.Linear)
#: Modules whose ``bias`` is one; a BatchNorm's is its β.
BIASED_MODULES = (*KERNEL_MODULES, nn.modules.batchnorm._BatchNorm)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    decay_identity_gamma: bool = False,
    bias_lr_factor: float = 1.0,
    custom_l2: bool = False,
) -> list[dict[str, Any]]:
    """The kernels with ``weight_decay``, all else without (paper, section 4.1); the switches make further groups.

    Chosen by the type of the module that owns a parameter, never by its name: names that contain "bn" miss the
    BatchNorm of the identity branch. The groups, of which the empty ones are left out, are ``kernels``,
    ``fused_kernels``, ``identity_gammas``, ``biases`` and ``rest``.

    Args:
        lr: of everything but the biases; needed only where these differ.
        decay_identity_gamma: decay the γ of the BatchNorm of identity branches too. The authors' older script does,
            because that BatchNorm is named ``rbr_identity``; so does mmpretrain. Not in the paper.
        bias_lr_factor: times ``lr`` for every bias, a BatchNorm's β included. The authors' older script has 2, "a
            Caffe-style common practice" that "made no difference". The paper's is 1.
        custom_l2: no decay for the kernels that :func:`fused_l2` takes care of.

    Raises:
        ValueError: a factor other than 1 without ``lr``.
    """
    if bias_lr_factor != 1 and lr is None:
        raise ValueError(f"bias_lr_factor={bias_lr_factor} multiplies a learning rate: give parameter_groups lr=…")
    owned = list(model.modules())
    kernels = {id(m.weight) for m in owned if isinstance(m, KERNEL_MODULES)}
    fused = {id(branch.conv.weight) for branches in _fusing(model) for branch in branches} if custom_l2 else set()
    gammas = {id(m.bn.weight) for m in owned if isinstance(m, Identity) and not isinstance(m.bn, nn.Identity)}
    biases = {id(m.bias) for m in owned if isinstance(m, BIASED_MODULES)}

    def group_of(parameter: nn.Parameter) -> str:
        this = id(parameter)
        if this in kernels:
            return "fused_kernels" if this in fused else "kernels"
        if decay_identity_gamma and this in gammas:
            return "identity_gammas"
        return "biases" if bias_lr_factor != 1 and this in biases else "rest"

    decay = {"kernels": weight_decay, "fused_kernels": 0.0, "identity_gammas": weight_decay, "biases": 0.0, "rest": 0.0}
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "weight_decay": value} for name, value in decay.items()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[group_of(parameter)]["params"].append(parameter)
    if lr is not None and bias_lr_factor != 1:
        groups["biases"]["lr"] = lr * bias_lr_factor
    return [group for group in groups.values() if group["params"]]


def _fusing(model: nn.Module) -> Iterator[list[ConvBN]]:
    """The branches of each block whose kernels :func:`fused_l2` sums."""
    for block in model.modules():
        if isinstance(block, Block):
            yield [branch for branch in block.branches if isinstance(branch, ConvBN)]


def fused_l2(model: nn.Module) -> Tensor:
    """The authors' custom L2 (``get_custom_L2`` of their repository, since deprecated by them) for any branches.

    Of each :class:`Block`, at every place p of its fused kernel: ``(Σ_b t_b k_b[p])² / Σ_b t_b²``, summed over
    places and blocks. b runs over the :class:`ConvBN` branches whose kernel k_b reaches p, and ``t = γ / sqrt(σ² + ε)``
    is taken as a constant. This is the smallest sum of squares with which these branches can make that fused kernel,
    so it decays what will be deployed and not how the branches share it, on the scale of ordinary weight decay.

    For a 3×3 and a 1×1 branch it is the authors' formula: k² on the ring, their quotient at the centre. Where one
    branch reaches alone it is k², ordinary weight decay. As in their formula, an identity branch is left out: it has
    no kernel to decay, and with its constant in the sum, decay would pull the other kernels towards minus the
    identity. So is a BatchNorm after the sum, which scales numerator and denominator alike. Branches of other classes
    keep the ordinary decay of their kernels. A channel whose γ are all 0 deploys to zeros and adds nothing.

    Returns:
        a scalar; add ``0.5 * weight_decay`` times it to the loss, and give the optimiser groups with ``custom_l2``.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    for branches in _fusing(model):
        if branches:
            maps = [_scaled_kernel(branch) for branch in branches]
            kernel = reduce(operator.add, (kernel for kernel, _ in maps)).kernel
            squares = reduce(operator.add, (squares for _, squares in maps)).kernel
            total = total + (kernel.square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)).sum()
    return total


def _scaled_kernel(branch: ConvBN) -> tuple[Affine, Affine]:
    """t k and, wherever k reaches, t²: as maps, because maps know how to align their centres."""
    kernel = branch.conv.weight
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    bias = kernel.new_zeros(len(kernel))
    scale = torch.ones_like(bias) if isinstance(branch.bn, nn.Identity) else norm_as_affine(branch.bn, kernel)[0]
    scale = scale.detach()
    squares = kernel.new_ones(len(kernel), 1, *kernel.shape[2:])
    return Affine(kernel, bias).scaled(scale, bias), Affine(squares, bias).scaled(scale.square(), bias)


def scaled_lr(lr: float, lr_batch: int, batch_size: int) -> float:
    """The learning rate for ``batch_size`` images per step, where ``lr`` holds for ``lr_batch`` of them.

    Linear (Goyal et al. 2017, section 2.1): A0 loses 3 points top-1 when the batch grows 8× and lr stays.
    """
    return lr * batch_size / lr_batch


def require_optimizer(make: Callable[..., Optimizer], lr: float) -> None:
    """Raise ValueError for values that an optimiser refuses, such as a negative momentum, before there is a run."""
    try:
        make([nn.Parameter(torch.zeros(1))], lr=lr)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe.optimizer: {error}") from error


def warmup_then_cosine(optimizer: Optimizer, steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Linear from lr/100 over ``warmup_steps``, then cosine to 0 at ``steps``; stepped after every optimiser step.

    A function of the step alone, so a training can begin at any step of it (:func:`schedule_at`).

    Raises:
        ValueError: a warm-up that is not shorter than the training.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not fit into {steps} training steps: "
            "lower recipe.warmup_epochs or raise trainer.max_epochs"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return 0.01 + 0.99 * step / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(steps - warmup_steps, 1))))

    return LambdaLR(optimizer, factor)


def schedule_at(schedule: LambdaLR, step: int) -> LambdaLR:
    """The same schedule after ``step`` optimiser steps; sets the optimiser's learning rates."""
    return LambdaLR(schedule.optimizer, schedule.lr_lambdas, last_epoch=step - 1)


def require_whole_epochs(max_steps: int, steps_per_epoch: int) -> None:
    """Raise ValueError where ``trainer.max_steps`` (-1: no limit) ends within an epoch, at whose end validation is."""
    if max_steps > 0 and max_steps % steps_per_epoch:
        whole = max(max_steps // steps_per_epoch, 1) * steps_per_epoch
        raise ValueError(
            f"trainer.max_steps={max_steps} ends within an epoch of {steps_per_epoch} steps, and validation comes "
            f"after an epoch: give trainer.max_steps={whole}, or for a shorter epoch trainer.max_epochs=1 "
            f"trainer.limit_train_batches={max_steps}"
        )


def batch_per_device(batch_size: int, devices: int, accumulate: int = 1) -> int:
    """The share of one forward of one device.

    Raises:
        ValueError: a share that is not whole.
    """
    share, rest = divmod(batch_size, devices * accumulate)
    if rest or not share:
        below, above = batch_size - rest, batch_size - rest + devices * accumulate
        choices = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"recipe.batch_size={batch_size} is the number of images per optimiser step over all devices, and "
            f"{devices} devices × {accumulate} accumulated batches cannot share it evenly: "
            f"try recipe.batch_size={choices}"
        )
    return share
