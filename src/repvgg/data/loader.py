"""Batches from a .beton file: FFCV's loader without its hangs, leaks and unseeded augmentation.

    loader = make_loader("data/digits/train.beton", transform=PadCrop(32, 4), batch_size=64, train=True)
    loader.set_epoch(3)
    for images, labels in loader:   # uint8 N×3×H×W in channels_last strides, int64 N
        ...

**A batch is valid until the next one is asked for.** Batches live in a ring of batches_ahead + 2 buffers; clone what
you keep. Pixels are 0 … 255: normalise on the device, where a byte per value has travelled instead of four.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace as replaced
from pathlib import Path
from queue import Empty, Full
from typing import Any, Literal
from weakref import WeakSet

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg.data.decode import FusedDecoder, LabelDecoder
from repvgg.data.ffcv_setup import (
    CenterCropRGBImageDecoder,
    EpochIterator,
    IntDecoder,
    Loader,
    Operation,
    RandomHorizontalFlip,
    RandomResizedCropRGBImageDecoder,
    RandomTranslate,
    SimpleRGBImageDecoder,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
    TransformNode,
    torch_threads_kept,
)
from repvgg.data.order import check_share, train_order, val_order
from repvgg.data.transforms import CenterCrop, PadCrop, RandomResizedCrop, Transform
from repvgg.data.verify import verify_beton

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

POLL_S = 0.5
BATCH_TIMEOUT_S = 600.0
"""Longest wait for one batch: far beyond a cold disk, short of leaving a node idle for a night."""


_parallel_iterations: WeakSet["_Iteration"] = WeakSet()
"""Live iterations that use numba's threads, which only FFCV's own operations do."""


class _Failure:
    """An exception on its way from the loader's thread to the caller's."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Iteration(EpochIterator):
    """One epoch: FFCV's thread with its waits bounded and its exceptions delivered."""

    loader: "SafeLoader"
    closed: bool

    def run(self) -> None:
        """Fill the ring until the epoch ends, something fails or `stop` is called."""
        try:
            self._produce()
            self._put(None)
        except BaseException as error:
            self._put(_Failure(error))

    def _produce(self) -> None:
        # Numba's count is per thread and matters to FFCV's own operations. torch's is per process: FFCV would set
        # it here, behind the caller's back.
        numba.set_num_threads(self.loader.num_workers)
        slots = self.loader.batches_ahead + 2
        on_cuda = self.loader.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.loader.device)
        events: list[torch.cuda.Event | None] = [None] * slots
        for number, indices in enumerate(self.iter_ixes):
            slot = number % slots
            # The GPU may be many steps behind the caller: wait until it has used what this slot held, so that
            # neither the pinned buffer nor its copy on the device is overwritten too early.
            if (event := events[slot]) is not None:
                event.synchronize()
            batch = self.run_pipeline(number, indices, slot, None)
            if not self._put((slot, batch)):
                return
            if on_cuda:
                # There was room, so the caller has asked for batch number-batches_ahead, and all work on the one
                # before it is in the stream.
                event = torch.cuda.Event()
                event.record(self.current_stream)
                events[(number + 1) % slots] = event

    def _put(self, item: object) -> bool:
        """False when the caller has stopped listening."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=POLL_S)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> Batch:
        item = self._get()
        if item is None:
            raise StopIteration
        if isinstance(item, _Failure):
            raise item.error
        slot, (images, labels) = item
        if self.loader.device.type == "cuda":
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return images, labels

    def _get(self) -> Any:
        waited = 0.0
        while waited < BATCH_TIMEOUT_S:
            if self.terminate_event.is_set():
                raise RuntimeError(
                    f"this iteration over {self.loader.fname} was stopped when a newer one of the same loader began"
                )
            alive = self.is_alive()
            try:
                return self.output_queue.get(timeout=POLL_S)
            except Empty:
                waited += POLL_S
                if not alive:
                    raise RuntimeError(f"the loader thread of {self.loader.fname} ended without a word") from None
        raise RuntimeError(f"no batch of {self.loader.fname} in {BATCH_TIMEOUT_S:g} s: does the disk answer?")

    def stop(self) -> None:
        """End the thread and let go of the buffers. May be called twice."""
        self.close()
        while not self.output_queue.empty():
            self.output_queue.get_nowait()
        if threading.current_thread() is not self:  # it may be this thread that collects a forgotten generator
            self.join(timeout=BATCH_TIMEOUT_S)
        self.memory_allocations = None
        executor = getattr(self.memory_context, "executor", None)  # of the process cache: os_cache=False
        for reader in getattr(executor, "threads", []):
            reader.join(timeout=BATCH_TIMEOUT_S)

    def close(self) -> None:
        """As FFCV's, which closes again at every call."""
        if not self.closed:
            super().close()
            self.closed = True


class SafeLoader(Loader):
    """FFCV's Loader for files with an `image` and a `label`. Most callers want `make_loader`.

    Order, sharding and what is dropped: see `repvgg.data.order`. The file is verified before it is opened. Only one
    iteration per loader is live: a new one stops the one before it. Different loaders may run at once.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pipelines: Mapping[str, Sequence[Operation]],
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
        device: torch.device | None = None,
        batches_ahead: int = 3,
        os_cache: bool = True,
        batches_per_step: int = 1,
        records: Sequence[int] | None = None,
        reshuffle: bool = True,
    ) -> None:
        if batches_ahead < 1:
            raise ValueError(f"batches_ahead must be at least 1, got {batches_ahead}")
        if train and records is not None:
            raise ValueError("records are chosen where nothing is shuffled: train=False")
        self._records = None if records is None else np.asarray(records, dtype=np.int64)
        self.samples = len(verify_beton(path))
        step = batch_size * batches_per_step if train else batch_size
        check_share(self.samples, batch_size=step, rank=rank, world_size=world_size, train=train, path=path)
        self.batches_per_step = batches_per_step
        self.reshuffle = reshuffle
        self.train = train
        self.rank = rank
        self.world_size = world_size
        self.device = device or torch.device("cpu")
        self._live: _Iteration | None = None
        self._skipped = 0
        with torch_threads_kept():
            super().__init__(
                str(path),
                batch_size=batch_size,
                num_workers=allowed_threads(num_threads),
                os_cache=os_cache,
                seed=seed,
                # Lists of our own: FFCV takes the decoder out of the one it is given.
                pipelines={name: list(operations) for name, operations in pipelines.items()},
                drop_last=train,
                batches_ahead=batches_ahead,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation of the next iteration. Without it, every iteration is the next epoch."""
        self.next_epoch = epoch

    def skip(self, batches: int) -> None:
        """Begin the next iteration, and only that, after its first `batches`; nothing is decoded of them.

        Raises:
            ValueError: beyond the epoch's end.
        """
        if not 0 <= batches <= len(self):
            raise ValueError(f"{batches} batches cannot be skipped: this rank has {len(self)} of {self.fname} an epoch")
        self._skipped = batches

    def batch_records(self, epoch: int, batch: int, rank: int | None = None) -> NDArray[np.int64]:
        """Record numbers of a batch (from 0) of an epoch, in its order; of this rank, or another.

        Raises:
            ValueError: an epoch has no such batch.
        """
        self._require_batch(batch)
        order = self._order(epoch, self.rank if rank is None else rank, self.world_size)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def global_batch_records(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """Record numbers of a batch of all ranks together: rank r has every world_size-th, beginning with the r-th.

        Raises:
            ValueError: an epoch has no such batch.
        """
        self._require_batch(batch)
        images = self.batch_size * self.world_size
        return self._order(epoch, 0, 1)[batch * images : (batch + 1) * images]

    def _require_batch(self, batch: int) -> None:
        if not 0 <= batch < len(self):
            raise ValueError(f"there is no batch {batch}: this rank has {len(self)} of {self.fname} an epoch, from 0")

    def set_size(self, size: int) -> None:
        """Change the output size in pixels from the next iteration on. Nothing is compiled again."""
        for decoder in self._fused():
            decoder.transform = replaced(decoder.transform, size=size)  # type: ignore[type-var]
        if not self._fused():
            raise ValueError("only ops='fused' can change the output size")

    def next_traversal_order(self) -> NDArray[np.int64]:
        """Record numbers of this rank's next epoch."""
        return self._order(self.next_epoch, self.rank, self.world_size)

    def _order(self, epoch: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Record numbers of an epoch; of all ranks with rank 0 of 1."""
        if self._records is not None:
            return self._records[rank::world_size]
        if not self.train:
            return val_order(self.samples, rank=rank, world_size=world_size)
        images_per_step = self.batch_size * self.batches_per_step * self.world_size
        return train_order(
            self.samples,
            batch_size=images_per_step // world_size,
            seed=self.seed,
            epoch=epoch if self.reshuffle else 0,
            rank=rank,
            world_size=world_size,
        )

    def generate_code(self) -> None:
        """FFCV's, with a look at the order of operations first: with a wrong one it loops for ever."""
        try:
            _, code = self.graph.collect_requirements()
        except AssertionError:  # FFCV notices some wrong orders, but names nothing
            self._check_order()
            raise
        self._check_order()
        self._parallel = any(getattr(f, "is_parallel", False) for f in code["operation"].values())
        self.code = self.graph.codegen_all(code)

    def _check_order(self) -> None:
        for node in self.graph.nodes:
            if isinstance(node, TransformNode) and node.is_jitted and not node.parent.is_jitted:
                after, before = _operation_name(node), _operation_name(node.parent)
                raise ValueError(
                    f"{after} works on arrays and cannot follow {before}, which yields tensors: put {after} before "
                    "ToTensor"
                )

    def __iter__(self) -> Iterator[Batch]:
        if self._live is not None:
            self._live.stop()
        if self._parallel and _parallel_iterations and numba.threading_layer() == "workqueue":
            raise RuntimeError(
                "numba's 'workqueue' threads abort the process when two loaders with ops='stock' run at once. Use "
                "ops='fused', or give numba another threading layer (install tbb, or a libgomp it can find)"
            )
        for decoder in self._fused():
            decoder.epoch = self.next_epoch
        order = self.next_traversal_order()[self._skipped * self.batch_size :]
        self.next_epoch += 1
        self._skipped = 0
        if not len(order):  # FFCV's page cache cannot have nothing to read
            return
        # Tensors that are born in inference mode could not be written by the loader's thread.
        with torch.inference_mode(False), _current_device(self.device):
            iteration = self._live = _Iteration(self, order)
        if self._parallel:
            _parallel_iterations.add(iteration)
        try:
            yield from iteration
        finally:  # after `break` too: Python closes a generator nobody holds
            iteration.stop()
            _parallel_iterations.discard(iteration)
            if self._live is iteration:
                self._live = None

    def __len__(self) -> int:
        images = len(self.first_traversal_order)
        return images // self.batch_size if self.train else -(-images // self.batch_size)

    def _fused(self) -> list[FusedDecoder]:
        decoders = (getattr(node, "decoder", None) for node in self.graph.nodes)
        return [decoder for decoder in decoders if isinstance(decoder, FusedDecoder)]


def _operation_name(node: Any) -> str:
    return type(node.operation if isinstance(node, TransformNode) else node.decoder).__name__


def allowed_threads(wanted: int | None) -> int:
    """All cores this process may use, or fewer on request; asking for more warns. FFCV would fail."""
    cores = len(os.sched_getaffinity(0))
    if wanted is None:
        return cores
    if wanted < 1:
        raise ValueError(f"num_threads must be at least 1 (or null for all allowed cores), got {wanted}")
    if wanted > cores:
        log.warning("num_threads=%d, but this process may use %d core(s): using %d", wanted, cores, cores)
    return min(wanted, cores)


def make_loader(
    path: str | Path,
    *,
    transform: Transform,
    batch_size: int,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    device: torch.device | None = None,
    ops: Literal["fused", "stock"] = "fused",
    batches_ahead: int = 3,
    os_cache: bool = True,
    batches_per_step: int = 1,
    records: Sequence[int] | None = None,
    reshuffle: bool = True,
) -> SafeLoader:
    """Yield (images, labels) on `device` (None: CPU): uint8 N×3×H×W in channels_last strides, and int64 (N,).

    `batch_size` is per rank. `train` shuffles, shards and drops the incomplete last batch; otherwise every image
    comes once, in order, over all ranks. `ops="stock"` builds the same crop from FFCV's own operations, as a
    baseline: its crops and flips cannot be seeded, so runs with it are not reproducible. `os_cache=False` reads
    through FFCV's own page cache, for files larger than memory. `batches_per_step` are accumulated to one step of the
    optimiser: an epoch is a whole number of steps, of the images that it would be of without accumulation. `records`
    are the only ones of the file that come, in their order; without `train`. Without `reshuffle` every training epoch
    has the order of the first; crops and flips still differ.
    """
    if ops not in ("fused", "stock"):
        raise ValueError(f"ops must be 'fused' or 'stock', got {ops!r}")
    device = device or torch.device("cpu")
    threads = allowed_threads(num_threads)
    if ops == "fused":
        image: list[Operation] = [FusedDecoder(transform, path=path, seed=seed, num_threads=threads)]
        label: list[Operation] = [LabelDecoder()]
    else:
        image, label = stock_operations(transform), [IntDecoder()]
    return SafeLoader(
        path,
        # Squeeze() without a dimension would turn a last batch of one image into a scalar.
        pipelines={
            "image": [*image, ToTensor(), *_to_device(device), ToTorchImage()],
            "label": [*label, ToTensor(), Squeeze(1), *_to_device(device)],
        },
        batch_size=batch_size,
        train=train,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_threads=threads,
        device=device,
        batches_ahead=batches_ahead,
        os_cache=os_cache,
        batches_per_step=batches_per_step,
        records=records,
        reshuffle=reshuffle,
    )


def _to_device(device: torch.device) -> list[Operation]:
    return [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []


def _current_device(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stock_operations(transform: Transform) -> list[Operation]:
    """FFCV's own decoder and operations for one of our transforms."""
    output = (transform.size, transform.size)
    flip = [RandomHorizontalFlip()] if getattr(transform, "flip", False) else []
    match transform:
        case RandomResizedCrop():
            return [RandomResizedCropRGBImageDecoder(output, transform.scale, transform.ratio), *flip]
        case PadCrop():
            return [SimpleRGBImageDecoder(), RandomTranslate(transform.padding), *flip]
        case CenterCrop():
            return [CenterCropRGBImageDecoder(output, transform.ratio)]
    raise ValueError(f"ops='stock' knows no operation for {type(transform).__name__}: use ops='fused'")
