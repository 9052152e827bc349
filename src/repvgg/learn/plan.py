"""What a training will need, counted before it runs: steps, memory, exchange, decoding, files, hours.

Nothing is trained, no data is read and no GPU is needed. The network takes one training step on fake tensors, which
have shapes and storages but no numbers; what it would allocate is added up. What cannot be counted (the speed of a GPU,
of a network, of decoding) is given by the caller or stays unknown: no number here is a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer

from repvgg.data.manifest import manifest_path, read_manifest
from repvgg.learn.module import recompute_blocks
from repvgg.learn.optim import batch_per_device, fused_l2, require_whole_epochs
from repvgg.model import count_macs, count_parameters, to_deploy

#: Lightning's precisions: dtype of the weights, and of autocast where there is one.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "64-true": (torch.float64, None),
}
#: Older names of them.
_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}

# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How the images of an epoch become steps.

    Attributes:
        batch_size: images per step, over all devices and accumulated batches.
        batch_per_device: images of one forward of one device.
        batches_per_epoch: forwards of one device.
        steps_per_epoch: of the optimiser.
        left_out: images of the data that an epoch does not show; others in every epoch.
        images: shown in the whole training, over all devices.
        steps: of the optimiser in the whole training.
        epochs: begun.
    """

    batch_size: int
    batch_per_device: int
    batches_per_epoch: int
    steps_per_epoch: int
    left_out: int
    images: int
    steps: int
    epochs: int


def schedule(
    samples: int,
    *,
    batch_size: int,
    devices: int,
    epochs: int | None,
    accumulate: int = 1,
    limit: int | float | None = None,
    max_steps: int = -1,
) -> Schedule:
    """Steps of a training as loader and Trainer count them.

    Args:
        samples: training images.
        batch_size: images per step of the optimiser, over all devices and accumulated batches.
        devices: over all machines.
        epochs: ``trainer.max_epochs``; None or -1 for no end but ``max_steps``.
        accumulate: batches per step.
        limit: ``trainer.limit_train_batches``: batches of one device, or a float, their share.
        max_steps: ``trainer.max_steps``; -1 for no end but ``epochs``.

    Raises:
        ValueError: devices that cannot share a batch, fewer images than a step has, a training without an end, or
            one that ends within an epoch.
    """
    share = batch_per_device(batch_size, devices, accumulate)
    # The loader leaves out what is not a whole step of all ranks: repvgg.data.order.train_order.
    batches = samples // batch_size * accumulate
    if not batches:
        raise ValueError(f"recipe.batch_size={batch_size} images per step, and the data has {samples}: lower it")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if not batches:
        raise ValueError(f"trainer.limit_train_batches={limit} leaves no batch of an epoch")
    steps_per_epoch = -(-batches // accumulate)  # Lightning steps after an epoch's last batch, too
    endless = epochs is None or epochs < 0
    if endless and max_steps < 0:
        raise ValueError(f"trainer.max_epochs={epochs} is a training without an end: give a number of epochs")
    require_whole_epochs(max_steps, steps_per_epoch)
    limits = [] if epochs is None or endless else [epochs]
    epochs = min(limits + [max_steps // steps_per_epoch] * (max_steps >= 0))
    return Schedule(
        batch_size=batch_size,
        batch_per_device=share,
        batches_per_epoch=batches,
        steps_per_epoch=steps_per_epoch,
        left_out=samples - batches * share * devices,
        images=epochs * batches * share * devices,
        steps=epochs * steps_per_epoch,
        epochs=epochs,
    )


# --- the network -----------------------------------------------------------------------------------------------------


def sizes(make_net: Callable[[], nn.Module], input_size: Sequence[int]) -> dict[str, int]:
    """Parameters and multiply-adds per image of both forms.

    Args:
        make_net: the train form.
        input_size: channels, height, width.
    """
    with torch.device("meta"):
        net = make_net()
        deploy = to_deploy(net)
    return {
        "params_train_form": count_parameters(net),
        "params_deploy": count_parameters(deploy),
        "macs_train_form": count_macs(net, input_size),
        "macs_deploy": count_macs(deploy, input_size),
    }


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: weights.
        buffers: BatchNorm's running statistics.
        gradients: of all weights, once.
        optimizer: state of the optimiser, such as momentum.
        activations: what the forward keeps for the backward, weights not counted: every storage once. Under autocast
            the casted copies of the weights are among them.
        batch: images as the network gets them.
        peak: largest sum of all tensors that are alive at once, from a step's forward to its optimiser.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    batch: int
    peak: int


#: Of network, images and labels to the loss.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def classification_loss(
    num_classes: int, *, label_smoothing: float = 0.0, soft: bool = False, custom_l2: float = 0.0
) -> Loss:
    """The loss of :meth:`repvgg.learn.module.Classifier.training_step`.

    Args:
        soft: labels are shares of the classes, as mixup makes them.
        custom_l2: weight decay of the fused kernels, 0 for none.
    """

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = net(images)
        if soft:
            targets = F.one_hot(labels, num_classes).float()
            logits = logits.to(torch.promote_types(logits.dtype, targets.dtype))
        else:
            targets = labels
        value = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        return value + 0.5 * custom_l2 * fused_l2(net) if custom_l2 else value

    return loss


def precision_dtypes(precision: str | int) -> tuple[torch.dtype, torch.dtype | None]:
    """Dtype of the weights, and of autocast or None.

    Raises:
        ValueError: a precision that is not counted here.
    """
    name = _ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision}: memory is counted for {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def step_memory(
    make_net: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    loss: Loss,
    input_size: Sequence[int],
    *,
    precision: str | int = "32-true",
    keeps_gradients: bool = False,
    recompute: bool = False,
    channels_last: bool = True,
    on_gpu: bool = True,
) -> Memory:
    """One training step on fake tensors, and what it allocates.

    A step that is not the first: state and the gradients of the step before are there. As in Lightning, these are
    let go between forward and backward.

    An eager step in torch's own allocations. What comes on top on a GPU: the context of CUDA, workspaces of cuDNN,
    and what the caching allocator rounds up and holds back. ``torch.compile`` keeps less than is counted here.
    Autocast has the CPU's list of operations; CUDA's has the same convolutions and products.

    Args:
        make_net: the train form.
        make_optimizer: of a network.
        loss: see :data:`Loss`.
        input_size: images, channels, height, width.
        precision: see :data:`PRECISIONS`.
        keeps_gradients: gradients are views of buckets that stay (DistributedDataParallel's gradient_as_bucket_view).
        recompute: blocks keep only their input, see :class:`repvgg.learn.module.Classifier`.
        channels_last: layout of the images; on a CPU, blocks then take fewer bytes (:mod:`repvgg.model.fused`).
        on_gpu: an optimiser that leaves it open updates all weights at once there, and one after another on a CPU.
    """
    weights, autocast = precision_dtypes(precision)
    with FakeTensorMode():
        with _default_dtype(weights):  # fake weights cannot be cast in place
            net = make_net().train()
        recompute_blocks(net, recompute)
        optimizer = make_optimizer(net)
        for group in optimizer.param_groups:
            if on_gpu and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # torch's default for weights on a GPU
        trained = [p for p in net.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        images = torch.empty(*input_size, dtype=weights)
        if channels_last and not on_gpu:  # on a GPU the layout changes nothing
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.empty(input_size[0], dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(net, optimizer, images, labels)
        saved = _Saved([*net.parameters(), *net.buffers(), images, labels])
        with tracker:
            before = _alive(tracker)
            with nullcontext() if recompute else saved, _autocast(autocast):
                value = loss(net, images, labels)
            # A block that recomputes keeps its input by other means than those that can be listened to.
            activations = _alive(tracker) - before if recompute else saved.bytes
            optimizer.zero_grad(set_to_none=not keeps_gradients)
            value.backward()
            optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()  # of one device
        state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        return Memory(
            parameters=_bytes(net.parameters()),
            buffers=_bytes(net.buffers()),
            gradients=_bytes(trained),
            optimizer=_bytes(state),
            activations=activations,
            batch=_bytes([images]),
            peak=peak["Total"],
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _alive(tracker: MemTracker) -> int:
    return sum(of_device["Total"] for of_device in tracker.get_tracker_snapshot("current").values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Saved(saved_tensors_hooks):
    """Adds up the storages that the backward will need, but for those that are there anyway."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.bytes = 0
        self._seen = {self._key(tensor) for tensor in known}
        super().__init__(self._pack, lambda tensor: tensor)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._key(tensor) not in self._seen:
            self._seen.add(self._key(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


# --- many devices ----------------------------------------------------------------------------------------------------


def ring_all_reduce_s(size: int, devices: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce: ``2 (n − 1) / n · size / bandwidth`` (Patarasuk and Yuan 2009), latency left out.

    Args:
        size: bytes on each device.
        devices: n.
        bandwidth: bytes per second that a device sends, and at once receives (NCCL's "bus bandwidth").
    """
    return 2 * (devices - 1) / devices * size / bandwidth


@dataclass(frozen=True)
class Rates:
    """What can only be measured; None where nobody has. All positive.

    Attributes:
        images_per_s_per_gpu: of training on one device alone.
        bandwidth_gb_s: of :func:`ring_all_reduce_s`, in 1e9 bytes per second.
        decode_images_per_core_s: of the loader.

    Raises:
        ValueError: a rate that is not positive.
    """

    images_per_s_per_gpu: float | None = None
    bandwidth_gb_s: float | None = None
    decode_images_per_core_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"plan.{name}={value} must be positive, or null where it was not measured")


@dataclass(frozen=True)
class Scale:
    """A training on one number of devices; None is what nobody has measured the rate for.

    Attributes:
        devices: over all nodes.
        nodes: machines, each with as many devices.
        batch_size: images per step over all devices.
        lr: after linear scaling.
        schedule: steps and images.
        all_reduce_s: of the gradients, once per step, with nothing else going on.
        all_reduce_share: of a step, if none of it is hidden behind the backward.
        loader_images_per_s_per_node: what keeps the devices of a node busy.
        cores_per_node: that decode that much.
        hours: of training steps, with the all-reduce hidden behind the backward entirely. Validations,
            checkpoints and waiting for data come on top.
        hours_all_reduce_exposed: the same with none of it hidden.
    """

    devices: int
    nodes: int
    batch_size: int
    lr: float
    schedule: Schedule
    all_reduce_s: float | None
    all_reduce_share: float | None
    loader_images_per_s_per_node: float | None
    cores_per_node: float | None
    hours: float | None
    hours_all_reduce_exposed: float | None


def scale(steps: Schedule, *, devices: int, nodes: int, lr: float, gradients: int, rates: Rates) -> Scale:
    """What a number of devices asks of network, cores and patience.

    Args:
        steps: for these devices.
        gradients: bytes on each device.
    """
    speed, bandwidth, decoding = rates.images_per_s_per_gpu, rates.bandwidth_gb_s, rates.decode_images_per_core_s
    reduce_s = 0.0 if devices == 1 else bandwidth and ring_all_reduce_s(gradients, devices, bandwidth * 1e9)
    wanted = speed and speed * devices / nodes
    seconds = speed and steps.images / (speed * devices)
    exposed = None if seconds is None or reduce_s is None else steps.steps * reduce_s
    return Scale(
        devices=devices,
        nodes=nodes,
        batch_size=steps.batch_size,
        lr=lr,
        schedule=steps,
        all_reduce_s=reduce_s,
        all_reduce_share=None if exposed is None or seconds is None else exposed / max(seconds + exposed, 1e-12),
        loader_images_per_s_per_node=wanted,
        cores_per_node=wanted and decoding and wanted / decoding,
        hours=seconds and seconds / 3600,
        hours_all_reduce_exposed=None if exposed is None or seconds is None else (seconds + exposed) / 3600,
    )


def nodes_for(devices: int, per_node: int) -> int:
    """How many machines that is.

    Raises:
        ValueError: machines that would not have equally many.
    """
    if devices < 1 or (devices > per_node and devices % per_node):
        raise ValueError(
            f"plan.devices has {devices}, and a node has trainer.devices={per_node}: give at most {per_node}, or a "
            f"multiple of it such as {max(1, round(devices / per_node)) * per_node}"
        )
    return max(1, devices // per_node)


# --- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The training or the validation images.

    Attributes:
        images: None where nobody knows.
        bytes: of the ``.beton`` file; None where nobody knows.
        images_source, bytes_source: who says so.
        short_side: bound of the stored images in pixels, by the file's manifest.
    """

    images: int | None
    bytes: int | None
    images_source: str
    bytes_source: str
    short_side: int | None = None


def split_of(
    file: str | Path, *, images: int | None, kb: float | None, published: int | None, usual_kb: float | None
) -> Split:
    """What was said of a split, else what its file's manifest says, else what is published.

    Args:
        file: ``.beton``; need not be there.
        images, kb: as said; bytes per image in units of 1000.
        published: images.
        usual_kb: per image, where such images were measured.
    """
    manifest = read_manifest(file) if manifest_path(file).is_file() else None
    counts = {"as given": images, "its manifest": manifest.samples if manifest else None, "published": published}
    written = manifest.bytes / manifest.samples / 1000 if manifest else None
    sizes_kb = {"as given": kb, "its manifest": written, "about, by images of that kind": usual_kb}
    count_source = next((source for source, value in counts.items() if value), "not known")
    size_source = next((source for source, value in sizes_kb.items() if value), "not known")
    count, size = counts.get(count_source), sizes_kb.get(size_source)
    return Split(
        images=count,
        bytes=round(count * size * 1000) if count and size else None,
        images_source=count_source,
        bytes_source=size_source,
        short_side=manifest.options.get("short_side") if manifest else None,
    )


def cache_bytes(train: Split, val: Split, *, os_cache: bool, processes: int) -> int | None:
    """Memory of a node that holds both files from the first epoch on.

    With ``os_cache`` the kernel has them once for all processes. Without, every process has a cache of its own, which
    comes to hold nearly the whole file in random order.
    """
    if train.bytes is None or val.bytes is None:
        return None
    return (train.bytes + val.bytes) * (1 if os_cache else processes)


@dataclass(frozen=True)
class Plan:
    """All that is known of a training beforehand.

    Attributes:
        name: as the run's.
        recipe, precision: as chosen.
        train_px: side of the training images; the largest, where they grow.
        network: see :func:`sizes`.
        count_px: side of the images of ``network``'s multiply-adds.
        memory_bytes: of one device, without the three below.
        averaged_bytes: weights and buffers of an EMA, else 0.
        bucket_bytes: DistributedDataParallel's copies of all gradients, unless the gradients are views of them.
        ring_bytes: uint8 batches that the loader holds ready on the device.
        peak_bytes: all of it at a step's peak.
        images_per_s_per_gpu: as given.
        scales: the command's number of devices, then those to compare.
        train, val: the images.
        cache_bytes_per_node: see :func:`cache_bytes`.
        decoding_source: of the rate of decoding.
        notes: what the numbers leave out.
    """

    name: str
    recipe: str
    precision: str
    train_px: int
    network: dict[str, int]
    count_px: int
    memory_bytes: Memory
    averaged_bytes: int
    bucket_bytes: int
    ring_bytes: int
    peak_bytes: int
    images_per_s_per_gpu: float | None
    scales: list[Scale]
    train: Split
    val: Split
    cache_bytes_per_node: int | None
    decoding_source: str
    notes: list[str]
