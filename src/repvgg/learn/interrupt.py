"""Signals: save at the next batch, on all ranks alike, and leave with an exit code that says why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from repvgg.learn.checkpoint import Checkpoints, Interrupted
from repvgg.slurm import TRY_AGAIN

EXIT_CODES = {
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGUSR1: TRY_AGAIN,
    signal.SIGUSR2: TRY_AGAIN,
}
#: One event may signal a process twice: what torchrun or srun passes on, Slurm or the terminal sends to all as well.
SAME_EVENT_S = 0.5
_SAVE = 1  # no signal has this meaning here


def interrupted(signum: int, saved: bool = False) -> Interrupted:
    """All ranks have agreed to stop after a signal."""
    received = signal.Signals(signum)
    return Interrupted(received.name, EXIT_CODES[received], saved)


class Signals:
    """Remembers the first of SIGTERM, SIGINT, SIGUSR1 and SIGUSR2; the second stops the process at once.

    Outside of :meth:`deferred`, where there is nothing to save, the first raises :class:`Interrupted`.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._received_at = 0.0
        self._deferring = False
        self._outer: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # An ignored signal stays ignored: `nohup`, or a job in the background of a script.
        self._outer = {s: signal.getsignal(s) for s in EXIT_CODES if signal.getsignal(s) is not signal.SIG_IGN}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._outer.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals, also back from Lightning, whose handlers save inside of the handler and deadlock."""
        for signum in self._outer:
            signal.signal(signum, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, a signal is remembered; what runs in it looks at ``received``."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received:
            raise interrupted(self.received)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._received_at < SAME_EVENT_S:
                return
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.received, self._received_at = signum, time.monotonic()
        if not self._deferring:
            raise interrupted(signum)
        # No logging in a handler: the interrupted thread may hold its lock.
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stopping after this batch; a second signal stops at once\n".encode())


class Agreement:
    """The largest of one small number of every rank, which all ranks learn one call later.

    A reduction per batch through the GPU would make the processor wait for it. This one is of 4 bytes, over gloo, and
    is finished long before anyone asks for it; a rank that died is noticed by it.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def start(self, world_size: int, timeout: timedelta | None = None) -> None:
        """On all ranks; ``timeout`` is how long one waits for another."""
        self._pending = None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None

    def __call__(self, mine: int) -> int:
        """What the ranks gave to the call before; of one rank, ``mine``."""
        if self._group is None:
            return mine
        agreed = 0
        if self._pending is not None:
            work, result = self._pending
            work.wait()
            agreed = int(result)
        value = torch.tensor(mine, dtype=torch.int32)
        self._pending = (dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value)
        return agreed

    def smallest(self, mine: int) -> int:
        """Of all ranks, at once."""
        if self._group is None:
            return mine
        value = torch.tensor(mine)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self._group)
        return int(value)


class Interruption(pl.Callback):
    """Saves and leaves after a signal, and saves from time to time.

    Signals are looked at between two batches of the training (where gradients are accumulated, between two steps of
    the optimiser) and of the validation, which is then repeated. All ranks stop at the same batch, whichever got the
    signal.

    Args:
        every_minutes: between two checkpoints in the middle of an epoch; null for none.

    Raises:
        Interrupted: from the training, when all has been saved.
    """

    def __init__(self, every_minutes: float | None = 30) -> None:
        if every_minutes is not None and every_minutes <= 0:
            raise ValueError(f"callbacks.interruption.every_minutes={every_minutes} must be positive, or null")
        self.every_minutes = every_minutes
        self.signals: Signals | None = None
        self.agree = Agreement()
        self._saved_at = time.monotonic()
        self._shared_batches: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Meet the other ranks."""
        self.agree.start(trainer.world_size, getattr(trainer.strategy, "_timeout", None))
        # Lightning asks at every batch over the devices, and waits, whether rank 0 has got a SIGTERM.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has taken SIGTERM by now."""
        self._saved_at = time.monotonic()
        if self.signals is not None:
            self.signals.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Whatever the batch before has logged is logged by now."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        wish = self._received()
        if not wish and trainer.is_global_zero and self._is_time():
            wish = _SAVE
        agreed = self.agree(wish)
        if agreed:
            keeper = Checkpoints.of(trainer)
            saved = keeper is not None and keeper.save_last(trainer)
            self._saved_at = time.monotonic()
            if agreed != _SAVE:
                raise interrupted(agreed, saved)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks may have one batch more or less than others; they ask each other at those that all have."""
        self._saved_at = time.monotonic()  # a checkpoint was written before validation
        if trainer.state.fn == "fit":
            self._shared_batches = self.agree.smallest(int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A checkpoint has been written before the validation."""
        if trainer.state.fn == "fit" and self._shared_batches is not None and batch_idx < self._shared_batches:
            agreed = self.agree(self._received())
            if agreed > _SAVE:
                raise interrupted(agreed, saved=True)

    def _received(self) -> int:
        return self.signals.received if self.signals is not None else 0

    def _is_time(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
