"""Plans as aligned text. Units stand in the names; a dash is what nobody has measured."""

from __future__ import annotations

from collections.abc import Sequence

from repvgg.learn.plan import Plan, Scale

NOT_GIVEN = "–"


def page(plan: Plan) -> str:
    """All of one training."""
    first, memory, network = plan.scales[0], plan.memory_bytes, plan.network
    steps = first.schedule
    per_node = first.devices // first.nodes
    images = f"{steps.batch_per_device} images of {plan.train_px} px, {plan.precision}"
    where = f"{first.nodes} × {per_node} devices" if first.nodes > 1 else f"{first.devices} device(s)"
    lines = [
        f"{plan.name}, {plan.recipe}: {where} × {images}",
        "",
        "Steps",
        *_aligned(
            [
                ("training images", number(plan.train.images), plan.train.images_source),
                ("images left out of an epoch", number(steps.left_out), "others in every epoch"),
                ("images per step", number(first.batch_size), f"lr {first.lr:g}"),
                ("steps per epoch", number(steps.steps_per_epoch), ""),
                ("epochs", number(steps.epochs), ""),
                ("steps", number(steps.steps), ""),
            ]
        ),
        "",
        "Network",
        *_aligned(
            [
                ("parameters [M], train form", number(network["params_train_form"] / 1e6, 2), "counted"),
                ("parameters [M], deployed", number(network["params_deploy"] / 1e6, 2), ""),
                (
                    "multiply-adds per image [G], train form",
                    number(network["macs_train_form"] / 1e9, 2),
                    f"counted at {plan.count_px} px",
                ),
                ("multiply-adds per image [G], deployed", number(network["macs_deploy"] / 1e9, 2), ""),
            ]
        ),
        "",
        "Memory of one device [MiB]",
        *_aligned(
            [
                ("parameters", mib(memory.parameters), "counted, as all of these"),
                ("buffers", mib(memory.buffers), "running statistics"),
                ("gradients", mib(memory.gradients), ""),
                ("optimiser", mib(memory.optimizer), ""),
                ("kept for the backward", mib(memory.activations), "every storage once"),
                ("batch as the network gets it", mib(memory.batch), ""),
                ("batches held ready, uint8", mib(plan.ring_bytes), "the loader's ring"),
                ("averaged weights", mib(plan.averaged_bytes), "callbacks.ema"),
                ("buckets of gradients", mib(plan.bucket_bytes), "DDP"),
                ("peak", mib(plan.peak_bytes), "all that is alive at once, transients too"),
            ]
        ),
        "",
        "Loader and files",
        *_aligned(
            [
                ("images/s that a node must load", number(first.loader_images_per_s_per_node), ""),
                ("cores of a node that decode them", number(first.cores_per_node, 1), plan.decoding_source),
                ("training file [GB]", gb(plan.train.bytes), plan.train.bytes_source),
                ("validation file [GB]", gb(plan.val.bytes), plan.val.bytes_source),
                ("memory of a node to cache both [GB]", gb(plan.cache_bytes_per_node), ""),
            ]
        ),
        "",
        "Exchange and time",
        *_aligned(
            [
                ("gradients per step and device [MB]", number(memory.gradients / 1e6, 1), ""),
                ("all-reduce per step [ms]", milliseconds(first.all_reduce_s), "ring: 2 (n-1)/n × bytes / bandwidth"),
                ("share of a step, none of it hidden [%]", percent(first.all_reduce_share), ""),
                ("hours, all of it hidden", number(first.hours, 2), "steps alone: no validation, no checkpoint"),
                ("hours, none of it hidden", number(first.hours_all_reduce_exposed, 2), ""),
            ]
        ),
    ]
    if plan.scales[1:]:
        lines += ["", "Numbers of devices", *scaling_table(plan.scales[1:], memory.gradients)]
    return "\n".join([*lines, *_remarks([plan])])


def comparison(plans: Sequence[Plan]) -> str:
    """A line for each training, and the sum of hours where all are known."""
    header = (
        *("run", "recipe", "devices", "steps", "params [M]", "deployed [M]", "GMACs", "deployed GMACs"),
        *("kept [MiB]", "peak [MiB]", "gradients [MB]", "all-reduce [ms]", "images/s per node", "cores per node"),
        "hours",
    )
    rows = []
    for plan in plans:
        one = plan.scales[0]
        rows.append(
            (
                *(plan.name, plan.recipe, number(one.devices), number(one.schedule.steps)),
                *(number(plan.network[f"params_{form}"] / 1e6, 2) for form in ("train_form", "deploy")),
                *(number(plan.network[f"macs_{form}"] / 1e9, 2) for form in ("train_form", "deploy")),
                *(mib(plan.memory_bytes.activations), mib(plan.peak_bytes)),
                *(number(plan.memory_bytes.gradients / 1e6, 1), milliseconds(one.all_reduce_s)),
                *(number(one.loader_images_per_s_per_node), number(one.cores_per_node, 1), number(one.hours, 2)),
            )
        )
    hours = [plan.scales[0].hours for plan in plans]
    known = [value for value in hours if value is not None]
    total = [f"All {len(plans)} one after another: {sum(known):,.2f} hours"] if len(known) == len(hours) else []
    if total and len({plan.images_per_s_per_gpu for plan in plans}) == 1:
        total.append(f"Hours are of {plans[0].images_per_s_per_gpu:g} images/s per GPU for every run.")
    return "\n".join([*table(header, rows), *total, *_remarks(plans)])


def scaling_table(scales: Sequence[Scale], gradients: int) -> list[str]:
    """A line for each number of devices."""
    header = (
        *("devices", "nodes", "images/step", "per device", "lr", "steps/epoch", "left out", "gradients [MB]"),
        *("all-reduce [ms]", "share [%]", "images/s per node", "cores per node", "hours", "hours, not hidden"),
    )
    rows = [
        (
            *(number(one.devices), number(one.nodes), number(one.batch_size)),
            *(number(one.schedule.batch_per_device), f"{one.lr:g}", number(one.schedule.steps_per_epoch)),
            *(number(one.schedule.left_out), number(gradients / 1e6, 1), milliseconds(one.all_reduce_s)),
            *(percent(one.all_reduce_share), number(one.loader_images_per_s_per_node), number(one.cores_per_node, 1)),
            *(number(one.hours, 2), number(one.hours_all_reduce_exposed, 2)),
        )
        for one in scales
    ]
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(len(first)), *others])

    return [line(row) for row in [header, *rows]]


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    name, value = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {what.ljust(name)}  {given.rjust(value)}  {note}".rstrip() for what, given, note in rows]


def _remarks(plans: Sequence[Plan]) -> list[str]:
    """What is missing and how to give it, and what the numbers leave out."""
    scales = [scale for plan in plans for scale in plan.scales]
    missing = []
    if any(scale.hours is None for scale in scales):
        missing.append(
            "hours, images/s and cores: pass plan.images_per_s_per_gpu=N, the perf/images_per_s of a short run on one "
            "GPU (trainer.max_epochs=1 trainer.limit_train_batches=200)"
        )
    elif any(scale.cores_per_node is None for scale in scales):
        missing.append("cores: pass plan.decode_images_per_core_s=N, of python src/benchmark.py loader")
    if any(scale.all_reduce_s is None for scale in scales):
        missing.append("all-reduce: pass plan.bandwidth_gb_s=N, the busbw of nccl-tests' all_reduce_perf")
    if any(plan.cache_bytes_per_node is None for plan in plans):
        missing.append("bytes of files: pass plan.train_kb_per_image=N plan.val_kb_per_image=N")
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    space = [""] if missing or notes else []
    return [*space, *(f"not given: {what}" for what in missing), *notes]


def number(value: float | None, digits: int = 0) -> str:
    """With separators between thousands."""
    return NOT_GIVEN if value is None else f"{value:,.{digits}f}"


def mib(size: int) -> str:
    """Bytes in units of 2**20, as GPU tools show memory."""
    return number(size / 2**20, 1)


def gb(size: int | None) -> str:
    """Bytes in units of 1e9, as disks are sold."""
    return NOT_GIVEN if size is None else number(size / 1e9, 2)


def milliseconds(seconds: float | None) -> str:
    """Of seconds."""
    return NOT_GIVEN if seconds is None else number(seconds * 1e3, 2)


def percent(share: float | None) -> str:
    """Of a fraction of 1."""
    return NOT_GIVEN if share is None else number(100 * share, 1)
