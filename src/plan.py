"""What a training will need, before it runs: `python src/plan.py --help` says how. Takes the overrides of train.py."""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from repvgg.cli import clear_errors, interruptible, no_collections, prepare_environment, quote_paths
from repvgg.command import answering, require_keywords
from repvgg.data.manifest import manifest_path, number_of_classes
from repvgg.files import replacing
from repvgg.identity import subject

if TYPE_CHECKING:
    from repvgg.learn.plan import Plan, Schedule, Split

#: Overrides of where runs are run and who runs them: a plan runs none.
OF_RUNNING = ("hydra/launcher", "hydra.launcher", "hydra.run", "hydra.sweep.", "hydra.job.")
SWEEPING = {"-m", "--multirun"}
#: What main leaves: Hydra's main returns nothing.
PLANS: "list[Plan]" = []
OUT: list[str | None] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Count; of a sweep, once for every run."""
    with clear_errors():
        check(cfg)
        PLANS.append(plan(cfg))
        OUT.append(cfg.out)


def check(cfg: DictConfig) -> None:
    """Raise ValueError for a file that cannot be written."""
    if cfg.out is not None and not Path(cfg.out).absolute().parent.is_dir():
        raise ValueError(f"out={cfg.out}: there is no directory {Path(cfg.out).absolute().parent}")


def plan(cfg: DictConfig) -> "Plan":
    """Count what a config of train.py needs."""
    given, trainer, recipe, data = cfg.plan, cfg.trainer, cfg.recipe, cfg.data
    per_node, views = devices_of_node(trainer.devices), has_bucket_views(trainer.strategy)
    set_classes(data)

    # Heavy imports from here on.
    with no_collections():
        from hydra.utils import instantiate

        from repvgg.learn import plan as count
        from repvgg.learn.optim import parameter_groups, require_optimizer, scaled_lr

    require_keywords(cfg)
    require_optimizer(instantiate(recipe.optimizer), recipe.lr)
    count.precision_dtypes(trainer.precision)
    train, val = (split(cfg, name) for name in ("train", "val"))
    if train.images is None:
        raise ValueError(f"{data.train_file} is not there: say how many images it is to have, plan.train_images=N")
    decoding, decoding_source = decoding_rate(cfg, train)
    speed = given.images_per_s_per_gpu
    if isinstance(speed, DictConfig):
        speed = speed.get(str(HydraConfig.get().runtime.choices["model"]))
    rates = count.Rates(speed, given.bandwidth_gb_s, decoding)

    def steps_on(devices: int) -> "Schedule":
        accumulate, per_device = trainer.accumulate_grad_batches, given.batch_per_device
        assert train.images is not None
        return count.schedule(
            train.images,
            batch_size=recipe.batch_size if per_device is None else per_device * devices * accumulate,
            devices=devices,
            epochs=trainer.max_epochs,
            accumulate=accumulate,
            limit=trainer.limit_train_batches,
            max_steps=trainer.get("max_steps", -1),
        )

    nodes = {per_node * trainer.num_nodes: trainer.num_nodes}
    numbers = [*nodes, *(given.devices or [])]
    nodes |= {devices: count.nodes_for(devices, per_node) for devices in numbers[1:]}
    try:
        schedules = [steps_on(devices) for devices in numbers]
    except ValueError as error:
        more = "; plan.batch_per_device=N gives every device N" if given.devices and not given.batch_per_device else ""
        raise ValueError(f"{error}{more}") from error
    lrs = [scaled_lr(recipe.lr, recipe.lr_batch, steps.batch_size) for steps in schedules]
    batch, size = schedules[0].batch_per_device, int(data.train_transform.size)
    if cfg.callbacks.resize is not None:
        resize = instantiate(cfg.callbacks.resize)
        size = max(resize.size(epoch, trainer.max_epochs) for epoch in range(schedules[0].epochs))

    def optimizer(net: Any) -> Any:
        switches = {name: recipe[name] for name in ("decay_identity_gamma", "bias_lr_factor", "custom_l2")}
        groups = parameter_groups(net, recipe.weight_decay, lr=lrs[0], **switches)
        return instantiate(recipe.optimizer)(groups, lr=lrs[0])

    loss = count.classification_loss(
        data.num_classes,
        label_smoothing=recipe.label_smoothing,
        soft=bool(recipe.mixup),
        custom_l2=recipe.weight_decay if recipe.custom_l2 else 0.0,
    )
    memory = count.step_memory(
        lambda: instantiate(cfg.net),
        optimizer,
        loss,
        (batch, cfg.net.in_channels, size, size),
        precision=trainer.precision,
        keeps_gradients=views and numbers[0] > 1,
        recompute=cfg.recompute,
        channels_last=cfg.channels_last,
        on_gpu=trainer.accelerator != "cpu",
    )
    beside = {
        "averaged_bytes": memory.parameters + memory.buffers if cfg.callbacks.ema is not None else 0,
        "bucket_bytes": memory.gradients if numbers[0] > 1 and not views else 0,
        "ring_bytes": (data.batches_ahead + 2) * batch * cfg.net.in_channels * size**2,
    }
    choices = HydraConfig.get().runtime.choices
    return count.Plan(
        name=subject(choices),
        recipe=choices["recipe"],
        precision=str(trainer.precision),
        train_px=size,
        network=count.sizes(lambda: instantiate(cfg.net), (cfg.net.in_channels, data.resolution, data.resolution)),
        count_px=data.resolution,
        memory_bytes=memory,
        peak_bytes=memory.peak + sum(beside.values()),
        images_per_s_per_gpu=speed,
        scales=[
            count.scale(steps, devices=n, nodes=nodes[n], lr=lr, gradients=memory.gradients, rates=rates)
            for n, steps, lr in zip(numbers, schedules, lrs, strict=True)
        ],
        train=train,
        val=val,
        cache_bytes_per_node=count.cache_bytes(train, val, os_cache=data.os_cache, processes=per_node),
        decoding_source=decoding_source,
        notes=notes(cfg),
        **beside,
    )


def devices_of_node(devices: Any) -> int:
    """`trainer.devices` as a number: a plan is not for the GPUs that are here."""
    if isinstance(devices, ListConfig) and devices:
        return len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(f"trainer.devices={devices}: a plan must know how many a node has, as in trainer.devices=8")


def has_bucket_views(strategy: Any) -> bool:
    """Whether gradients are views of DDP's buckets; ValueError for a strategy that shards what is counted here."""
    name = strategy if isinstance(strategy, str) else str(strategy["_target_"]).rpartition(".")[2]
    if not name.lower().startswith(("auto", "ddp")):
        raise ValueError(f"trainer.strategy={name}: memory and exchange are counted for auto and ddp")
    return not isinstance(strategy, str) and bool(strategy.get("gradient_as_bucket_view", False))


def set_classes(data: DictConfig) -> None:
    """Of the files, where they are."""
    files = {"train": data.train_file, "val": data.val_file}
    if all(manifest_path(file).is_file() for file in files.values()):
        data.num_classes = number_of_classes(files, data.num_classes)
    elif data.num_classes is None:
        raise ValueError(f"{data.train_file} is not there: say how many classes it is to have, data.num_classes=N")


def split(cfg: DictConfig, name: str) -> "Split":
    """The training or validation images."""
    from repvgg.learn.plan import split_of

    given, data = cfg.plan, cfg.data
    side = given.short_side or 384
    if side not in given.stored_kb[name]:
        raise ValueError(f"plan.short_side={side}: measured are {', '.join(map(str, given.stored_kb[name]))}")
    return split_of(
        data[f"{name}_file"],
        images=given[f"{name}_images"],
        kb=given[f"{name}_kb_per_image"],
        published=given.published.get(data.name, {}).get(f"{name}_images"),
        usual_kb=given.stored_kb[name][side] if data.name == "imagenet" else None,
    )


def decoding_rate(cfg: DictConfig, train: "Split") -> tuple[float | None, str]:
    """Training crops per second and core, and where that is from; measured here are photographs."""
    given = cfg.plan
    if given.decode_images_per_core_s is not None:
        return given.decode_images_per_core_s, f"at {given.decode_images_per_core_s:g} images/s and core, as given"
    side = given.short_side or train.short_side or 384
    rate = given.decoding.get(side) if cfg.data.name in ("imagenet", "folder") else None
    return rate, "" if rate is None else f"at {rate:,} images/s and core: experiments/loader.md, short side {side}"


def notes(cfg: DictConfig) -> list[str]:
    """What the numbers leave out."""
    said = ["On a GPU, CUDA's context, workspaces of cuDNN and the allocator's reserve come on top of the peak."]
    if cfg.compile:
        said.append("compile=true: a compiled step keeps less for the backward than the eager one that is counted.")
    if cfg.callbacks.resize is not None:
        said.append("The training images grow: memory is of the largest.")
    if cfg.batchnorm == "sync":
        said.append("batchnorm=sync: its exchanges, two for each BatchNorm and step, are not in the all-reduce.")
    return said


def without_running(arguments: Sequence[str]) -> list[str]:
    """Overrides of train.py, less those of where runs are run; ValueError for a search, which has no list of runs."""
    searches = [argument for argument in arguments if argument.startswith("hydra/sweeper=")]
    if searches:
        raise ValueError(f"{searches[0]} chooses each run after the one before: plan one of its runs, without -m")
    return [argument for argument in arguments if not argument.lstrip("+~").startswith(OF_RUNNING)]


def show(typed: Sequence[str]) -> None:
    """Print the plan, or compare those of a sweep, and write the numbers to `out`."""
    from repvgg.learn.plan_text import comparison, page

    print(page(PLANS[0]) if len(PLANS) == 1 else comparison(PLANS))
    if OUT[0] is not None:
        content = {"command": ["plan.py", *typed], "plans": [asdict(plan) for plan in PLANS]}
        with replacing(Path(OUT[0])) as file:
            file.write(f"{json.dumps(content, indent=1)}\n".encode())


if __name__ == "__main__":
    prepare_environment()
    typed = sys.argv[1:]
    with clear_errors():
        arguments = without_running(quote_paths(typed, ["ckpt_path", "init_from", "out"]))
    with interruptible("nothing was begun"), tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        if SWEEPING & set(arguments):  # Hydra writes a file about every sweep
            arguments += ["hydra/launcher=basic", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
            arguments += ["hydra/hydra_logging=disabled", "~hydra.callbacks.summary"]
        sys.argv[1:] = arguments
        with answering("plan", arguments, check):
            main()
        if PLANS:
            show(typed)
