"""One run from first step to the test of its best checkpoint, and what is left of it on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from repvgg.git import git_sha
from repvgg.learn.checkpoint import Checkpoints
from repvgg.learn.devices import device_name
from repvgg.learn.interrupt import Interruption, Signals
from repvgg.learn.logging import RunLogger
from repvgg.learn.module import Classifier
from repvgg.model import count_macs, count_parameters, count_shortcuts, not_fused, to_deploy


def describe(net: torch.nn.Module, input_size: tuple[int, int, int]) -> dict[str, float]:
    """Parameters and multiply-adds per image of both forms (``params/*``, ``macs/*``).

    ``deploy/layers_not_fused`` is there where layers cannot become one convolution each, ``deploy/shortcuts`` where
    shortcuts across layers stay.
    """
    deploy = to_deploy(net)
    layers, shortcuts = len(not_fused(deploy)), count_shortcuts(deploy)
    return {
        "params/train_form": count_parameters(net),
        "params/deploy": count_parameters(deploy),
        "macs/train_form": count_macs(net, input_size),
        "macs/deploy": count_macs(deploy, input_size),
        **({"deploy/layers_not_fused": layers} if layers else {}),
        **({"deploy/shortcuts": shortcuts} if shortcuts else {}),
    }


def code() -> dict[str, Any]:
    """Commit and versions of what runs."""
    return {
        "git": {"sha": git_sha()},
        "versions": {"torch": torch.__version__, "lightning": pl.__version__},
    }


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """What a result depends on beside its config: code, versions, hardware."""
    return {
        **code(),
        "device": device_name(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
    }


class LoggedConfig(pl.Callback):
    """Gives the loggers a run's config, with which a W&B run begins, when nothing can be refused any more.

    That is when the first batch is about to be trained, or tested where the training is complete.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: dict[str, Any] | None = config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once."""
        if self.config is not None:
            for logger in trainer.loggers:
                logger.log_hyperparams(self.config)
            self.config = None

    on_test_start = on_train_start


def train_and_test(
    trainer: pl.Trainer,
    module: Classifier,
    datamodule: pl.LightningDataModule,
    ckpt_path: str | Path | None = None,
    signals: Signals | None = None,
    choices: Mapping[str, str] | None = None,
    hyper_parameters: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Fit, then evaluate both forms of the best checkpoint on the validation images.

    Args:
        ckpt_path: a checkpoint to continue from.
        signals: after which the training saves and leaves; while the best is tested they stop at once, since the
            training is then complete in the last checkpoint.
        choices: of the config groups; checkpoints say them.
        hyper_parameters: what else a result depends on, in plain types; checkpoints say them too.

    Returns:
        the last epoch's metrics, and ``test/*`` with ``test/best_epoch`` (from 0) of the best checkpoint. A dry run
        (``trainer.fast_dev_run``) has no best checkpoint and tests the network as it is.

    Raises:
        Interrupted: after a signal, or when ``trainer.max_time`` is over; Lightning has shut down by then.
        RuntimeError: the training ended before its first validation.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Interruption):
            callback.signals = signals
        if isinstance(callback, Checkpoints):
            callback.run = {"choices": dict(choices or {}), "hyper_parameters": dict(hyper_parameters or {})}
    with signals.deferred() if signals is not None else nullcontext():
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    keeper = Checkpoints.of(trainer)
    if keeper is not None:
        keeper.require_complete(trainer)
    metrics = last_metrics(trainer)
    best = getattr(keeper or trainer.checkpoint_callback, "best_model_path", "") or None
    if best is not None:
        metrics["test/best_epoch"] = torch.load(best, weights_only=True, map_location="cpu", mmap=True)["epoch"]
    elif keeper is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise RuntimeError(
            f"the training ended at epoch {trainer.current_epoch} without a validation, so there is no best "
            f"checkpoint: lower trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}"
        )
    if best is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.limit_test_batches = trainer.limit_val_batches  # the same images
        # Only the test's own metrics: the names of the last epoch stay the last epoch's.
        tested = trainer.test(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
        metrics |= {name: float(value) for result in tested for name, value in result.items()}
    return metrics


def last_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """What the last validation and training epoch logged, before a resume too."""
    before = Checkpoints.of(trainer)
    earlier = {} if before is None else before.metrics
    return {**earlier, **{name: float(value) for name, value in trainer.callback_metrics.items()}}


def introduction(name: str, metrics: Mapping[str, float], module: Classifier, batch: int, world_size: int) -> str:
    """One line on what is about to be trained."""
    layers = metrics.get("deploy/layers_not_fused")
    unfused = f"; {layers:.0f} layers cannot become one convolution, so each deploys as several" if layers else ""
    shortcuts = metrics.get("deploy/shortcuts")
    if shortcuts:
        unfused += f"; its {shortcuts:.0f} shortcuts stay when deployed: no plain stack of convolutions"
    trained, deployed = (metrics[f"params/{form}"] / 1e6 for form in ("train_form", "deploy"))
    return (
        f"{name}: {trained:.2f} M parameters, {deployed:.2f} M deployed ({metrics['macs/deploy'] / 1e9:.3g} GMACs); "
        f"{world_size} × {batch} images per batch, lr {module.lr:g}{unfused}"
    )


def conclusion(name: str, status: str, metrics: Mapping[str, float], directory: str) -> str:
    """One line on what came of it, and where it is."""
    parts = [status]
    if "test/best_epoch" in metrics:
        int8 = f", {metrics['test/int8/top1']:.2%} in int8" if "test/int8/top1" in metrics else ""
        parts.append(
            f"epoch {metrics['test/best_epoch']:.0f} was best: top-1 {metrics['test/top1']:.2%} as trained, "
            f"{metrics['test/deploy/top1']:.2%} deployed{int8}"
        )
    if "bench/speedup" in metrics:
        train_form, deploy = (metrics[f"bench/{form}/images_per_s"] for form in ("train_form", "deploy"))
        up, spread = metrics["bench/speedup"], metrics.get("bench/spread", 0.0)
        within = f", within the ±{spread:.0%} by which its rounds differ" if abs(up - 1) <= spread else ""
        parts.append(f"{train_form:,.0f} → {deploy:,.0f} images/s (×{up:.2f}{within})")
    return f"{name} {', '.join(parts)}. Everything is in {directory}"


def close_loggers(
    trainer: pl.Trainer, summary: Mapping[str, float], exit_code: int, *, preempted: bool = False
) -> None:
    """Give every W&B run its summary and end it; other loggers need nothing. ``preempted``: the run will go on."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger) and trainer.is_global_zero:
            logger.finish(summary, exit_code, preempted=preempted)
