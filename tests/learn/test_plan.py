"""What is planned is what happens: steps of a real Trainer and loader, memory of a real step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from repvgg.cli import ROOT, options
from repvgg.data.loader import make_loader
from repvgg.data.manifest import read_manifest
from repvgg.data.order import train_order
from repvgg.data.transforms import PadCrop
from repvgg.learn import plan
from repvgg.learn.module import Classifier
from repvgg.learn.optim import parameter_groups
from repvgg.learn.plan import (
    Memory,
    Rates,
    Schedule,
    cache_bytes,
    classification_loss,
    nodes_for,
    precision_dtypes,
    ring_all_reduce_s,
    scale,
    schedule,
    sizes,
    split_of,
    step_memory,
)
from repvgg.learn.plan_text import table
from repvgg.model import RepVGG, count_macs, count_parameters, to_deploy
from support.networks import ABLATIONS, tiny
from support.paper import VARIANTS
from support.training import classifier, datamodule, trainer

# --- steps -----------------------------------------------------------------------------------------------------------


@given(
    samples=st.integers(1, 3000),
    per_device=st.integers(1, 9),
    devices=st.integers(1, 8),
    accumulate=st.integers(1, 4),
    epochs=st.integers(1, 5),
)
def test_an_epoch_is_what_the_orders_of_all_ranks_hold(
    samples: int, per_device: int, devices: int, accumulate: int, epochs: int
) -> None:
    step = per_device * devices * accumulate

    def planned() -> Schedule:
        return schedule(samples, batch_size=step, devices=devices, epochs=epochs, accumulate=accumulate)

    if samples < step:
        with pytest.raises(ValueError, match=f"batch_size={step}.*{samples}"):
            planned()
        return
    plan = planned()
    orders = [
        train_order(samples, batch_size=per_device * accumulate, seed=0, epoch=0, rank=rank, world_size=devices)
        for rank in range(devices)
    ]
    assert plan.batch_per_device == per_device
    assert {len(order) for order in orders} == {plan.batches_per_epoch * per_device}
    assert plan.steps_per_epoch * accumulate == plan.batches_per_epoch
    assert plan.left_out == samples - len({int(i) for order in orders for i in order}) < step
    assert (plan.steps, plan.epochs) == (plan.steps_per_epoch * epochs, epochs)
    assert plan.images == epochs * (samples - plan.left_out)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (3, 1), (2, 4)])
def test_a_real_loader_has_as_many_batches(digits: Path, world_size: int, accumulate: int) -> None:
    samples = read_manifest(digits / "train.beton").samples
    plan = schedule(samples, batch_size=24 * world_size, devices=world_size, accumulate=accumulate, epochs=1)
    loader = make_loader(
        digits / "train.beton",
        transform=PadCrop(32, 4),
        batch_size=plan.batch_per_device,
        train=True,
        rank=world_size - 1,
        world_size=world_size,
        batches_per_step=accumulate,
    )
    assert len(loader) == plan.batches_per_epoch


@pytest.mark.parametrize(
    ("given_options", "epochs"),
    [
        ({"limit_train_batches": None}, 2),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, 2),  # the third step of an epoch has one batch
        ({"limit_train_batches": 0.3, "accumulate_grad_batches": 4}, 1),
        ({"limit_train_batches": 6, "max_steps": 12}, 4),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_real_trainer_takes_as_many_steps(
    digits: Path, tmp_path: Path, given_options: dict[str, float], epochs: int
) -> None:
    accumulate = int(given_options.get("accumulate_grad_batches", 1))
    plan = schedule(
        read_manifest(digits / "train.beton").samples,
        batch_size=64 * accumulate,
        devices=1,
        epochs=epochs,
        accumulate=accumulate,
        limit=given_options["limit_train_batches"],
        max_steps=int(given_options.get("max_steps", -1)),
    )
    seen: list[int] = []

    class Counting(Classifier):
        def on_train_batch_end(self, outputs: object, batch: tuple[torch.Tensor, ...], batch_idx: int) -> None:
            seen.append(len(batch[0]))

    module = classifier(tiny(num_classes=10, strides=(2, 2, 2, 2, 2)))
    module.__class__ = Counting
    fit = trainer(tmp_path, [], max_epochs=epochs, limit_val_batches=0, **given_options)
    fit.fit(module, datamodule=datamodule(digits, batch_size=plan.batch_per_device))
    assert fit.global_step == fit.estimated_stepping_batches == plan.steps
    assert sum(seen) == plan.images


@pytest.mark.parametrize(
    ("options_of", "says"),
    [
        ({"devices": 3}, "recipe.batch_size=256.*3 devices"),
        ({"epochs": -1}, "max_epochs=-1"),
        ({"epochs": None}, "max_epochs=None"),
        ({"limit": 0.0001}, "limit_train_batches=0.0001"),
        ({"max_steps": 4}, "max_steps=4 ends within an epoch of 3 steps"),
    ],
)
def test_what_cannot_be_planned_is_named(options_of: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schedule(1000, **{"batch_size": 256, "devices": 1, "epochs": 1, **options_of})  # type: ignore[arg-type]


def test_steps_alone_may_end_a_training() -> None:
    plan = schedule(1000, batch_size=100, devices=1, epochs=-1, max_steps=30)
    assert (plan.steps, plan.epochs, plan.images) == (30, 3, 3000)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a0", "b3g4"])
def test_sizes_are_the_published_ones(name: str) -> None:
    paper = VARIANTS[name]
    found = sizes(lambda: RepVGG(paper.depths, paper.a, paper.b, ABLATIONS["full"], groups=paper.groups), (3, 224, 224))
    assert (found["params_train_form"], found["params_deploy"]) == (paper.train_params, paper.deploy_params)
    assert found["macs_train_form"] / 1e9 == pytest.approx(paper.train_gmacs, abs=6e-4)
    assert found["macs_deploy"] / 1e9 == pytest.approx(paper.deploy_gmacs, abs=6e-4)


# --- memory ----------------------------------------------------------------------------------------------------------


def network() -> RepVGG:
    return RepVGG((2, 2, 2, 1), 0.5, 1, ABLATIONS["full"], num_classes=10)


def sgd(net: nn.Module) -> Optimizer:
    return SGD(parameter_groups(net, 1e-4), lr=0.1, momentum=0.9)


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes allocated, or negative freed, on the CPU, in order: of torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    del kept
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def real_peak(
    size: tuple[int, int, int, int],
    autocast: torch.dtype | None = None,
    make: Callable[[], nn.Module] = network,
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    keeps_gradients: bool = False,
) -> int:
    """Of three real steps in channels_last, with all that is there from the network's making on."""

    def train() -> None:
        net = make().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer, loss = sgd(net), classification_loss(10)
        net = wrap(net)
        images = torch.rand(size).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(size[0], dtype=torch.int64)
        for _ in range(3):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                value = loss(net, images, labels)
            optimizer.zero_grad(set_to_none=not keeps_gradients)
            value.backward()
            optimizer.step()

    total = peak = 0
    for change in allocations(train):
        total += change
        peak = max(peak, total)
    return peak


SIZES = [(32, 3, 64, 64), (64, 3, 96, 96)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_tensors_without_numbers_are_those_of_a_real_step(
    size: tuple[int, int, int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, whatever the processor: what operators give each other does not depend on it."""

    def loss(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return classification_loss(10)(net, images.zero_(), labels.zero_())  # real ones hold anything

    planned = step_memory(network, sgd, loss, size, precision=precision, on_gpu=False)
    monkeypatch.setattr(plan, "FakeTensorMode", nullcontext)
    assert step_memory(network, sgd, loss, size, precision=precision, on_gpu=False) == planned


def most_of_a_kernel(size: tuple[int, int, int, int]) -> int:
    """Bytes that one convolution may hold for itself: its input unfolded (im2col), k² times as large, in float32."""
    found = []
    net = network().eval()
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_hook(
            lambda conv, _, y: found.append(4 * conv.weight[0].numel() * y.numel() // y.shape[1])
        )
    with torch.no_grad():
        net(torch.zeros(size))
    return max(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("precision", "autocast"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
@pytest.mark.usefixtures("one_thread")
def test_the_peak_is_that_of_a_real_step(
    size: tuple[int, int, int, int], precision: str, autocast: torch.dtype | None
) -> None:
    """Every byte of torch's allocator: the tensors, and on top what the kernels of a processor hold while they run.

    With vector units for the precision that is a kernel's gradient or two in another layout; without, columns.
    """
    planned = step_memory(network, sgd, classification_loss(10), size, precision=precision, on_gpu=False).peak
    assert planned <= real_peak(size, autocast) <= planned + most_of_a_kernel(size)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.usefixtures("one_thread", "one_rank")
def test_the_buckets_of_ddp_are_copies_of_the_gradients_or_the_gradients(views: bool) -> None:
    """Beside the same step without DDP on this processor, whose kernels hold the same.

    But for copies of one kernel's gradient, made by the backward itself; all gradients are seven times as large.
    """

    def make() -> RepVGG:
        return RepVGG((2, 2, 6, 1), 0.5, 0.25, ABLATIONS["full"], num_classes=10)

    size, largest = (32, 3, 64, 64), 4 * max(p.numel() for p in make().parameters())
    planned = step_memory(make, sgd, classification_loss(10), size, keeps_gradients=views, on_gpu=False)
    assert planned.gradients > 7 * largest
    alone = real_peak(size, make=make, keeps_gradients=views)
    assert alone >= planned.peak
    # The smaller of two: gloo's thread may let go of a bucket late.
    wrapped = min(
        real_peak(size, make=make, wrap=lambda net: DistributedDataParallel(net, gradient_as_bucket_view=views))
        for _ in range(2)
    )
    assert wrapped - alone == pytest.approx(0 if views else planned.gradients, abs=2.5 * largest)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.usefixtures("one_thread")
def test_what_is_kept_is_what_a_real_forward_leaves(ablation: str) -> None:
    """Within 1 %: beside what is saved there are the loss and nothing else."""

    def make() -> RepVGG:
        return RepVGG((2, 2, 2, 1), 0.5, 1, ABLATIONS[ablation], num_classes=10)

    net, size = make().to(memory_format=torch.channels_last).train(), (16, 3, 64, 64)  # type: ignore[call-overload]
    images = torch.rand(size).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size[0], dtype=torch.int64)
    kept = sum(allocations(lambda: classification_loss(10)(net, images, labels)))
    planned = step_memory(make, sgd, classification_loss(10), size)
    assert kept == pytest.approx(planned.activations, rel=0.01)


def small() -> RepVGG:
    return RepVGG((1, 1, 2, 1), 0.5, 1, ABLATIONS["full"], num_classes=10)


def measured(
    make: Callable[[], nn.Module] = small,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    batch: int = 8,
    **options_of: object,
) -> Memory:
    return step_memory(make, optimizer, classification_loss(10), (batch, 3, 64, 64), **options_of)  # type: ignore[arg-type]


def test_what_is_there_anyway_is_counted_exactly() -> None:
    memory, parameters = measured(), count_parameters(small())
    assert memory.parameters == memory.gradients == memory.optimizer == 4 * parameters
    assert memory.buffers == sum(b.numel() * b.element_size() for b in small().buffers())
    assert memory.batch == 4 * 8 * 3 * 64 * 64
    assert measured(optimizer=lambda net: SGD(net.parameters(), lr=0.1)).optimizer == 0
    two_states = measured(optimizer=lambda net: AdamW(net.parameters())).optimizer
    steps = 4 * len(list(small().parameters()))
    assert two_states == 8 * parameters + steps


def test_half_precision_halves_what_it_should() -> None:
    full, mixed, half, double = (measured(precision=p) for p in ("32-true", "16-mixed", "bf16-true", "64-true"))
    assert mixed.parameters == full.parameters == 2 * half.parameters
    assert double.parameters == 2 * full.parameters
    assert mixed.gradients == full.gradients == 2 * half.gradients
    assert half.peak < mixed.peak < full.peak < double.peak
    # Autocast keeps the network's maps in half precision, and casted copies of kernels and images.
    copies = (full.parameters + full.batch) // 2
    assert full.activations // 2 + copies // 2 < mixed.activations < full.activations // 2 + 1.05 * copies


def test_maps_grow_with_the_batch_and_nothing_else_does() -> None:
    one, two, four = (measured(batch=batch) for batch in (8, 16, 32))
    assert four.activations - two.activations == 2 * (two.activations - one.activations)
    for name in ("parameters", "buffers", "gradients", "optimizer"):
        assert getattr(one, name) == getattr(four, name)


def test_gradients_that_stay_are_there_at_the_peak_too() -> None:
    """With many images the peak is before the backward, where the gradients of the step before still are."""
    one = partial(measured, batch=1)
    assert one(keeps_gradients=True).peak >= one().peak
    many = partial(measured, batch=64)
    assert many(keeps_gradients=True).peak >= many().peak


def test_updating_all_weights_at_once_takes_more_than_one_by_one() -> None:
    """A batch so small that the peak is the optimiser's: weight decay makes a copy of the gradients of all kernels."""
    together, one_by_one = measured(batch=1, on_gpu=True), measured(batch=1, on_gpu=False)
    assert one_by_one.peak < together.peak <= one_by_one.peak + one_by_one.gradients


@pytest.mark.parametrize("ablation", options("ablation"))
def test_every_block_design_is_counted(ablation: str) -> None:
    overrides = [f"ablation={ablation}", "data.num_classes=10", "net.width_a=0.25", "net.width_b=0.25"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("plan", [*overrides, "net.depths=[1,1,2,1]"])
    memory = measured(lambda: instantiate(config.net), batch=2)
    net = instantiate(config.net)
    assert memory.parameters == 4 * count_parameters(net)
    assert memory.peak > memory.parameters + memory.gradients + memory.optimizer + memory.activations
    found = sizes(lambda: instantiate(config.net), (3, 64, 64))
    assert found["macs_deploy"] == count_macs(to_deploy(net), (3, 64, 64))


def test_soft_labels_and_the_decay_of_fused_kernels_are_counted() -> None:
    shape = (8, 3, 64, 64)
    plain = step_memory(small, sgd, classification_loss(10), shape)
    soft = step_memory(small, sgd, classification_loss(10, label_smoothing=0.1, soft=True), shape)
    fused = step_memory(small, sgd, classification_loss(10, custom_l2=1e-4), shape)
    assert plain.activations < soft.activations < plain.activations + 10_000
    assert plain.activations < fused.activations


def test_precisions_are_lightnings() -> None:
    with pytest.raises(ValueError, match=r"precision=8.*32-true, 16-mixed"):
        precision_dtypes(8)
    assert precision_dtypes("bf16") == precision_dtypes("bf16-mixed")


# --- many devices ----------------------------------------------------------------------------------------------------


def bytes_sent_in_a_ring(devices: int, size: int) -> int:
    """By one device, chunk by chunk, until all have the sum of all: played through."""
    chunk = size // devices
    has = [[{(rank, part)} for part in range(devices)] for rank in range(devices)]
    sent = 0
    for turn in range(2 * (devices - 1)):
        moving = [(rank, (rank - turn) % devices) for rank in range(devices)]
        carried = [set(has[rank][part]) for rank, part in moving]
        for (rank, part), load in zip(moving, carried, strict=True):
            has[(rank + 1) % devices][part] |= load
        sent += chunk
    assert all(len(parts) == devices for rank in has for parts in rank)
    return sent


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_the_ring_sends_what_the_formula_says(devices: int) -> None:
    size = 24 * 1000
    assert ring_all_reduce_s(size, devices, 1e6) == pytest.approx(bytes_sent_in_a_ring(devices, size) / 1e6)


def test_hours_cores_and_shares() -> None:
    steps = schedule(128_000, batch_size=256, devices=8, epochs=72)  # 500 steps an epoch
    one = scale(
        steps,
        devices=8,
        nodes=2,
        lr=0.1,
        gradients=10**9,
        rates=Rates(100, bandwidth_gb_s=10, decode_images_per_core_s=50),
    )
    assert one.loader_images_per_s_per_node == 400
    assert one.cores_per_node == 8
    assert one.hours == pytest.approx(72 * 128_000 / 800 / 3600)  # 0.32 s a step
    assert one.all_reduce_s == pytest.approx(0.175)
    assert one.all_reduce_share == pytest.approx(0.175 / (0.175 + 0.32))
    assert one.hours_all_reduce_exposed == pytest.approx(one.hours + 36_000 * 0.175 / 3600)


def test_what_nobody_measured_stays_unknown() -> None:
    steps = schedule(1000, batch_size=8, devices=8, epochs=1)
    nothing = scale(steps, devices=8, nodes=1, lr=0.1, gradients=100, rates=Rates())
    for name in ("all_reduce_s", "all_reduce_share", "loader_images_per_s_per_node", "cores_per_node", "hours"):
        assert getattr(nothing, name) is None
    alone = scale(
        schedule(1000, batch_size=8, devices=1, epochs=1), devices=1, nodes=1, lr=1, gradients=1, rates=Rates(5)
    )
    assert alone.all_reduce_s == 0
    assert alone.hours == alone.hours_all_reduce_exposed == pytest.approx(200 / 3600)
    assert alone.cores_per_node is None
    with pytest.raises(ValueError, match=r"plan\.bandwidth_gb_s=0 must be positive"):
        Rates(bandwidth_gb_s=0)


def test_nodes_have_equally_many_devices() -> None:
    assert [nodes_for(n, 8) for n in (1, 4, 8, 16, 1024)] == [1, 1, 1, 2, 128]
    for devices in (12, 0, 1023):
        with pytest.raises(ValueError, match=f"plan.devices has {devices}, and a node has trainer.devices=8"):
            nodes_for(devices, 8)


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_that_are_here_say_themselves_what_they_hold(digits: Path) -> None:
    file = digits / "train.beton"
    split = split_of(file, images=None, kb=None, published=5, usual_kb=7)
    assert (split.images, split.bytes) == (1437, file.stat().st_size)
    assert {split.images_source, split.bytes_source} == {"its manifest"}
    more = split_of(file, images=2 * 1437, kb=None, published=5, usual_kb=7)
    assert more.bytes == pytest.approx(2 * file.stat().st_size, abs=1)


def test_files_that_are_not_here_are_as_published_or_as_said(tmp_path: Path) -> None:
    file = tmp_path / "train.beton"
    published = split_of(file, images=None, kb=None, published=1000, usual_kb=110.5)
    assert (published.images, published.bytes, published.images_source) == (1000, 110_500_000, "published")
    assert split_of(file, images=10, kb=2, published=1000, usual_kb=110.5).bytes == 20_000
    unknown = split_of(file, images=None, kb=None, published=None, usual_kb=None)
    assert (unknown.images, unknown.bytes) == (None, None)
    assert cache_bytes(published, unknown, os_cache=True, processes=8) is None
    assert cache_bytes(published, published, os_cache=True, processes=8) == 221_000_000
    assert cache_bytes(published, published, os_cache=False, processes=8) == 8 * 221_000_000


def test_a_table_is_as_wide_as_it_must_be() -> None:
    assert table(["a", "long name"], [["longer", "1"], ["b", "1,000"]]) == [
        "a       long name",
        "longer          1",
        "b           1,000",
    ]
