"""Train one RepVGG: `python src/train.py --help` has examples; `-m` and commas train several, one after another."""

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from repvgg.cli import (
    clear_errors,
    fitting_choices,
    key_suggestions,
    logged_config,
    prepare_environment,
    quote_paths,
    recorded,
    run_group,
    run_name,
)
from repvgg.data.manifest import number_of_classes, require_files

log = logging.getLogger("train")


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Check, build, run; returns the deploy form's top-1, which a sweep maximises."""
    with clear_errors():
        if cfg.init_from is not None and cfg.ckpt_path is not None:
            raise ValueError("init_from begins a run with a file's weights, ckpt_path continues one: give one of them")
        missing = [key for key in cfg.required if cfg[key] is None and cfg.ckpt_path is None]
        if missing:
            recipe = HydraConfig.get().runtime.choices["recipe"]
            raise ValueError(f"recipe={recipe} needs {', '.join(f'{key}=PATH' for key in missing)}")
        if cfg.init_from is not None and not Path(cfg.init_from).is_file():
            raise ValueError(f"init_from={cfg.init_from}: there is no file {Path(cfg.init_from).absolute()}")
        if cfg.data.prepare is None:
            files = {"train": cfg.data.train_file, "val": cfg.data.val_file}
            require_files(files, cfg.data.write_command)
            cfg.data.num_classes = number_of_classes(files, cfg.data.num_classes)

        # Heavy imports from here on: a wrong command has been answered by now.
        import pytorch_lightning as pl
        from hydra.utils import instantiate

        from repvgg.learn.checkpoint import AtomicCheckpointIO
        from repvgg.learn.devices import require_devices, set_tf32
        from repvgg.learn.logging import quiet_lightning
        from repvgg.learn.optim import batch_per_device
        from repvgg.learn.run import OBJECTIVE, describe, environment, introduction, train_and_test
        from repvgg.model import initialize, read_weights

        require_devices(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.precision)
        set_tf32(cfg.tf32)
        quiet_lightning()
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        choices = {group: str(name) for group, name in HydraConfig.get().runtime.choices.items() if "/" not in group}
        cfg.run.name = cfg.run.name or run_name(choices, cfg.seed)
        cfg.run.group = cfg.run.group or run_group(choices, cfg.experiment)

        module = instantiate(cfg.module)
        if cfg.init_from is not None:
            weights = read_weights(cfg.init_from)
            with fitting_choices(weights, choices["ablation"]):
                initial = initialize(module.net, weights)
        size = cfg.data.resolution
        metrics: dict[str, float] = describe(module.net, (cfg.net.in_channels, size, size))
        trainer: pl.Trainer = instantiate(
            cfg.trainer,
            logger=list(instantiate(cfg.logger).values()),
            callbacks=[callback for callback in instantiate(cfg.callbacks).values() if callback is not None],
            plugins=[AtomicCheckpointIO()],
        )
        share = batch_per_device(cfg.recipe.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
        datamodule = instantiate(cfg.datamodule, batch_size=share)
        config = {**logged_config(cfg, choices), **environment(trainer)}
        config["bench"]["device"] = config["device"]
        for logger in trainer.loggers:  # where a W&B run begins
            logger.log_hyperparams(config)

    if trainer.is_global_zero:
        if cfg.init_from is not None:
            log.info(initial)
        log.info(introduction(cfg.run.name, metrics, module, share, trainer.world_size))
    # Some values can only be judged by what Lightning makes of them, such as the number of steps.
    with (
        clear_errors(lambda: trainer.global_step == 0),
        recorded(trainer, config, metrics, directory=cfg.output_dir, objective=OBJECTIVE),
    ):
        metrics |= train_and_test(trainer, module, datamodule, cfg.ckpt_path)
    return metrics.get(OBJECTIVE)


if __name__ == "__main__":
    prepare_environment()
    sys.argv[1:] = quote_paths(sys.argv[1:], ["ckpt_path", "init_from"])
    with key_suggestions("train", sys.argv[1:]):
        main()
