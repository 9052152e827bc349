"""From records on disk to a batch of pixels: decode, crop, resize and mirror in one pass.

FFCV's own decoders draw their random numbers from per-thread generators that nothing seeds, ignore the return code
of the JPEG decoder (a broken record yields a black image or an old one), decode pixels that no crop shows, keep one
full-size image buffer per batch slot, and are compiled anew in every process. Here

- boxes come from `transforms` with the hashed numbers of `draws`: a function of seed, epoch and image;
- a record that does not decode is an error which names it, and so is one of which libjpeg merely warns, where it
  would paint gray what it cannot read (the writer has stored such an image of the source anew, so that it is whole);
- a file that is shortened while it is read is an error at the next batch. In the midst of one, a mapped page that is
  no longer there, or that a disk fails to read, ends the process with SIGBUS ("Fatal Python error: Bus error"); the
  same command then says what is wrong with the file, if it is too short;
- one compiled extension (`_decode.c`) serves all transforms and sizes; it decodes what a crop needs, and a thread
  holds one decoded crop at a time.

Threads are Python's: the extension releases the interpreter lock, and a plain thread pool has none of the trouble of
numba's parallel layers (which abort when two loaders run at once, or after a fork).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from repvgg.data.draws import Draws
from repvgg.data.ffcv_setup import AllocationQuery, IntDecoder, SimpleRGBImageDecoder, State
from repvgg.data.jobs import JOB, run_jobs
from repvgg.data.transforms import Transform
from repvgg.data.verify import JPG, corrupt


class FusedDecoder(SimpleRGBImageDecoder):
    """FFCV image decoder for any `Transform`. Yields N×size×size×3, uint8.

    `epoch` and `transform` are read at every batch, so either may change between epochs without compiling anything.
    """

    def __init__(self, transform: Transform, *, path: str | Path, seed: int, num_threads: int) -> None:
        super().__init__()
        self.transform = transform
        self.path = path
        self.seed = seed
        self.epoch = 0
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        # The file that is mapped, whatever another process puts in its place.
        self._descriptor = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self._descriptor)
        self._bytes = os.fstat(self._descriptor).st_size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Called by FFCV at construction and before every epoch."""
        heights, widths = (self.metadata[side].astype(np.int64) for side in ("height", "width"))
        self.transform.check(heights, widths)
        shape = (self.transform.size, self.transform.size, 3)
        pixels = np.dtype("u1")
        return replaced(previous_state, jit_mode=True, shape=shape, dtype=pixels), AllocationQuery(shape, pixels)

    def generate_code(self) -> Callable[..., NDArray[np.uint8]]:
        """The function FFCV calls once per batch, from the loader's thread."""

        def decode(
            batch_indices: NDArray[np.integer],
            destination: NDArray[np.uint8],
            metadata: NDArray[Any],
            storage_state: tuple[NDArray[Any], ...],
        ) -> NDArray[np.uint8]:
            out = destination[: len(batch_indices)]
            self._require_whole_file()
            jobs = self._jobs(batch_indices, metadata[batch_indices], storage_state)
            self._run(jobs, out, batch_indices)
            return out

        decode.precompiled = True  # type: ignore[attr-defined]
        return decode

    def _jobs(
        self, ids: NDArray[np.integer], rows: NDArray[Any], storage_state: tuple[NDArray[Any], ...]
    ) -> NDArray[Any]:
        heights, widths = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        boxes = self.transform.boxes(heights, widths, Draws(self.seed, self.epoch, ids))
        jobs = np.empty(len(ids), dtype=JOB)
        jobs["address"], jobs["bytes"] = _locate(rows["data_ptr"], storage_state)
        jobs["jpg"] = rows["mode"] == JPG
        jobs["height"], jobs["width"] = heights, widths
        jobs["top"], jobs["left"] = boxes.top, boxes.left
        jobs["box_height"], jobs["box_width"] = boxes.height, boxes.width
        jobs["mirrored"] = boxes.mirrored
        if boxes.cut_first:
            jobs["window_top"], jobs["window_left"] = boxes.top, boxes.left
            jobs["window_bottom"], jobs["window_right"] = boxes.top + boxes.height, boxes.left + boxes.width
        else:
            jobs["window_top"], jobs["window_left"] = 0, 0
            jobs["window_bottom"], jobs["window_right"] = heights, widths
        return jobs

    def _require_whole_file(self) -> None:
        """Also without a mapping: FFCV's page cache takes what an earlier page held for what it cannot read."""
        size = os.fstat(self._descriptor).st_size
        if size < self._bytes:
            raise corrupt(self.path, f"was shortened from {self._bytes:,} to {size:,} bytes while it was read")

    def _run(self, jobs: NDArray[Any], out: NDArray[np.uint8], ids: NDArray[np.integer]) -> None:
        """Raise if any did not decode."""
        failure = run_jobs(jobs, out, self._pool, self._num_threads)
        if failure is not None:
            at, problem = failure
            raise corrupt(self.path, f"record {int(ids[at])} {problem}")


def _locate(pointers: NDArray[np.uint64], storage_state: tuple[NDArray[Any], ...]) -> tuple[Any, Any]:
    """Memory addresses and byte counts of records, for both of FFCV's ways to hold a file.

    os_cache: (the mapped file, sorted pointers, sizes). Process cache: (slots × page, sorted pointers, sizes, slot
    of each page).
    """
    memory, known, sizes = storage_state[:3]
    position = np.searchsorted(known, pointers)
    start = np.uint64(memory.ctypes.data)
    if len(storage_state) == 3:
        return start + pointers, sizes[position]
    page_size = np.uint64(memory.shape[1])
    page = pointers // page_size
    slot = storage_state[3][page].astype(np.uint64)
    return start + slot * page_size + pointers % page_size, sizes[position]


class LabelDecoder(IntDecoder):
    """FFCV's integer decoder in plain numpy: nothing to compile. Yields N×1, int64."""

    def generate_code(self) -> Callable[..., NDArray[np.int64]]:
        """The function FFCV calls once per batch."""

        def decode(
            batch_indices: NDArray[np.integer],
            destination: NDArray[np.int64],
            metadata: NDArray[np.int64],
            storage_state: object,
        ) -> NDArray[np.int64]:
            out = destination[: len(batch_indices)]
            out[:, 0] = metadata[batch_indices]
            return out

        decode.precompiled = True  # type: ignore[attr-defined]
        return decode
