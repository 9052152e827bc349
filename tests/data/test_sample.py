"""Images drawn from a file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from repvgg.data.loader import make_loader
from repvgg.data.sample import drawn_images
from repvgg.data.transforms import CenterCrop

WHOLE = CenterCrop(32, 1.0)


def test_different_images_in_the_files_order_that_the_seed_alone_fixes(digits: Path) -> None:
    path = digits / "val.beton"
    loader = make_loader(path, transform=WHOLE, batch_size=360, train=False)
    every = next(iter(loader))[0].clone()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    drawn = drawn_images(path, transform=WHOLE, images=70, seed=3)
    assert (drawn.shape, drawn.dtype) == ((70, 3, 32, 32), torch.uint8)
    records = np.sort(np.random.default_rng(3).choice(360, 70, replace=False))
    assert torch.equal(drawn, every[records])
    assert torch.equal(drawn, drawn_images(path, transform=WHOLE, images=70, seed=3, num_threads=1))
    assert not torch.equal(drawn, drawn_images(path, transform=WHOLE, images=70, seed=4))
    assert torch.equal(drawn_images(path, transform=WHOLE, images=360, seed=0), every)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(("images", "message"), [(0, "n=0 must be at least 1"), (361, "n=361, but .* holds 360")])
def test_a_wrong_number_says_what_there_is(images: int, message: str, digits: Path) -> None:
    with pytest.raises(ValueError, match=message):
        drawn_images(digits / "val.beton", transform=WHOLE, images=images, seed=0, key="n")


def test_chosen_records_are_shared_by_the_ranks_and_never_shuffled(digits: Path) -> None:
    options = {"transform": WHOLE, "batch_size": 2, "records": [5, 3, 8, 0, 1]}
    loaders = [make_loader(digits / "val.beton", train=False, rank=r, world_size=2, **options) for r in (0, 1)]
    assert [list(loader.next_traversal_order()) for loader in loaders] == [[5, 8, 1], [3, 0]]
    assert [len(loader) for loader in loaders] == [2, 1]
    with pytest.raises(ValueError, match="records are chosen where nothing is shuffled"):
        make_loader(digits / "val.beton", train=True, **options)
