"""What a checkpoint scores, in both forms: `python src/evaluate.py --help` has examples."""

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from repvgg.checkpoints import fitting_choices, manifest_of, require_same_classes, require_three_channels
from repvgg.checkpoints import settle as settle_checkpoint
from repvgg.cli import (
    clear_errors,
    logged_config,
    no_collections,
    prepare_environment,
    quote_paths,
    recorded,
    require_checkpoint,
    require_read,
    run_group,
)
from repvgg.command import answering, require_keywords
from repvgg.data.manifest import number_of_classes, read_manifest, require_files, suggested
from repvgg.deploy.int8_options import require_int8
from repvgg.identity import subject
from repvgg.influence import UNREAD

log = logging.getLogger("evaluate")

#: Of the config, what an evaluation says of itself.
GROUPS = ("model", "ablation", "data", "trainer", "logger")


def check(cfg: DictConfig) -> None:
    """Raise ValueError for what is wrong with a command, whatever the checkpoint says."""
    typed = list(HydraConfig.get().overrides.task)
    require_read(typed, "evaluate")
    require_checkpoint(cfg.ckpt, "evaluate")
    if cfg.int8 is not None:
        require_int8(cfg.int8, cfg.quantizer.method, method_key="quantizer.method")
        if cfg.forms == "train":
            raise ValueError(
                f"int8={cfg.int8} quantizes the deploy form, which forms=train leaves out: choose forms=both or deploy"
            )
    if cfg.resolution and cfg.resize and cfg.resize < cfg.resolution:
        raise smaller(cfg.resize, cfg.resolution)


def settle(cfg: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """The config of this evaluation, with what the checkpoint's run says where nothing else was typed; its choices."""
    check(cfg)
    typed = list(HydraConfig.get().overrides.task)
    settled = settle_checkpoint("evaluate", cfg.ckpt, typed)
    cfg, choices = settled.cfg, {group: settled.choices[group] for group in GROUPS}
    require_three_channels(settled)
    if settled.origin:
        log.info(settled.origin)

    crop = cfg.data.val_transform
    crop.size = cfg.resolution or crop.size
    if cfg.resize is not None:
        if cfg.resize < crop.size:
            raise smaller(cfg.resize, crop.size)
        crop.ratio = crop.size / cfg.resize
    if cfg.data.prepare is None:
        files = {"val": cfg.data.val_file}
        require_files(files, cfg.data.write_command)
        cfg.data.num_classes = number_of_classes(files, cfg.data.num_classes)
        if cfg.int8 is not None and not Path(cfg.quantizer.file).is_file():
            raise ValueError(
                f"int8={cfg.int8} calibrates with training images, and there is no {cfg.quantizer.file}. Write it with"
                f"\n  {suggested(cfg.data.write_command, cfg.data.dir)}\n"
                f"or take images that the accuracy is then measured on too: quantizer.file={cfg.data.val_file}"
            )
    return cfg, choices


def smaller(resize: int, crop: int) -> ValueError:
    """The error of an image that is smaller than its crop, in pixels."""
    return ValueError(f"resize={resize} is smaller than the crop of {crop} pixels: set resolution= too")


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Check, build, evaluate; returns the deploy form's top-1, or the train form's where that is alone."""
    with clear_errors(), no_collections():
        cfg, choices = settle(cfg)

        # Heavy imports from here on, torch first: a wrong command has been answered by the end of these lines.
        from repvgg.learn.devices import require_devices, set_tf32, slow_bf16

        require_devices(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.precision)
        if (slow := slow_bf16({"trainer.precision": cfg.trainer.precision}, cfg.trainer.accelerator)) is not None:
            log.warning(slow)

        import pytorch_lightning as pl
        from hydra.utils import instantiate
        from rich.console import Console

        from repvgg.learn.evaluate import PREFIX, Evaluation, counted, evaluate, forms_of
        from repvgg.learn.interrupt import Signals
        from repvgg.learn.logging import RunLogger, quiet_lightning
        from repvgg.learn.run import environment
        from repvgg.model import load_weights, read_weights, to_deploy
        from repvgg.report import evaluation as report

        require_keywords(cfg, "net", "block", "data", "trainer", "logger", "quantizer", "datamodule")
        set_tf32(cfg.tf32)
        quiet_lightning()
        cfg.run.name = cfg.run.name or f"{subject(choices)}-eval"
        cfg.run.group = cfg.run.group or run_group(choices, cfg.experiment)
        if "wandb" in cfg.logger:
            cfg.logger.wandb.job_type = "eval"

        weights = read_weights(cfg.ckpt, cfg.weights)
        if weights.taken:
            log.info(weights.taken)
        net = instantiate(cfg.net)
        net = to_deploy(net) if weights.form == "deploy" else net
        with fitting_choices(weights, choices["ablation"]):
            load_weights(net, weights)
        require_same_classes(weights, manifest_of(cfg.data), cfg.data)
        forms = forms_of(net, weights.form, cfg.forms)
        size = cfg.data.val_transform.size
        metrics: dict[str, float] = counted(forms, (cfg.net.in_channels, size, size))
        module = Evaluation(
            forms,
            num_classes=cfg.data.num_classes,
            confusion=cfg.confusion,
            channels_last=cfg.channels_last,
            compile=cfg.compile,
            quantizer=instantiate(cfg.quantizer),
        )
        trainer: pl.Trainer = instantiate(cfg.trainer, logger=list(instantiate(cfg.logger).values()))
        # Of the data module the validation images are needed, and not that there are others for training.
        datamodule = instantiate(cfg.datamodule, batch_size=cfg.batch_size, train_file=cfg.data.val_file)
        config = {k: v for k, v in logged_config(cfg, choices).items() if k not in UNREAD["evaluate"]}
        said = {"naming": weights.naming, "form": weights.form, **({"name": weights.name} if weights.name else {})}
        config |= {"weights": said, **environment(trainer)}
        for logger in trainer.loggers:  # where a W&B run begins
            logger.log_hyperparams(config)

    objective = f"{PREFIX[list(forms)[-1]]}/top1"
    with Signals(), recorded(trainer, config, metrics, directory=cfg.output_dir, objective=objective):
        scores, classes = evaluate(trainer, module, datamodule)
        metrics |= scores
        if trainer.is_global_zero:
            names = read_manifest(cfg.data.val_file).classes
            tables = report.tables(names, classes.images, classes.right, classes.confusion, metrics, module.noise)
            for name, table in tables.items():
                report.write_csv(Path(cfg.output_dir) / f"{name}.csv", table)
            header, rows = tables["per_class"]
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.log_table("eval/per_class", columns=header, data=rows)
            int8 = f", int8 by {cfg.int8}" if cfg.int8 is not None else ""
            title = (
                f"{Path(cfg.ckpt).name} ({weights.naming} naming, {weights.form} form), {subject(choices)}: "
                f"{metrics['eval/images']:,.0f} images at {size} px, {cfg.trainer.precision}{int8}, "
                f"on {config['device']}"
            )
            report.print_evaluation(title, metrics, rows, Console())
    return metrics.get(objective)


if __name__ == "__main__":
    prepare_environment()
    sys.argv[1:] = quote_paths(sys.argv[1:], ["ckpt"])
    with answering("evaluate", sys.argv[1:], check):
        main()
