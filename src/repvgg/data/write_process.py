"""The process in which FFCV's writer runs: `python -m repvgg.data.write_process request.pickle`. See `write`.

It ends by itself in every case: when a worker dies or a sample is refused, when nothing has moved for STALL_S, and
when the process that started it is gone.
"""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from unittest.mock import patch

import numpy as np
from PIL import Image

from repvgg.data.ffcv_setup import DatasetWriter, IntField, RGBImageField
from repvgg.data.sources import ImageSource
from repvgg.data.write import Request, WriteOptions

STALL_S = 300.0
POLL_S = 0.2
PAGE_BYTES = 1 << 23
"""FFCV's default. A record must fit into a page."""
LARGEST_SIDE = 65535
"""Width and height are stored in 16 bits."""


def fail(error_file: Path, message: str) -> NoReturn:
    """Leave the message for the parent (the first one counts) and end the whole process group, this one included."""
    partial = error_file.with_name(f"error-{os.getpid()}.json")
    partial.write_text(json.dumps(message), encoding="utf-8")
    with suppress(FileExistsError):  # another process was first, and its message is the cause of this one
        os.link(partial, error_file)
    os.killpg(0, signal.SIGKILL)
    raise SystemExit(1)  # not reached


@dataclass(frozen=True)
class CheckedSource:
    """A source whose every problem is reported: in FFCV's workers an exception would make the writer wait for ever."""

    source: ImageSource
    options: WriteOptions
    seed: int
    error_file: Path
    done: Any
    """Shared counter of samples handed out, for the watchdog."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        try:
            image, label = self.source[index]
            checked = self._pixels(image), self._label(label)
        except Exception as error:
            fail(self.error_file, f"sample {index} of {self.source.description}: {type(error).__name__}: {error}")
        # FFCV draws from numpy's global generator whether to compress (write_mode=proportion), right after this
        # call and in the same process. Seeded so, the choice depends on the sample, not on the worker.
        np.random.seed([self.seed % 2**32, index])  # noqa: NPY002
        with self.done.get_lock():
            self.done.value += 1
        return checked

    def _pixels(self, image: Image.Image) -> np.ndarray[Any, Any]:
        if image.mode != "RGB":
            raise ValueError(f"mode {image.mode} instead of RGB")
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        longest = self.options.max_resolution or max(height, width)
        scale = min(1.0, longest / max(height, width, 1))
        if min(int(height * scale), int(width * scale)) < 1 or max(height, width) * scale > LARGEST_SIDE:
            raise ValueError(f"{width}×{height} pixels cannot be stored (1 … {LARGEST_SIDE} each after resizing)")
        if height * width * scale**2 * 3 > PAGE_BYTES:
            raise ValueError(
                f"{width}×{height} pixels may not fit into {PAGE_BYTES >> 20} MiB: set max_resolution (ImageNet: 500)"
            )
        return pixels

    def _label(self, label: object) -> int:
        if not isinstance(label, int | np.integer) or not 0 <= label < len(self.source.classes):
            raise ValueError(f"label {label!r} is not a whole number in 0 … {len(self.source.classes) - 1}")
        return int(label)


class Writer(DatasetWriter):
    """FFCV's writer, whose shared memory has no name: killing the group leaves nothing in /dev/shm."""

    def prepare(self) -> None:
        """Workers inherit the mapping by fork, so the name is not needed once it exists."""
        super().prepare()
        self.metadata_sm.unlink()
        self.metadata_sm.unlink = lambda: None


class Worker(multiprocessing.Process):
    """FFCV's worker process, remembered: multiprocessing itself forgets children that have died."""

    started: ClassVar[list["Worker"]] = []

    def start(self) -> None:
        """Start and remember."""
        super().start()
        self.started.append(self)


def watch(request: Request, done: Any, parent: int) -> None:
    """End everything on trouble. Runs in a thread until the process ends."""
    last_count, last_move = -1, time.monotonic()
    while True:
        time.sleep(POLL_S)
        if os.getppid() != parent:
            fail(request.error_file, "the process that asked for the file is gone")
        for worker in tuple(Worker.started):
            if worker.exitcode not in (None, 0):
                fail(
                    request.error_file,
                    f"a worker that wrote {request.target} died with code {worker.exitcode} (negative: a signal; -9 "
                    "is often a lack of memory); its output, if any, is above",
                )
        if done.value != last_count:
            last_count, last_move = done.value, time.monotonic()
        elif time.monotonic() - last_move > STALL_S:
            fail(request.error_file, f"{request.target}: nothing was written for {STALL_S:g} s: does the disk answer?")


def main(request_file: str) -> None:
    """Carry out one request."""
    parent = os.getppid()
    request: Request = pickle.loads(Path(request_file).read_bytes())
    multiprocessing.set_start_method("fork", force=True)  # FFCV hands its workers objects that do not pickle
    done = multiprocessing.Value("Q", 0)
    threading.Thread(target=watch, args=(request, done, parent), daemon=True).start()
    options = request.options
    image = RGBImageField(
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
    )
    writer = Writer(
        str(request.target),
        {"image": image, "label": IntField()},
        page_size=PAGE_BYTES,
        num_workers=request.num_workers,
    )
    try:
        with patch("ffcv.writer.Process", Worker):
            writer.from_indexed_dataset(
                CheckedSource(request.source, options, request.seed, request.error_file, done),
                indices=np.random.default_rng(request.seed).permutation(len(request.source)).tolist(),
            )
    except Exception as error:
        fail(request.error_file, f"{request.target}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
    # Not an ordinary end: importing FFCV starts numba's thread pool, and its TBB variety waits for ever while it is
    # unloaded in a process that has forked on a single core.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
