"""An exported file that computes something else than its network is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repvgg.deploy.check import MismatchError, compare, require_close
from repvgg.deploy.runtimes import Program
from support.exported import images


class Scaled(Program):
    """A program whose logits are its input's first numbers, changed."""

    runtime = "torch"

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(Path("net.pt2"), {"input_size": "[3, 2, 2]"}, "f32")
        self.change = change

    def run(self, images):
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        return self.change(images.flatten(1)[:, :5])


def pairs() -> list[tuple[Tensor, Tensor]]:
    batches = [images(4, 3, 2, 2), images(1, 3, 2, 2, seed=1)]
    return [(batch, batch.flatten(1)[:, :5]) for batch in batches]


def test_the_numbers_are_those_of_all_images() -> None:
    found = compare(Scaled(lambda logits: logits), pairs())
    assert (found.max_abs, found.rel_l2, found.top1_agreement, found.dtype) == (0, 0, 1, "f32")
    found = compare(Scaled(lambda logits: 1.5 * logits), pairs())
    largest = max(logits.max().item() for _, logits in pairs())
    assert found.max_abs == pytest.approx(largest / 2)
    assert found.rel_l2 == pytest.approx(0.5)
    assert found.top1_agreement == 1
    # The batch of one image alone is another class.
    found = compare(Scaled(lambda logits: logits if len(logits) > 1 else -logits), pairs())
    assert found.top1_agreement == pytest.approx(4 / 5)


@pytest.mark.parametrize("change", [lambda x: x * 1.001, lambda x: x * torch.nan, lambda x: x + 1], ids=range(3))
def test_what_is_too_far_off_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    program = Scaled(change)
    found = compare(program, pairs())
    with pytest.raises(MismatchError, match=r"torch 2\S+ computes other logits than torch: .*tolerance=0.0001"):
        require_close(program, found, tolerance=1e-4)
    assert MismatchError.exit_code == 1


def test_what_is_close_enough_passes() -> None:
    program = Scaled(lambda logits: logits * 1.001)
    require_close(program, compare(program, pairs()), tolerance=1e-2)


def test_beside_logits_of_zero_nothing_is_no_difference() -> None:
    zeros = [(batch, torch.zeros_like(logits)) for batch, logits in pairs()]
    same = Scaled(lambda logits: 0 * logits)
    require_close(same, found := compare(same, zeros), 1e-4)
    assert found.rel_l2 == 0
    for change in (lambda logits: logits, lambda logits: logits * float("nan")):
        other = Scaled(change)
        with pytest.raises(MismatchError, match=r"relative L2 (inf|nan)"):
            require_close(other, compare(other, zeros), 1e-4)
