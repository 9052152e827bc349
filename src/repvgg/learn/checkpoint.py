"""Checkpoints that are whole or not there, and from which a run goes on as if it had never stopped."""

from __future__ import annotations

import logging
import os
import random
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint, Timer, WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from repvgg.classes import require_same
from repvgg.files import replacing
from repvgg.learn.datamodule import ImageDataModule
from repvgg.learn.module import Classifier, steps_per_epoch
from repvgg.learn.optim import schedule_at
from repvgg.learn.two_forms import TwoFormValidation

log = logging.getLogger(__name__)

#: Newest first. A kill between the two renames of a save leaves ``next.ckpt`` and no ``last.ckpt``.
RESUMABLE = ("next.ckpt", "last.ckpt", "previous.ckpt")
BEST = "best.ckpt"
#: What is done of an epoch at each position.
AFTER = {
    "complete": "%.0s",
    "batches": ", after %d batches",
    "trained": ", with the validation after its %d batches",
    "validated": ", after the validation after its %d batches",
}
#: Lightning's counters of one thing.
ALL = ("ready", "started", "processed", "completed")
#: Under these keys a checkpoint says how far it is, what every rank's random numbers and metrics were, and whose it is.
POSITION, RANKS, RUN = "repvgg_position", "repvgg_ranks", "repvgg_run"
#: Exit code of a training whose time is over, as of `timeout` (GNU coreutils).
TIME_IS_OVER = 124


class Interrupted(SystemExit):
    """The training stops before its end, on all ranks; ``code`` is the exit code.

    Raised out of the training, so that Lightning shuts down.

    Args:
        reason: for people, such as a signal's name.
        saved: whether a checkpoint was written to go on from.
        goes_on: how, for people.
    """

    def __init__(self, reason: str, code: int, saved: bool = False, goes_on: str = "the same command goes on") -> None:
        super().__init__(code)
        self.saved = saved
        #: For people.
        self.reason = f"{reason}; saved, {goes_on}" if saved else reason


def _out_of_time(saved: bool) -> Interrupted:
    more_time = "the same command with a larger trainer.max_time goes on"
    return Interrupted("trainer.max_time, which is over", TIME_IS_OVER, saved, more_time)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; a disk that is full costs the checkpoint, not the run.

    Lightning stages in the system's temporary folder; where that is another file system, the last step is a copy,
    and a kill in the middle of it leaves half a checkpoint.
    """

    #: Why the last checkpoint was not written; None when it was.
    error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; what the file system refuses is warned of and kept in ``error``."""
        target = Path(path)
        self.error = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's writer follows what the file system said with an error of its own
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self.error = cause
            log.warning("the checkpoint %s was not written: %s. Training goes on without it", target, cause.strerror)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, None if nothing: torch stores zip archives with a CRC for every entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return None if bad is None else f"{bad} does not match its checksum"


def newest_whole(directory: str | Path) -> Path | None:
    """The checkpoint to resume from; None where there is none yet. What is damaged is named in a warning.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    found = [path for name in RESUMABLE if (path := Path(directory) / name).exists()]
    for path in found:
        problem = damage(path)
        if problem is None:
            return path
        log.warning("%s is damaged (%s): the one before it is used", path, problem)
    if found:
        raise ValueError(
            f"all checkpoints of {Path(directory).absolute()} are damaged: {', '.join(p.name for p in found)}. "
            "Delete them to begin anew"
        )
    return None


def require_continuable(
    path: str | Path, choices: Mapping[str, str], module: Classifier, *, batch_size: int, epochs: int
) -> dict[str, Any]:
    """Raise ValueError unless a training can go on from the file; returns the hyper-parameters of its run.

    Args:
        choices: of the config groups.
        module: the training that goes on.
        batch_size: its images per optimiser step.
        epochs: how many there are in all.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"ckpt_path={path}: there is no file {path.absolute()}")
    if problem := damage(path):
        raise ValueError(f"ckpt_path={path} is damaged: {problem}. previous.ckpt beside it is the one before")
    content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not (isinstance(content, dict) and "loops" in content and "optimizer_states" in content):
        raise ValueError(
            f"ckpt_path={path} holds weights, but no training to go on with: init_from={path} begins one with them"
        )
    theirs = content.get(RUN, {}).get("choices", {})
    differing = [group for group in ("model", "ablation") if theirs.get(group, choices[group]) != choices[group]]
    if differing:
        is_of, not_of = (" ".join(f"{group}={of[group]}" for group in differing) for of in (theirs, choices))
        raise ValueError(f"ckpt_path={path} is of a run with {is_of}, not {not_of}: add {is_of} to the command")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in content["state_dict"].items()}
    wrong = [name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"ckpt_path={path} is of another network: {len(wrong)} tensors differ, the first is {name}, "
            f"{saved.get(name, 'missing')} there and {shapes.get(name, 'missing')} here. "
            "Give the model=, ablation=, data= and net.… of its run"
        )
    begin_anew = f"init_from={path} begins anew with its weights"
    if "hyper_parameters" not in content.get(RUN, {}):
        raise ValueError(f"ckpt_path={path} does not say what it was trained with: {begin_anew}")
    position = content[POSITION]
    if position["epoch"] >= epochs:
        raise ValueError(
            f"ckpt_path={path} is of a training of {position['epoch']} epochs, which trainer.max_epochs={epochs} ends "
            f"before: give a larger one, or python src/evaluate.py ckpt={path} measures it; {begin_anew}"
        )
    if position["name"] == "batches":
        require_whole_steps(position["images"], batch_size)
    _require_same_optimizer(path, content, module, begin_anew)
    hyper_parameters: dict[str, Any] = content[RUN]["hyper_parameters"]
    return hyper_parameters


def _require_same_optimizer(path: Path, content: Mapping[str, Any], module: Classifier, begin_anew: str) -> None:
    """Raise ValueError where the optimiser's state does not fit that of ``module``."""
    saved = content["optimizer_states"][0]
    theirs = {group.get("name"): len(group["params"]) for group in saved["param_groups"]}
    ours = {group["name"]: len(group["params"]) for group in module.parameter_groups()}
    if theirs != ours:
        raise ValueError(
            f"ckpt_path={path} has the parameter groups {', '.join(theirs)}, not {', '.join(ours)}: give "
            "recipe.decay_identity_gamma, recipe.bias_lr_factor and recipe.custom_l2 of its run; "
            f"{begin_anew}"
        )
    parameter = nn.Parameter(torch.zeros(()))
    parameter.grad = torch.zeros(())
    optimizer = module.make_optimizer([parameter], lr=1.0)
    optimizer.step()
    has = {key for state in saved["state"].values() for key in state}
    needs = set(optimizer.state[parameter])
    # A momentum that is new begins at zero; state that is not read any more, such as a momentum's, does no harm.
    if has and (missing := sorted(needs - has)):
        raise ValueError(
            f"ckpt_path={path} has {', '.join(sorted(has))} of its optimiser, and {type(optimizer).__name__} needs "
            f"{', '.join(missing)} too: give the recipe.optimizer of its run; {begin_anew}"
        )


def require_same_classes(path: str | Path, classes: Sequence[str] | None, data: str) -> None:
    """Raise ValueError where a checkpoint of a training has other classes than the data, or another order of them.

    Args:
        classes: of ``data``; None where they have no names.
    """
    run = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get(RUN, {})
    then = f"A training on other classes begins with init_from={path}"
    require_same(run.get("classes"), classes, checkpoint=str(path), data=data, then=then)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt`` to resume from, ``previous.ckpt`` in case that is damaged, and ``best.ckpt``.

    ``last.ckpt`` is written before and after every validation, and whenever :meth:`save_last` is called. A run that
    resumes from it goes on as if it had not stopped: at the very batch, with the random numbers and the metrics of
    every rank, and nothing decoded of what was seen. The loader has to know how to ``skip`` and to draw an epoch's
    order from its number alone, as :class:`repvgg.data.loader.SafeLoader` does.

    Lightning restores its loops by inferring from counters where they stopped, and is wrong in some places (at the
    last batch of an epoch it leaves out the validation). So the counters are saved as those of one of four positions:
    an epoch is complete, some of its batches are done, all are done and validation comes next, or validation is done.
    The position follows from the optimiser's steps, so every checkpoint of the training has it, whoever asks for one:
    a ``ModelCheckpoint``, ``trainer.save_checkpoint``. One that is asked for between two optimiser steps goes on at
    the first of them; the epoch's training metrics then count the images in between twice.

    A checkpoint gives a training its state: weights, momenta, averaged weights, random numbers, position. Learning
    rate, schedule, weight decay and the optimiser's other options are those of the training that goes on.

    Args:
        directory: of the files.
        monitor: the metric of which the largest is best.
        every_n_epochs: how often ``last.ckpt`` is written at the ends of epochs; always after the last.

    Raises:
        ValueError: validation in the middle of an epoch, or ``monitor`` is not logged.
    """

    def __init__(self, directory: str, monitor: str = "val/deploy/top1", every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"callbacks.checkpoints.every_n_epochs={every_n_epochs} must be at least 1")
        self.directory = Path(directory)
        self.monitor = monitor
        self.every_n_epochs = every_n_epochs
        #: ``choices`` of the config groups and ``hyper_parameters`` of the run, which every checkpoint holds.
        self.run: dict[str, Any] = {"choices": {}, "hyper_parameters": {}}
        self.best: dict[str, float] = {}
        #: What the data calls its classes, which every checkpoint says too.
        self.class_names: dict[str, list[str]] = {}
        #: What was logged last, also before a resume.
        self.metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._resumed_epoch: int | None = None
        #: The epoch that has begun, and the optimiser steps before it.
        self._begun = (-1, 0)
        self._validated_epoch = -1
        self._wrote_last = False

    @staticmethod
    def of(trainer: pl.Trainer) -> Checkpoints | None:
        """The one among a trainer's callbacks."""
        return next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)), None)

    # --- what Lightning and the test of the best ask for ---

    @property
    def best_model_path(self) -> str:
        """``best.ckpt``, or "" before there is one."""
        path = self.directory / BEST
        return str(path) if path.exists() else ""

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, with its epoch."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict`; the best of another run, whose file is elsewhere, is not this one's."""
        self.best = dict(state_dict["best"]) if self.best_model_path else {}

    # --- when ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say before the training what would stop it, or what it could not be resumed from."""
        if stage != "fit":
            return
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ImageDataModule):
            self.class_names = datamodule.class_names()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.monitor.startswith("val/deploy/") and not any(isinstance(c, TwoFormValidation) for c in callbacks):
            raise ValueError(
                f"callbacks.checkpoints.monitor={self.monitor} is logged by callbacks.two_forms, which is off: "
                "add callbacks.checkpoints.monitor=val/top1"
            )
        if trainer.val_check_interval != 1.0:
            raise ValueError(
                f"trainer.val_check_interval={trainer.val_check_interval}: validation is at the end of an epoch here, "
                "trainer.check_val_every_n_epoch=N makes it rarer"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation that is killed is repeated; the epoch before it is not."""
        if not trainer.sanity_checking and self._is_due(trainer):
            self.save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best; of equals the first."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated_epoch = trainer.current_epoch
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"callbacks.checkpoints.monitor={self.monitor} is not logged; choose from {known}")
        score = float(trainer.callback_metrics[self.monitor])
        if score > self.best.get("score", -np.inf):
            earlier, self.best = self.best, {"score": score, "epoch": trainer.current_epoch}
            if not self._save(trainer, self.directory / BEST):
                self.best = earlier

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch before is complete, and all it logged is logged; where a run resumes, take its place again."""
        epoch = trainer.current_epoch
        if self._resumed_epoch == epoch:
            self._resumed_epoch = None
        else:
            self._begun = (epoch, trainer.global_step)
            if epoch > 0 and epoch % self.every_n_epochs == 0:
                self.save_last(trainer)
        if epoch + 1 == trainer.max_epochs or self._begun[1] + steps_per_epoch(trainer) == trainer.max_steps:
            trainer.check_val_every_n_epoch = 1  # the last epoch is always validated

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave in the middle of an epoch when the time is over; Lightning would end the epoch there."""
        if not trainer.should_stop or trainer.is_last_batch or not self.time_is_over(trainer):
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            trainer.should_stop = False  # until the optimiser has taken its step
        else:
            raise _out_of_time(saved=self.save_last(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last epoch."""
        self.save_last(trainer)

    @staticmethod
    def time_is_over(trainer: pl.Trainer) -> bool:
        """Whether ``trainer.max_time`` has passed; on all ranks alike."""
        remaining = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        over = any(seconds is not None and seconds <= 0 for seconds in remaining)
        return bool(trainer.strategy.broadcast(over)) if remaining else False

    def require_complete(self, trainer: pl.Trainer) -> None:
        """Raise Interrupted where the training ended before its last epoch because its time is over."""
        if trainer.current_epoch != trainer.max_epochs and self.time_is_over(trainer):
            raise _out_of_time(saved=True)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # --- how ---

    def save_last(self, trainer: pl.Trainer) -> bool:
        """Write ``last.ckpt``; what it was becomes ``previous.ckpt``. On all ranks alike.

        Returns:
            False if it was not written.
        """
        following, last, previous = (self.directory / name for name in RESUMABLE)
        for logger in trainer.loggers:
            logger.save()  # a row that is logged before a checkpoint is not logged again after it
        written = self._save(trainer, following)
        if written and trainer.is_global_zero:
            # A start that found last.ckpt damaged went on from previous.ckpt, which must not be lost for it.
            if last.exists() and (self._wrote_last or damage(last) is None):
                last.replace(previous)
            following.replace(last)
            self._wrote_last = True
        return written

    def _save(self, trainer: pl.Trainer, path: Path) -> bool:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        trainer.save_checkpoint(path)
        failure = getattr(trainer.strategy.checkpoint_io, "error", None)
        return bool(trainer.strategy.broadcast(failure is None))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out, and say where it stopped in counters that it will understand."""
        position = self._position(trainer)
        _set_counters(checkpoint["loops"]["fit_loop"], position, checkpoint["global_step"])
        checkpoint[POSITION] = position
        metrics = {} if position["name"] == "complete" else metric_states(pl_module)
        checkpoint[RANKS] = _gathered({"random": random_state(pl_module.device), "metrics": metrics})
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint[RUN] = {**self.run, "metrics": dict(self.metrics), **self.class_names}

    def _position(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The name of the position, its epoch, and how many batches and images of the epoch are done by all ranks."""
        if self._restored is not None:  # the training has not yet gone on from there
            return dict(self._restored[POSITION])
        epoch, (begun, steps_before) = trainer.current_epoch, self._begun
        complete = {"name": "complete", "epoch": epoch, "batches": 0, "images": 0}
        if epoch != begun:
            return complete
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.processed > epoch:  # at the hooks of the epoch's end
            return {**complete, "epoch": epoch + 1}
        steps = trainer.global_step - steps_before
        batches = min(steps * trainer.accumulate_grad_batches, int(trainer.num_training_batches))
        if not batches:
            return complete
        name = "batches"
        if batches == trainer.num_training_batches:
            name = "validated" if self._validated_epoch == epoch else "trained"
        return {"name": name, "epoch": epoch, "batches": batches, "images": batches * _images_per_batch(trainer)}

    # --- and back ---

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is to be restored when the training begins."""
        if trainer.state.fn == "fit" and RANKS in checkpoint:
            self._restored = checkpoint
            averages = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
            if "current_model_state" in checkpoint and not averages:  # else the average would be trained on
                pl_module.load_state_dict(checkpoint["current_model_state"])
            self.metrics = dict(checkpoint[RUN]["metrics"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the checkpoint, before Lightning restores the optimiser and the loops, to this training's options."""
        if self._restored is None:
            return
        position = _converted(self._restored[POSITION], trainer)
        step = position["epoch"] * steps_per_epoch(trainer) + _steps(position, trainer)
        if trainer.max_steps > 0 and step != self._restored["global_step"]:
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps} counts the {self._restored['global_step']} steps of the "
                f"checkpoint, which would be {step} here: give trainer.max_epochs instead"
            )
        _set_counters(self._restored["loops"]["fit_loop"], position, self._restored["global_step"])
        _keep_options(trainer, self._restored, step)
        self._restored = {POSITION: position, RANKS: self._restored[RANKS]}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place where the checkpoint was written; nothing draws a random number in between."""
        if self._restored is None:
            return
        # Lightning asks for loaders with a state, which it would restore too late.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        position, ranks = self._restored[POSITION], self._restored[RANKS]
        self._restored = None
        if trainer.is_global_zero and (position["epoch"] or position["batches"]):
            log.info("goes on in epoch %d%s", position["epoch"], AFTER[position["name"]] % position["batches"])
        if position["name"] != "complete":
            self._resumed_epoch = position["epoch"]
            self._begun = (position["epoch"], trainer.global_step - _steps(position, trainer))
        if position["name"] == "validated":
            self._validated_epoch = position["epoch"]
        if position["name"] == "batches":
            _skip(trainer, position["batches"])
        if len(ranks) == trainer.world_size:
            mine = ranks[trainer.global_rank]
            set_random_state(mine["random"])
            set_metric_states(pl_module, mine["metrics"])
            return
        log.warning(
            "the checkpoint is of %d processes and goes on with %d: the same images in the same global batches, but "
            "rounding and BatchNorm's batches differ from an uninterrupted run's",
            len(ranks),
            trainer.world_size,
        )
        if trainer.is_global_zero:  # metrics are sums over the ranks
            set_metric_states(pl_module, _summed([of["metrics"] for of in ranks]))


def _set_counters(loop: dict[str, Any], position: Mapping[str, Any], global_step: int) -> None:
    """Rewrite Lightning's counters in a checkpoint to those of a position.

    They are the inputs of `update_restart_stage` in Lightning's loops.
    """
    name, epoch, done = position["name"], position["epoch"], position["batches"]
    batches = loop["epoch_loop.batch_progress"]
    total, current = batches["total"], batches["current"]
    before = total["ready"] - current["ready"]
    total.update(dict.fromkeys(ALL, before + (current["completed"] if name == "complete" else done)))
    current.update(dict.fromkeys(ALL, done))
    batches["is_last_batch"] = name in ("trained", "validated")
    for counters in loop["epoch_progress"].values():
        counters.update(dict.fromkeys(ALL, epoch))
        if name != "complete":
            counters["ready"] = epoch + 1  # with nothing started, the hooks of the epoch's start are called again
    # "trained" is to Lightning the middle of a validation, which it begins again
    validated = dict.fromkeys(ALL, 0) | ({"ready": 1, "started": 1} if name == "trained" else {})
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for counters in (validation["total"], validation["current"]):
        counters.update(validated)
    # The step that loggers are given. Lightning counts it up after the validation.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - (name in ("trained", "validated"))


def _converted(position: Mapping[str, Any], trainer: pl.Trainer) -> dict[str, Any]:
    """The same images of the epoch in this training's batches, whose size may be another.

    Raises:
        ValueError: they are not a whole number of optimiser steps.
    """
    if position["name"] in ("trained", "validated"):
        return {**position, "batches": int(trainer.num_training_batches)}
    # A checkpoint without a number of images is of a run that goes on in its own folder, with its own batches.
    images = position.get("images", position["batches"] * _images_per_batch(trainer) if position["batches"] else 0)
    if not images:
        return dict(position)
    require_whole_steps(images, _images_per_batch(trainer) * trainer.accumulate_grad_batches)
    return {**position, "batches": images // _images_per_batch(trainer)}


def require_whole_steps(images: int, batch_size: int) -> None:
    """Raise ValueError unless ``images`` of an epoch are whole optimiser steps of ``batch_size`` images."""
    if images % batch_size:
        sizes = [str(size) for size in range(batch_size // 4, 4 * batch_size) if size and images % size == 0]
        near = sorted(sizes, key=lambda size: abs(int(size) - batch_size))[:2]
        raise ValueError(
            f"recipe.batch_size={batch_size}: the checkpoint lies after {images} images of an epoch, which are no "
            f"whole number of optimiser steps. Give recipe.batch_size={' or '.join(near) or images}, go on from the "
            "end of an epoch, or begin anew with its weights: init_from="
        )


def _images_per_batch(trainer: pl.Trainer) -> int:
    """How many images all ranks together are trained on between two gradients."""
    loader: Any = trainer.train_dataloader
    return int(loader.batch_size) * trainer.world_size


def _steps(position: Mapping[str, Any], trainer: pl.Trainer) -> int:
    return int(-(-position["batches"] // trainer.accumulate_grad_batches))


def _keep_options(trainer: pl.Trainer, checkpoint: dict[str, Any], step: int) -> None:
    """Give a checkpoint this training's options of the optimiser, and its schedule after ``step`` steps."""
    schedules = trainer.lr_scheduler_configs
    if not all(isinstance(config.scheduler, LambdaLR) for config in schedules):
        raise ValueError("the learning-rate schedule is no LambdaLR, so it cannot be evaluated at the step reached")
    for config in schedules:
        config.scheduler = schedule_at(config.scheduler, step)  # type: ignore[arg-type]
    # As if the schedule had been stepped there, for checkpoints that equal an uninterrupted training's to the bit
    counted = {"_step_count": step + 1}
    checkpoint["lr_schedulers"] = [config.scheduler.state_dict() | counted for config in schedules]
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        saved["param_groups"] = optimizer.state_dict()["param_groups"]


def _skip(trainer: pl.Trainer, batches: int) -> None:
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "skip"):
        raise ValueError(f"the checkpoint lies within an epoch, and {type(loader).__name__} cannot skip what was seen")
    loader.skip(batches)


def _gathered(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, torch and the device, as types that `torch.load(weights_only=True)` reads."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - of whoever draws from it
    kind, keys, *rest = numpy
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """As :func:`random_state` has it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def metric_states(module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    """What the torchmetrics of a module have counted so far, by name; those that have not begun are left out."""
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    return {
        name: {"updates": metric.update_count, **{key: _copied(value) for key, value in metric.metric_state.items()}}
        for name, metric in metrics.items()
        if metric.update_called
    }


def _copied(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [_one(part) for part in value] if isinstance(value, list) else _one(value)


def _one(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def set_metric_states(module: pl.LightningModule, states: Mapping[str, Mapping[str, Any]]) -> None:
    """As :func:`metric_states` has them."""
    for name, state in states.items():
        metric = module.get_submodule(name)
        for key, value in state.items():
            if key == "updates":
                metric._update_count = value
            else:
                moved = [v.to(module.device) for v in value] if isinstance(value, list) else value.to(module.device)
                setattr(metric, key, moved)


def _summed(ranks: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    summed: dict[str, dict[str, Any]] = {}
    for states in ranks:
        for name, state in states.items():
            into = summed.setdefault(name, {})
            for key, value in state.items():
                into[key] = into[key] + value if key in into else value
    return summed


def remove_leftovers(directory: str | Path) -> None:
    """Delete what killed writers left: half-written files under temporary names."""
    for path in Path(directory).glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if not (owner.isdigit() and _is_running(int(owner))):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
