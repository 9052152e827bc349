"""Parameters and multiply-adds of a model, counted, not estimated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters; BatchNorm's running statistics are buffers and do not count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of convolutions and linear layers for one image (the paper's "theoretical FLOPs", Table 4).

    Args:
        model: evaluated on the meta device: no arithmetic is done and nothing is allocated.
        input_size: channels, height, width.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


def count_winograd_muls(model: nn.Module, input_size: Sequence[int]) -> int:
    """The paper's "Wino MULs" (section 3.4): a stride-1 3×3 convolution costs 4/9 of its multiply-adds.

    Args:
        model: evaluated on the meta device.
        input_size: channels, height, width.
    """
    saved = 0

    def count(module: nn.Conv2d, _: Any, output: Tensor) -> None:
        nonlocal saved
        if module.kernel_size == (3, 3) and module.stride == (1, 1) and module.dilation == (1, 1):
            macs = output[0].numel() * module.weight[0].numel()
            saved += macs - macs * 4 // 9

    meta = copy.deepcopy(model).to("meta").eval()
    for module in meta.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        meta(torch.empty(1, *input_size, device="meta"))
    return count_macs(model, input_size) - saved
