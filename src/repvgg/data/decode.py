"""From records on disk to a batch of pixels: decode, crop, resize and mirror in one pass, with FFCV's C functions.

FFCV's own decoders draw their random numbers from per-thread generators that nothing seeds, ignore the return code
of the JPEG decoder (a broken record yields a black image or an old one), keep one full-size image buffer per batch
slot, and are compiled anew in every process. Here

- boxes come from `transforms` with the hashed numbers of `draws`: a function of seed, epoch and image;
- a record that does not decode is an error which names it;
- a full-size buffer exists once per thread;
- one numba function serves all transforms and sizes, and its machine code is cached on disk.

Threads are Python's: the numba function releases the interpreter lock, and a plain thread pool has none of the
trouble of numba's parallel layers (which abort when two loaders run at once, or after a fork).
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replaced
from typing import Any

import llvmlite.binding
import numpy as np
from numba import from_dtype, njit, types
from numpy.typing import NDArray

from repvgg.data.draws import Draws
from repvgg.data.ffcv_setup import AllocationQuery, IntDecoder, SimpleRGBImageDecoder, State, libffcv
from repvgg.data.transforms import Transform
from repvgg.data.verify import JPG, corrupt


def _c_function(name: str, signature: Any) -> Any:
    """One of FFCV's C functions for compiled code; pointers travel as integers.

    Under a name of our own: the linker looks a symbol up in the whole process, where `resize` may be anybody's.
    """
    address = ctypes.cast(getattr(libffcv.lib, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"repvgg_ffcv_{name}", address)
    return types.ExternalFunction(f"repvgg_ffcv_{name}", signature)


_u32, _u64, _i64 = types.uint32, types.uint64, types.int64
# imdecode(input, bytes, height, width, output, crop height and width, x and y offset, scale numerator and
#          denominator, enable crop, flip) -> 0, or -1 when turbojpeg complains
_imdecode = _c_function("imdecode", types.int32(_u64, _u64, _u32, _u32, _u64, *[_u32] * 8))
# resize(unused, source, height, width, row from and to, column from and to, output, its height and width): INTER_AREA
_resize = _c_function("resize", types.void(*[_i64] * 11))
_memcpy = _c_function("my_memcpy", types.void(_u64, _u64, _u64))  # source, output, bytes

JOB = np.dtype(
    [
        ("address", np.uint64),  # of the record's bytes in memory
        ("bytes", np.uint64),
        ("jpg", np.bool_),  # else raw pixels
        ("height", np.int64),  # of the stored image
        ("width", np.int64),
        ("top", np.int64),  # the box, see transforms.Boxes
        ("left", np.int64),
        ("box_height", np.int64),
        ("box_width", np.int64),
        ("mirrored", np.bool_),
    ],
    align=True,
)
"""All the compiled code needs to know about one image of a batch."""


@njit(nogil=True, cache=True)
def _copy_padded(source, job, out):  # type: ignore[no-untyped-def]
    """Copy the part of a size × size box that lies inside the image; black elsewhere."""
    out[:] = 0
    first_row, last_row = max(0, -job.top), min(out.shape[0], job.height - job.top)
    first_col, last_col = max(0, -job.left), min(out.shape[1], job.width - job.left)
    for row in range(first_row, last_row):
        start = ((job.top + row) * job.width + job.left + first_col) * 3
        for offset in range((last_col - first_col) * 3):
            out[row, first_col + offset // 3, offset % 3] = source[start + offset]


@njit(nogil=True, cache=True)
def _mirror(image):  # type: ignore[no-untyped-def]
    width = image.shape[1]
    for row in range(image.shape[0]):
        for col in range(width // 2):
            for channel in range(3):
                left = image[row, col, channel]
                image[row, col, channel] = image[row, width - 1 - col, channel]
                image[row, width - 1 - col, channel] = left


# One signature for strided and contiguous arrays alike, compiled (or read from the cache) at import: left to itself,
# numba would compile again in the middle of an epoch, for a last batch of one image.
@njit(
    types.void(
        types.Array(from_dtype(JOB), 1, "A"),
        types.Array(types.uint8, 4, "A"),
        types.Array(types.uint8, 1, "C"),
        types.Array(types.int32, 1, "A"),
    ),
    nogil=True,
    cache=True,
)
def _run_jobs(jobs, out, scratch, status):  # type: ignore[no-untyped-def]
    """Fill out (N×size×size×3, uint8) and status (N, 0 = decoded); scratch holds one full-size image."""
    size = out.shape[1]
    for i in range(len(jobs)):
        job = jobs[i]
        if job.jpg:
            pixels = np.uint64(scratch.ctypes.data)
            status[i] = _imdecode(
                job.address, job.bytes, job.height, job.width, pixels, job.height, job.width, 0, 0, 1, 1, 0, 0
            )
            if status[i] != 0:
                continue
        else:
            pixels = job.address
            status[i] = 0
        bottom, right = job.top + job.box_height, job.left + job.box_width
        if job.top >= 0 and job.left >= 0 and bottom <= job.height and right <= job.width:
            target = out[i].ctypes.data
            _resize(0, pixels, job.height, job.width, job.top, bottom, job.left, right, target, size, size)
        else:
            if not job.jpg:
                _memcpy(pixels, np.uint64(scratch.ctypes.data), job.bytes)
            _copy_padded(scratch, job, out[i])
        if job.mirrored:
            _mirror(out[i])


class FusedDecoder(SimpleRGBImageDecoder):
    """FFCV image decoder for any `Transform`. Yields N×size×size×3, uint8.

    `epoch` and `transform` are read at every batch, so either may change between epochs without compiling anything.
    """

    def __init__(self, transform: Transform, *, path: object, seed: int, num_threads: int) -> None:
        super().__init__()
        self.transform = transform
        self.path = path
        self.seed = seed
        self.epoch = 0
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._scratch: NDArray[np.uint8] | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Called by FFCV at construction and before every epoch."""
        heights, widths = (self.metadata[side].astype(np.int64) for side in ("height", "width"))
        self.transform.check(heights, widths)
        if self._scratch is None:
            largest = int((heights * widths).max()) * 3
            self._scratch = np.empty((self._num_threads, largest), dtype=np.uint8)
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
        return jobs

    def _run(self, jobs: NDArray[Any], out: NDArray[np.uint8], ids: NDArray[np.integer]) -> None:
        """Every thread takes every num_threads-th image. Raise if any did not decode."""
        assert self._scratch is not None
        status = np.empty(len(jobs), dtype=np.int32)
        step = self._num_threads
        running = [
            self._pool.submit(_run_jobs, jobs[first::step], out[first::step], scratch, status[first::step])
            for first, scratch in zip(range(min(step, len(jobs))), self._scratch, strict=False)
        ]
        for future in running:
            future.result()
        if status.any():
            raise corrupt(str(self.path), f"record {int(ids[np.argmax(status != 0)])} does not decode")


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
