"""What the optimiser decays, and the learning rate of every step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

#: Modules whose ``weight`` is a kernel; everything else (BatchNorm's γ and β, biases) is not decayed.
KERNEL_MODULES = (nn.modules.conv._ConvNd, nn.Linear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: kernels with ``weight_decay``, all else without (paper, section 4.1).

    Chosen by the type of the module that owns a parameter, never by its name: names that contain "bn" miss the
    BatchNorm of the identity branch.
    """
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, KERNEL_MODULES)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "kernels", "params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay},
        {"name": "rest", "params": [p for p in trained if id(p) not in kernels], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scaled_lr(lr: float, lr_batch: int, batch_size: int) -> float:
    """The learning rate for ``batch_size`` images per step, where ``lr`` holds for ``lr_batch`` of them.

    Linear (Goyal et al. 2017, section 2.1): A0 loses 3 points top-1 when the batch grows 8× and lr stays.
    """
    return lr * batch_size / lr_batch


def warmup_then_cosine(optimizer: Optimizer, steps: int, warmup_steps: int = 0) -> LRScheduler:
    """Linear from lr/100 over ``warmup_steps``, then cosine to 0 at ``steps``; stepped after every optimiser step.

    Raises:
        ValueError: a warm-up that is not shorter than the training.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not fit into {steps} training steps: "
            "lower recipe.warmup_epochs or raise trainer.max_epochs"
        )
    cosine = CosineAnnealingLR(optimizer, T_max=max(steps - warmup_steps, 1))
    if not warmup_steps:
        return cosine
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])


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
