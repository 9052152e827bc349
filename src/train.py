"""Train one RepVGG: `python src/train.py --help` has examples; `-m` and commas train several, one after another.

The same command again goes on where the last one stopped, or says what came of it.
"""

import sys

from repvgg.slurm import requeue_on_signal

if __name__ == "__main__":
    requeue_on_signal(sys.argv[1:])  # before all else is imported: until then a signal ends the job

import faulthandler
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from repvgg.checkpoints import fitting_choices, manifest_of
from repvgg.cli import (
    OBJECTIVE,
    clear_errors,
    finished_before,
    logged_config,
    no_collections,
    prepare_environment,
    quote_paths,
    recorded,
    run_group,
)
from repvgg.command import answering, require_keywords
from repvgg.data.manifest import number_of_classes, require_files
from repvgg.deploy.int8_options import require_int8
from repvgg.git import git_sha
from repvgg.identity import Identity, changes, claim, hyper_parameters, require_typed_id, run_name, with_drawn_seed

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger("train")


def require_objective(cfg: DictConfig, sweeper: DictConfig) -> None:
    """Raise ValueError where a sweeper that searches, such as Optuna's, would get no value of a run, or needs two."""
    if str(sweeper._target_).endswith("BasicSweeper"):
        return
    direction = str(sweeper.get("direction", "maximize")).rpartition(".")[2]
    if direction != "maximize":
        raise ValueError(
            f"hydra.sweeper.direction={direction}: a run has one value, {OBJECTIVE}, of which more is better. Give "
            "hydra.sweeper.direction=maximize"
        )
    without = [f"callbacks.{name}" for name in ("checkpoints", "two_forms") if cfg.callbacks.get(name) is None]
    if cfg.trainer.get("fast_dev_run"):
        raise ValueError(f"trainer.fast_dev_run={cfg.trainer.fast_dev_run}: a dry run has no {OBJECTIVE} to search by")
    if without:
        raise ValueError(f"{OBJECTIVE}, which the sweeper searches by, needs {' and '.join(without)}: switch it on")


def check(cfg: DictConfig) -> None:
    """Raise ValueError for what is wrong with a command, and say how many classes its data has."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        require_objective(cfg, HydraConfig.get().sweeper)
    if cfg.init_from is not None and cfg.ckpt_path is not None:
        raise ValueError("init_from begins a run with a file's weights, ckpt_path continues one: give one of them")
    missing = [key for key in cfg.required if cfg[key] is None and cfg.ckpt_path is None]
    if missing:
        recipe = HydraConfig.get().runtime.choices["recipe"]
        raise ValueError(f"recipe={recipe} needs {', '.join(f'{key}=PATH' for key in missing)}")
    for key in ("init_from", "ckpt_path"):
        if cfg[key] is not None and not Path(cfg[key]).is_file():
            raise ValueError(f"{key}={cfg[key]}: there is no file {Path(cfg[key]).absolute()}")
    if cfg.weights is not None and cfg.init_from is None:
        raise ValueError(
            f"weights={cfg.weights} says which weights of init_from to begin with: give init_from=PATH too"
        )
    if cfg.int8 is not None:
        require_int8(cfg.int8, cfg.quantizer.method, method_key="quantizer.method")
    if cfg.recipe.warmup_epochs >= cfg.trainer.max_epochs:
        raise ValueError(
            f"recipe.warmup_epochs={cfg.recipe.warmup_epochs} does not fit into trainer.max_epochs="
            f"{cfg.trainer.max_epochs}: lower recipe.warmup_epochs or raise trainer.max_epochs"
        )
    if cfg.data.prepare is None:
        files = {"train": cfg.data.train_file, "val": cfg.data.val_file}
        require_files(files, cfg.data.write_command)
        cfg.data.num_classes = number_of_classes(files, cfg.data.num_classes)


def identify(cfg: DictConfig, choices: dict[str, str], checkpoints: Path) -> Identity | None:
    """Take the run's folder for this process, and its id for W&B; None on any rank but the first."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    from repvgg.learn.checkpoint import remove_leftovers
    from repvgg.learn.run import code

    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    config = {**logged_config(cfg, choices), **code()}
    typed = list(HydraConfig.get().overrides.task)
    identity = claim(cfg.output_dir, config, typed, begun=any(checkpoints.glob("*.ckpt")), id=cfg.run.id)
    remove_leftovers(checkpoints)
    cfg.run.id = identity.id
    return identity


def build_trainer(cfg: DictConfig, environment: object) -> "pl.Trainer":
    """The Trainer, with its loggers; W&B's run and the CSV file go on where this run stopped."""
    from hydra.utils import instantiate

    from repvgg.learn.batchnorm import ddp_options
    from repvgg.learn.checkpoint import AtomicCheckpointIO
    from repvgg.learn.cluster import strategy

    asked = cfg.trainer.strategy, cfg.trainer.devices, cfg.trainer.num_nodes
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        strategy=strategy(*asked, cfg.ddp_timeout_s, **ddp_options(cfg.batchnorm)),
        sync_batchnorm=cfg.batchnorm == "sync",
        logger=list(instantiate(cfg.logger).values()),
        callbacks=[callback for callback in instantiate(cfg.callbacks).values() if callback is not None],
        plugins=[AtomicCheckpointIO(), environment],
    )
    return trainer


def smallest_side(cfg: DictConfig) -> int:
    """Return the smallest side of the training images in any epoch, in pixels."""
    sizes = [cfg.data.train_transform.get("size", cfg.data.resolution)]
    for key in ("start", "end"):
        sizes.append(OmegaConf.select(cfg, f"callbacks.resize.{key}") or sizes[0])
    return int(min(sizes))


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Check, build, run; returns the deploy form's top-1, which a sweep maximises."""
    with clear_errors(), no_collections():
        check(cfg)
        choices = {group: str(name) for group, name in HydraConfig.get().runtime.choices.items() if "/" not in group}
        cfg.run.name = cfg.run.name or run_name(choices, cfg.seed)
        cfg.run.group = cfg.run.group or run_group(choices, cfg.experiment)
        typed, sha = list(HydraConfig.get().overrides.task), {"git": {"sha": git_sha()}}
        if (earlier := finished_before(cfg.output_dir, logged_config(cfg, choices) | sha, typed)) is not None:
            return earlier.objective

        # Heavy imports from here on, torch first: a wrong command has been answered by the end of these lines.
        from repvgg.learn.devices import require_devices, set_tf32, slow_bf16

        require_devices(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.precision)

        import pytorch_lightning as pl
        from hydra.utils import instantiate

        from repvgg.learn.batchnorm import check_batchnorm, require_values
        from repvgg.learn.checkpoint import newest_whole, require_continuable, require_same_classes
        from repvgg.learn.cluster import cluster_environment, naming_lost_ranks, requeueing
        from repvgg.learn.interrupt import Signals
        from repvgg.learn.logging import quiet_lightning
        from repvgg.learn.optim import batch_per_device, require_optimizer
        from repvgg.learn.ranks import live_and_die_together
        from repvgg.learn.run import LoggedConfig, describe, environment, introduction, train_and_test
        from repvgg.model import initialize, read_weights

        require_keywords(cfg)
        check_batchnorm(cfg.batchnorm, cfg.trainer.accelerator, cfg.trainer.devices)
        set_tf32(cfg.tf32)
        quiet_lightning()
        ranks = cluster_environment(cfg.trainer.devices, cfg.trainer.num_nodes)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)

        checkpoints = Path(cfg.output_dir) / "checkpoints"
        identity = identify(cfg, choices, checkpoints)
        resumed = newest_whole(checkpoints)
        module = instantiate(cfg.module)
        require_optimizer(module.make_optimizer, module.lr)
        if cfg.init_from is not None and resumed is None:
            weights = read_weights(cfg.init_from, cfg.weights)
            with fitting_choices(weights, choices["ablation"]):
                initial = initialize(module.net, weights, manifest_of(cfg.data).names.get("classes"))
            if identity is not None:
                log.info(initial)
        continued = None
        if cfg.ckpt_path is not None and resumed is None:
            batch_size, epochs = cfg.recipe.batch_size, cfg.trainer.max_epochs
            continued = require_continuable(cfg.ckpt_path, choices, module, batch_size=batch_size, epochs=epochs)
        if (start := resumed or cfg.ckpt_path) is not None:
            require_same_classes(start, manifest_of(cfg.data).names.get("classes"), cfg.data.val_file)
        size = cfg.data.resolution
        metrics: dict[str, float] = describe(module.net, (cfg.net.in_channels, size, size))
        trainer = build_trainer(cfg, ranks)
        share = batch_per_device(cfg.recipe.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
        together = share * (trainer.world_size if cfg.batchnorm == "sync" else 1)
        require_values(together, smallest_side(cfg), cfg.net.get("strides", []))
        datamodule = instantiate(cfg.datamodule, batch_size=share)
        config = {**logged_config(cfg, choices), **environment(trainer)}
        config["bench"]["device"] = config["device"]
        begin_logging = LoggedConfig(config)
        trainer.callbacks.append(begin_logging)  # type: ignore[attr-defined]

    if identity is not None:
        log.info(introduction(cfg.run.name, metrics, module, share, trainer.world_size))
        asked = {"trainer.precision": cfg.trainer.precision, "bench.dtype": cfg.bench.dtype}
        if (slow := slow_bf16(asked, cfg.trainer.accelerator)) is not None:
            log.warning(slow)
        if continued is not None:
            differing = "; ".join(changes(continued, hyper_parameters(config)))
            log.info(f"goes on from {cfg.ckpt_path} with {differing or 'the same values'}")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            identity.write(cfg.output_dir)
    live_and_die_together()
    # Some values can only be judged by what Lightning makes of them, such as the number of steps.
    with (
        requeueing(),
        Signals() as signals,
        clear_errors(lambda: begin_logging.config is not None),
        recorded(trainer, config, metrics, directory=cfg.output_dir, objective=OBJECTIVE),
        naming_lost_ranks(trainer.global_rank, trainer.world_size, cfg.output_dir),
    ):
        metrics |= train_and_test(
            trainer, module, datamodule, resumed or cfg.ckpt_path, signals, choices, hyper_parameters(config)
        )
    return metrics.get(OBJECTIVE)


if __name__ == "__main__":
    faulthandler.enable()  # last words where a mapped data file cannot be read (SIGBUS) or an extension fails
    prepare_environment()
    with clear_errors():
        require_typed_id(sys.argv[1:])
    sys.argv[1:] = with_drawn_seed(sys.argv[1:])
    sys.argv[1:] = quote_paths(sys.argv[1:], ["ckpt_path", "init_from"])
    with answering("train", sys.argv[1:], check):
        main()
