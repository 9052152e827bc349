"""Real trainings, `python src/train.py`, to which something happens; callbacks that watch and poison them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from support.equal import TIMED, Rows, checkpoint, different, logged

ROOT = Path(__file__).parents[2]
EVENTS = "events.log"
#: In the environment of every process that a start begins, and those begin.
MARK = "REPVGG_TEST_MARK"
#: In the environment of a start whose images are to be spoilt: JSON, the arguments of `Poison`. With an override,
#: the command would be one of another run.
POISON = "REPVGG_TEST_POISON"
EPOCHS, BATCHES = 4, 22
#: Small, and with all that has a state or draws random numbers: EMA, mixup, RandAugment, momentum.
SMALL = (
    *("data=digits", "trainer=cpu", "recipe=quick", "model=repvgg_a0", "net.width_a=0.25", "net.width_b=0.25"),
    *("bench.warmup=1", "bench.batches=2", "bench.batch=8"),
    *(f"trainer.max_epochs={EPOCHS}", "trainer.log_every_n_steps=1", "callbacks.interruption.every_minutes=0.02"),
    *("recipe.mixup=0.2", "recipe.rand_augment={_target_:repvgg.learn.augment.RandAugment,operations:1,magnitude:7}"),
    *("callbacks.ema={_target_:repvgg.learn.ema.EMA,decay:0.9}", "recipe.batch_size=64"),
    "+callbacks.probe={_target_:support.faults.Probe,directory:${output_dir}}",
)


# --- in the training's process ---------------------------------------------------------------------------------------


class Probe(pl.Callback):
    """Appends a line to ``directory/events.log`` at whatever begins: time, process, what, epoch, batch.

    Such a line survives the process. It spoils images where `POISON` says so.
    """

    def __init__(self, directory: str) -> None:
        self.file = Path(directory) / EVENTS
        self.poison = Poison(**json.loads(os.environ[POISON])) if POISON in os.environ else None

    def note(self, trainer: pl.Trainer, what: str, batch: int = 0) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{time.time():.4f} {os.getpid()} {what} {trainer.current_epoch} {batch}\n")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, "begin")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.note(trainer, "training", batch_idx)
        if self.poison is not None:
            self.poison.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.note(trainer, "validation", batch_idx)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.note(trainer, "checkpoint")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, "end")


class Poison(pl.Callback):
    """Makes the images of a step no numbers, on one rank."""

    def __init__(self, step: int, rank: int = 0, value: str = "nan", times: int = 1) -> None:
        self.steps, self.rank, self.value = range(step, step + times), rank, float(value)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            batch[0].fill_(self.value)


# --- beside it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    time: float
    pid: int
    what: str
    epoch: int
    batch: int


def events(directory: Path) -> list[Event]:
    """What a run's `Probe` noted in all of its starts; half a line at the end is left out."""
    file = directory / EVENTS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    parts = [line.split() for line in lines]
    return [Event(float(t), int(pid), what, int(epoch), int(batch)) for t, pid, what, epoch, batch in parts]


class Start:
    """One start of a command, in a session of its own; its output goes to ``log``, after what is there."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.mark = secrets.token_hex(8)
        self.log, self._before = log, log.stat().st_size if log.exists() else 0
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        # One thread: the sums of two are the same, but take longer where the machine has other things to do.
        base = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}
        self.began = time.time()
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; it would be inherited
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**base, **(environment or {}), MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._before)
            return file.read().decode(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> dict[int, dict[str, str]]:
        """All that are alive of this start, in whatever session, with their environments."""
        self.process.poll()  # a process that ended is no longer a zombie then
        found = {}
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit():
                try:
                    content = (directory / "environ").read_bytes().decode(errors="replace")
                except OSError:  # gone, or another user's
                    continue
                variables = dict(part.split("=", 1) for part in content.split("\0") if "=" in part)
                if variables.get(MARK) == self.mark:
                    found[int(directory.name)] = variables
        return found

    def rank(self, number: int) -> int:
        """The process of a rank; Lightning starts those other than 0 as children."""
        if number == 0:
            return self.process.pid
        is_rank = [p for p, variables in self.processes().items() if variables.get("LOCAL_RANK") == str(number)]
        trainings = [p for p in is_rank if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        (pid,) = trainings
        return pid

    def wait(self, seconds: float = 300) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)

    def wait_for(self, happened: Callable[[], object], seconds: float = 240, every: float = 0.02) -> bool:
        """Until something has happened, or the command has ended: then False. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not happened():
            if not self.running():
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"nothing for {seconds} s; its output ends with\n{self.output[-2000:]}")
            time.sleep(every)
        return True

    def wait_to_say(self, words: str) -> bool:
        """Until they are in its output; False if it ended before."""
        return self.wait_for(lambda: words in self.output) or words in self.output

    def wait_until_all_ended(self, seconds: float) -> dict[int, dict[str, str]]:
        """The processes that are still there after as many seconds: none, it is hoped."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    def kill_all(self) -> None:
        """As the kernel does with a control group, or a power cut."""
        for _ in range(100):
            left = self.processes()
            if not left and not self.running():
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        raise TimeoutError(f"processes {sorted(left)} do not die")


@dataclass
class Training:
    """One run: the same command, started as often as it takes."""

    directory: Path
    overrides: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)

    def start(self, *more: str) -> Start:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        command = ["src/train.py", *SMALL, *self.overrides, *more, f"hydra.run.dir={self.directory}"]
        self.starts.append(Start(command, self.log, self.environment))
        return self.starts[-1]

    @contextmanager
    def started(self, *more: str) -> Iterator[Start]:
        """A start of which nothing is left in the end."""
        start = self.start(*more)
        try:
            yield start
        finally:
            start.kill_all()

    def finish(self, *more: str) -> Start:
        """The same command again, to its end. Raises RuntimeError if that is not a good one."""
        with self.started(*more) as start:
            code = start.wait()
        if code != 0 or self.record().get("status") != "finished":
            raise RuntimeError(f"{self.directory} ended with exit code {code}:\n{start.output[-3000:]}")
        return start

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    def record(self) -> dict[str, Any]:
        file = self.directory / "result.json"
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return content

    def since(self, start: Start, what: str = "") -> list[Event]:
        """Events of one start, of one kind or of all."""
        return [e for e in events(self.directory) if e.pid == start.process.pid and what in ("", e.what)]

    def wait_for_progress(self, start: Start, share: float) -> bool:
        """Until a share of all training batches has begun; False if the start ended before."""
        return start.wait_for(lambda: self.progress() >= share)

    def phase(self, start: Start) -> str:
        """What it was doing last."""
        last = [event.what for event in self.since(start)][-1:]
        return {"begin": "start-up"}.get(*last, *last) if last else "start-up"

    def progress(self) -> float:
        """Training batches begun, as a share of all."""
        trained = [event.epoch * BATCHES + event.batch for event in events(self.directory) if event.what == "training"]
        return max(trained, default=0) / (EPOCHS * BATCHES)

    def repeated(self) -> int:
        """Training batches that were begun more than once."""
        trained = [(event.epoch, event.batch) for event in events(self.directory) if event.what == "training"]
        return len(trained) - len(set(trained))


def wandb_rows(directory: Path) -> Rows:
    """What the W&B files of a run's starts say together: numbers by step, of what was logged twice the last."""
    from repvgg import wandb_file

    rows: Rows = {}
    for file in wandb_file.find(directory / "wandb"):
        rows |= of_steps(wandb_file.rows(file))
    return rows


def of_steps(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """W&B's rows as numbers by step and metric; of what was logged twice the last."""
    numbers: Rows = {}
    for row in rows:
        for name, value in row.items():
            own = name.startswith(("_", "trainer/", *TIMED)) or name == "epoch"
            if not own and isinstance(value, int | float) and "trainer/global_step" in row:
                numbers[row["trainer/global_step"], name] = float(value)
    return numbers


@dataclass(frozen=True)
class Differences:
    """Between a run and its undisturbed reference: of what is trained, of the CSV files, of W&B's files."""

    result: list[str]
    rows: list[str]
    wandb_lost: int = 0

    @property
    def none(self) -> bool:
        """Nothing was lost, W&B's copy of the rows apart."""
        return not self.result and not self.rows


def differences(reference: Path, directory: Path) -> Differences:
    """Of two finished runs, measured times apart.

    Compared are weights, momenta, averaged weights, random numbers, schedule, metrics and counters of last.ckpt, all of
    best.ckpt, the metrics of result.json, health.csv, what the page's reader reads, and every value logged at a step.
    """
    from repvgg.report.runs import read_runs

    result = []
    for name in ("last.ckpt", "best.ckpt"):
        result += different(checkpoint(reference, name), checkpoint(directory, name), name)
    a, b = (json.loads((place / "result.json").read_text()) for place in (reference, directory))
    result += different(a["metrics"], b["metrics"], "result.json")
    rows = []
    if (reference / "health.csv").read_text() != (directory / "health.csv").read_text():
        rows.append("health.csv")
    (run_a,), _ = read_runs([str(reference)])
    (run_b,), _ = read_runs([str(directory)])
    if not run_a.history.equals(run_b.history):
        rows.append("what repvgg.report reads")
    rows += _unlike(logged(reference), logged(directory), "metrics.csv")
    theirs, ours = wandb_rows(reference), wandb_rows(directory)
    lost = {key for key in theirs if key not in ours}
    rows += _unlike({key: value for key, value in theirs.items() if key not in lost}, ours, "W&B")
    return Differences(result, rows, len(lost))


def _unlike(expected: Rows, found: Rows, where: str) -> list[str]:
    # NaN is not equal to itself
    return [
        f"{where}: {name} at step {step} is {found.get((step, name))}, not {expected.get((step, name))}"
        for step, name in expected.keys() | found.keys()
        if repr(expected.get((step, name))) != repr(found.get((step, name)))
    ]
