"""Which images a rank sees in an epoch, and in which order. Pure functions of seed and epoch."""

import numpy as np
from numpy.typing import NDArray


def train_order(
    samples: int, *, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """One rank's share of a permutation of all images, a whole number of batches of `batch_size` images.

    The last incomplete *global* batch (batch_size × world_size) is dropped: other images in every epoch, since the
    permutation changes. Global batch k is the same set of images however many ranks share it.
    """
    whole = samples // (batch_size * world_size) * batch_size * world_size
    return np.random.default_rng([seed, epoch]).permutation(samples)[:whole][rank::world_size]


def val_order(samples: int, *, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
    """One rank's share such that all ranks together see every image exactly once.

    Shares differ by at most one image, so ranks may have different numbers of batches: sum the counts over ranks,
    and use no collective operation per batch.
    """
    return np.arange(rank, samples, world_size, dtype=np.int64)


def check_share(samples: int, *, batch_size: int, rank: int, world_size: int, train: bool, path: object) -> None:
    """Raise ValueError when some rank would have nothing to do."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 … world_size-1, got rank {rank} of world_size {world_size}")
    if train and batch_size * world_size > samples:
        raise ValueError(
            f"batch_size {batch_size} on {world_size} rank(s) needs {batch_size * world_size} images per step, but "
            f"{path} holds {samples}. Choose a batch_size of at most {samples // world_size}."
        )
    if world_size > samples:
        raise ValueError(
            f"{world_size} ranks cannot share the {samples} images of {path}: use at most {samples} ranks."
        )
