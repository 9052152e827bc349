"""Whether an exported file computes what its network does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.deploy.preprocess import Preprocessing
from repvgg.deploy.runtimes import Program, load_program
from repvgg.model import Equivalence, relative


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
        rel_l2=relative((got - wanted).norm(), wanted.norm()).item(),
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


def check_file(
    path: Path,
    net: nn.Module,
    pixels: Sequence[Tensor],
    preprocessing: Preprocessing,
    runtimes: Sequence[str],
    *,
    tolerance: float,
    another_size: bool = False,
) -> Iterator[str]:
    """Compare a file with its network in every runtime; a line to print for each comparison.

    Args:
        path: what ``net`` was exported to.
        net: on the CPU, in eval mode.
        pixels: batches, uint8 N × C × crop × crop.
        preprocessing: of the file.
        runtimes: of :data:`repvgg.deploy.runtimes.RUNTIMES`.
        tolerance: see :func:`require_close`.
        another_size: also compare at another height and width, with the same images enlarged.

    Raises:
        MismatchError: at the first runtime that is too far off.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    side = preprocessing.crop
    for size in [(side, side), *([(side + 9, side + 32)] if another_size else [])]:
        scaled = [batch.float() for batch in pixels]
        if size != (side, side):
            scaled = [F.interpolate(batch, size, mode="bilinear") for batch in scaled]
        normalized = [(batch - mean) / std for batch in scaled]
        with torch.inference_mode():
            logits = [net(batch) for batch in normalized]
        for runtime in runtimes:
            program = load_program(path, runtime)
            found = compare(program, zip(scaled if preprocessing.inside else normalized, logits, strict=True))
            yield f"{runtime} {program.version}, {size[0]} × {size[1]}: {found}"
            require_close(program, found, tolerance)
