"""What the compiled extension is told about an image, and what it answers."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from repvgg.data import _decode
except ImportError as error:
    raise ImportError(
        "repvgg.data._decode is not compiled (or for another Python): make setup, or pip install --editable ."
    ) from error

JOB = np.dtype(
    [
        ("address", np.uint64),  # of the record's bytes in memory
        ("bytes", np.uint64),
        ("jpg", np.int64),  # else raw pixels
        ("height", np.int64),  # of the stored image
        ("width", np.int64),
        ("window_top", np.int64),  # the pixels that the resize may look at
        ("window_left", np.int64),
        ("window_bottom", np.int64),
        ("window_right", np.int64),
        ("top", np.float64),  # the box, see transforms.Boxes
        ("left", np.float64),
        ("box_height", np.float64),
        ("box_width", np.float64),
        ("mirrored", np.int64),
    ]
)
"""All that the extension needs to know about one image of a batch; `Job` of `_decode.c`."""

PROBLEMS = {1: "does not decode", 2: "holds a JPEG of another size than it announces", 3: "found no memory to decode"}


def run_jobs(
    jobs: NDArray[Any], out: NDArray[np.uint8], pool: ThreadPoolExecutor, num_threads: int
) -> tuple[int, str] | None:
    """Decode into `out` (N×size×size×3); threads take image after image. Returns the first failure and its problem."""
    status = np.empty(len(jobs), dtype=np.int32)
    cursor = np.zeros(1, dtype=np.int64)
    running = [
        pool.submit(_decode.decode, jobs, cursor, out, status, out.shape[1]) for _ in range(min(num_threads, len(jobs)))
    ]
    for future in running:
        future.result()
    if not status.any():
        return None
    first = int(np.argmax(status != 0))
    return first, PROBLEMS[int(status[first])]
