"""Whose BatchNorm statistics count where several ranks train one network.

Every rank trains on a share of the batch. What a BatchNorm normalises by, and which running statistics are then
validated, converted and saved, is one of

``rank0``
    Every rank normalises by its own share; the running statistics of rank 0 count: what
    DistributedDataParallel does by itself.
``mean``
    Every rank normalises by its own share; the mean over the ranks of their running means, and of their running
    variances, counts. Each is then an average over every share instead of over rank 0's, of the same kind: a
    variance stays one within a share of a batch, which is what the network was trained with, and the variance
    between the ranks' means is left out. Validating and saving put the mean in place on all ranks. As it is linear in
    the batches, a run that saves at other steps has the same weights, and statistics that differ by rounding alone.
``sync``
    All ranks normalise by the whole batch (torch's SyncBatchNorm; GPUs only), and have the same statistics. One
    exchange per BatchNorm and direction.

A training forward writes running statistics and reads none, so DistributedDataParallel need not send rank 0's around
before each: weights and what rank 0 saves are the same to the last bit. Networks that do read them (DBB's border,
:class:`repvgg.model.PointwiseConv`; :func:`repvgg.learn.optim.fused_l2`) have them brought together before every
batch, so that all ranks read the same and a resumed run, which begins with those of the file, what the other one read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.model import copied

CHOICES = ("rank0", "mean", "sync")


def check_batchnorm(batchnorm: str, accelerator: str = "gpu", devices: object = 1) -> None:
    """Before anything long begins.

    Args:
        batchnorm: one of ``CHOICES``.
        accelerator, devices: the Trainer's.

    Raises:
        ValueError: an unknown choice, or SyncBatchNorm where torch has none.
    """
    if batchnorm not in CHOICES:
        raise ValueError(f"batchnorm={batchnorm}: choose {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    if batchnorm == "sync" and accelerator == "cpu" and devices not in (1, "1"):
        raise ValueError(
            f"batchnorm=sync with trainer.devices={devices} on CPUs: torch's SyncBatchNorm works on GPUs only. "
            "Choose batchnorm=mean or batchnorm=rank0"
        )


def require_values(images: int, side: int, strides: Sequence[int]) -> None:
    """Raise ValueError where a BatchNorm of the last stage would see one value per channel, which torch refuses.

    Args:
        images: that one BatchNorm normalises together.
        side: of the training images, in pixels.
        strides: of the stages.
    """
    for stride in strides:
        side = math.ceil(side / stride)
    if images * side**2 == 1:
        raise ValueError(
            "recipe.batch_size leaves one image of one pixel to the last stage's BatchNorms, which need two values per "
            "channel: raise recipe.batch_size, or data.resolution"
        )


def ddp_options(batchnorm: str) -> dict[str, Any]:
    """Keyword arguments for ``DDPStrategy``.

    Raises:
        ValueError: an unknown choice.
    """
    check_batchnorm(batchnorm)
    return {"forward_sync_buffers": False}


@torch.no_grad()
def bring_together(tensors: dict[str, Tensor], batchnorm: str, statistics: set[str]) -> None:
    """Give all ranks the same ``tensors``, in place; every rank must call this. One rank is left alone.

    Doing it again changes nothing.

    Args:
        tensors: by name, the same on every rank.
        batchnorm: ``mean`` averages those named in ``statistics``; all else is rank 0's.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    averaged = [tensor for name, tensor in tensors.items() if batchnorm == "mean" and name in statistics]
    sent = [tensor for name, tensor in tensors.items() if not (batchnorm == "mean" and name in statistics)]
    if averaged:
        # In float64 the mean of equal float32 values is that value for any number of ranks.
        flat = torch.cat([tensor.double().flatten() for tensor in averaged])
        dist.all_reduce(flat)
        _scatter(flat / dist.get_world_size(), averaged)
    for dtype in dict.fromkeys(tensor.dtype for tensor in sent):
        those = [tensor for tensor in sent if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in those])
        dist.broadcast(flat, 0)
        _scatter(flat, those)


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def running_statistics(net: nn.Module) -> set[str]:
    """Names of the running means and variances in ``net``'s state."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in net.named_modules()
        if isinstance(module, _BatchNorm)
        for name in ("running_mean", "running_var")
    }


@torch.no_grad()
def reads_statistics(net: nn.Module, images: Tensor) -> bool:
    """Whether ``net`` in training mode gives other logits when its running statistics are others: tried out.

    Args:
        net: left as it is.
        images: N × C × H × W, of which two are enough.
    """
    if not any(True for _ in _norms(net)):
        return False
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        logits = []
        for factor in (1.0, 4.0):
            changed = copied(net).train()
            for norm in _norms(changed):
                norm.running_mean.add_(factor - 1)
                norm.running_var.mul_(factor)
            torch.manual_seed(0)
            logits.append(changed(images))
    # Not bit for bit: a GPU may take another algorithm the second time.
    here, there = logits
    return not torch.allclose(here, there, rtol=1e-4, atol=1e-4 * float(here.abs().max()))


def _norms(net: nn.Module) -> Iterator[Any]:
    return (m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)
