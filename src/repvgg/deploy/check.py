"""Whether an exported file computes what its network does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from repvgg.deploy.runtimes import Program
from repvgg.model import Equivalence


class MismatchError(RuntimeError):
    """An exported file computes something else than its network."""

    exit_code = 1


def compare(program: Program, pairs: Iterable[tuple[Tensor, Tensor]]) -> Equivalence:
    """How far a program's logits are from the network's, over all images.

    Args:
        program: an exported file in a runtime.
        pairs: batches of what the file takes, and the network's logits of the same images.
    """
    batches = [(wanted.double(), program(images).double()) for images, wanted in pairs]
    wanted, got = (torch.cat(side) for side in zip(*batches, strict=True))
    return Equivalence(
        max_abs=(got - wanted).abs().max().item(),
        rel_l2=((got - wanted).norm() / wanted.norm()).item(),
        top1_agreement=(got.argmax(1) == wanted.argmax(1)).double().mean().item(),
        dtype=program.precision,
    )


def require_close(program: Program, found: Equivalence, tolerance: float) -> None:
    """Refuse a file whose logits are more than ``tolerance`` away, in relative L2.

    Raises:
        MismatchError: also where the difference is not a number.
    """
    if not found.rel_l2 <= tolerance:
        raise MismatchError(
            f"{program.runtime} {program.version} computes other logits than torch: relative L2 {found.rel_l2:.3g}, "
            f"tolerance={tolerance:g}. The file is not kept"
        )
