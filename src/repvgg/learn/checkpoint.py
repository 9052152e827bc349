"""Checkpoints that are whole or not there, and from which a run goes on as if it had never stopped."""

from __future__ import annotations

import logging
import os
import random
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor
from torchmetrics import Metric

from repvgg.files import replacing
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


def require_continuable(path: str | Path, choices: Mapping[str, str], module: pl.LightningModule) -> None:
    """Raise ValueError unless the file is a checkpoint of a training of this network.

    Args:
        choices: of the config groups.
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


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt`` to resume from, ``previous.ckpt`` in case that is damaged, and ``best.ckpt``.

    ``last.ckpt`` is written before and after every validation, and whenever :meth:`save_last` is called. A run that
    resumes from it goes on as if it had not stopped: at the very batch, with the random numbers and the metrics of
    every rank, and nothing decoded of what was seen. The loader has to know how to ``skip`` and to draw an epoch's
    order from its number alone, as :class:`repvgg.data.loader.SafeLoader` does.

    Lightning restores its loops by inferring from counters where they stopped, and is wrong in some places (at the
    last batch of an epoch it leaves out the validation). So the counters are saved as those of one of four positions:
    an epoch is complete, some of its batches are done, all are done and validation comes next, or validation is done.

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
        #: Options of the config groups, which every checkpoint names.
        self.choices: dict[str, str] = {}
        self.best: dict[str, float] = {}
        #: What was logged last, also before a resume.
        self.metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._resumed_epoch: int | None = None
        self._position = ""
        self._wrote_last = False

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
            self.save_last(trainer, "trained")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best; of equals the first."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"callbacks.checkpoints.monitor={self.monitor} is not logged; choose from {known}")
        score = float(trainer.callback_metrics[self.monitor])
        if score > self.best.get("score", -np.inf):
            earlier, self.best = self.best, {"score": score, "epoch": trainer.current_epoch}
            if not self._save(trainer, self.directory / BEST, "validated"):
                self.best = earlier

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch before is complete, and all it logged is logged; where a run resumes, take its place again."""
        epoch = trainer.current_epoch
        if self._resumed_epoch == epoch:
            self._resumed_epoch = None
        elif epoch > 0 and epoch % self.every_n_epochs == 0:
            self.save_last(trainer, "complete")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last epoch."""
        self.save_last(trainer, "complete")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # --- how ---

    def save_last(self, trainer: pl.Trainer, position: str = "batches") -> bool:
        """Write ``last.ckpt``; what it was becomes ``previous.ckpt``. On all ranks alike; False if it was not written.

        Args:
            position: "batches" between two batches of an epoch, before the optimiser has accumulated any gradient.
        """
        following, last, previous = (self.directory / name for name in RESUMABLE)
        for logger in trainer.loggers:
            logger.save()  # a row that is logged before a checkpoint is not logged again after it
        written = self._save(trainer, following, position)
        if written and trainer.is_global_zero:
            # A start that found last.ckpt damaged went on from previous.ckpt, which must not be lost for it.
            if last.exists() and (self._wrote_last or damage(last) is None):
                last.replace(previous)
            following.replace(last)
            self._wrote_last = True
        return written

    def _save(self, trainer: pl.Trainer, path: Path, position: str) -> bool:
        if position == "batches" and trainer.fit_loop.epoch_loop.batch_progress.current.completed == 0:
            position = "complete"
        self._position = position
        trainer.save_checkpoint(path)
        failure = getattr(trainer.strategy.checkpoint_io, "error", None)
        return bool(trainer.strategy.broadcast(failure is None))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out, and say where it stopped in counters that it will understand."""
        loop = checkpoint["loops"]["fit_loop"]
        batches = _at(loop, self._position, trainer.current_epoch)
        checkpoint[POSITION] = {"name": self._position, "epoch": trainer.current_epoch, "batches": batches}
        checkpoint[RANKS] = _gathered({"random": random_state(pl_module.device), "metrics": metric_states(pl_module)})
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint[RUN] = {"choices": dict(self.choices), "metrics": dict(self.metrics)}

    # --- and back ---

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is to be restored when the training begins."""
        if trainer.state.fn == "fit" and RANKS in checkpoint:
            self._restored = {key: checkpoint[key] for key in (POSITION, RANKS)}
            self.metrics = dict(checkpoint[RUN]["metrics"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place where the checkpoint was written; nothing draws a random number in between."""
        if self._restored is None:
            return
        position, ranks = self._restored[POSITION], self._restored[RANKS]
        self._restored = None
        if trainer.is_global_zero:
            log.info("goes on in epoch %d%s", position["epoch"], AFTER[position["name"]] % position["batches"])
        if position["name"] != "complete":
            self._resumed_epoch = position["epoch"]
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


def _at(loop: dict[str, Any], position: str, epoch: int) -> int:
    """Rewrite Lightning's counters to those of ``position`` in ``epoch``; returns the batches done in it.

    They are the inputs of `update_restart_stage` in Lightning's loops.
    """
    batches = loop["epoch_loop.batch_progress"]
    for counters in (batches["total"], batches["current"]):
        counters.update(dict.fromkeys(ALL, counters["completed"]))
    for counters in loop["epoch_progress"].values():
        counters.update(dict.fromkeys(ALL, epoch))
    # "trained" is to Lightning the middle of a validation, which it begins again
    validated = dict.fromkeys(ALL, 0) | ({"ready": 1, "started": 1} if position == "trained" else {})
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for counters in (validation["total"], validation["current"]):
        counters.update(validated)
    if position == "complete":
        return 0
    for counters in loop["epoch_progress"].values():
        counters["ready"] = epoch + 1  # with nothing started, the hooks of the epoch's start are called again
    batches["is_last_batch"] = position != "batches"
    completed: int = batches["current"]["completed"]
    return completed


def _skip(trainer: pl.Trainer, batches: int) -> None:
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "skip"):
        raise ValueError(f"the checkpoint lies within an epoch, and {type(loader).__name__} cannot skip what was seen")
    loader.skip(batches)
    # Lightning asks for loaders with a state, which it would restore too late.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")


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
