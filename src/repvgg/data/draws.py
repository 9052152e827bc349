"""Random numbers that are a function of seed, epoch, image and draw number, and of nothing else.

A generator with a state would make augmentation depend on which thread, batch or rank handles an image, and a
resumed run would differ from an uninterrupted one. Here every number is a hash: splitmix64 (Steele, Lea and Flood,
Fast splittable pseudorandom number generators, OOPSLA 2014) started at a key per image and epoch.
"""

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: UInts) -> UInts:
    """splitmix64's output function, a bijection of 64-bit words (arrays wrap around without a warning)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """`draws(k)`: the k-th uniform number in [0, 1) of each of the N `sample_ids`, shape (N,), float64."""

    def __init__(self, seed: int, epoch: int, sample_ids: NDArray[np.integer]) -> None:
        key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN_GAMMA)
        key = _mix((key ^ np.uint64(epoch)) + _GOLDEN_GAMMA)
        self._keys = _mix((key ^ sample_ids.astype(np.uint64)) + _GOLDEN_GAMMA)

    def __call__(self, number: int) -> NDArray[np.float64]:
        """Draw `number`, the same however often and in which order it is asked for."""
        words = _mix(self._keys + np.array([number + 1], dtype=np.uint64) * _GOLDEN_GAMMA)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
