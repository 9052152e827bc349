"""What a run loses when something happens to it: `python experiments/reliability.py [FAULT …] [--times N] [--seed 0]`.

Every fault is done to real `python src/train.py` processes, on the embedded digits with a small network; then the same
command is given again until the run is finished, and what it left is compared, bit for bit, with a run of the same
values to which nothing happened. Without names, all faults take their turn, except `cluster`, which wants Slurm and
network namespaces.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from repvgg.files import replacing  # noqa: E402
from repvgg.learn.checkpoint import damage  # noqa: E402
from repvgg.learn.devices import device_name  # noqa: E402
from support.equal import logged  # noqa: E402
from support.faults import (  # noqa: E402
    BATCHES,
    EPOCHS,
    POISON,
    Differences,
    Start,
    Training,
    differences,
    events,
    of_steps,
    wandb_rows,
)

#: Kills of one run, before it may come to its end.
KILLS_OF_A_RUN = 5
#: Longer than any process may stay after the last of those that matter has gone, s.
ORPHAN_S = 60.0
PHASES = {
    "start-up": "in start-up",
    "training": "in training",
    "validation": "in validation",
    "checkpoint": "while a checkpoint was made",
    "test": "in the test of the best",
    "end": "after it",
}


@dataclass
class Row:
    """One line of the table. Times in seconds; `again` is from the command to the next batch."""

    fault: str
    injected: str
    times: int
    lost: str
    detected: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    commit: str = ""
    load: float = 0.0


class Lab:
    """A folder for runs, the reference of each kind of them, and random numbers."""

    def __init__(self, folder: Path, seed: int, times: int | None) -> None:
        self.folder, self.seed, self.asked = folder, seed, times
        self.rng = random.Random()
        self._references: dict[int, Training] = {}
        self._names: Counter[str] = Counter()

    def begin(self, fault: str) -> None:
        """Random numbers of this fault, whichever came before it."""
        self.rng.seed(f"{self.seed} {fault}")

    def values(self) -> int:
        """How many an undisturbed run logs at its steps; 0 if there was none."""
        return max((len(logged(run.directory)) for run in self._references.values()), default=0)

    def times(self, usual: int) -> int:
        """How often: as asked for, or as often as a fault is usually done."""
        return self.asked or usual

    def say(self, text: str) -> None:
        """Progress."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def training(self, name: str, devices: int = 1, logger: str = "wandb_offline", *more: str) -> Training:
        """A new run."""
        self._names[name] += 1
        directory = self.folder / f"{name}-{self._names[name]}"
        data = [f"data.dir={self.folder / 'digits'}", f"logger={logger}", f"trainer.devices={devices}"]
        return Training(directory, [*data, *more])

    def reference(self, devices: int = 1) -> Training:
        """A run to which nothing happened."""
        if devices not in self._references:
            self.say(f"the undisturbed run, {devices} {'process' if devices == 1 else 'processes'}")
            run = self.training("reference", devices)
            run.finish()
            self._references[devices] = run
        return self._references[devices]

    def life(self, devices: int = 1) -> tuple[float, float]:
        """Of the undisturbed run, s: to its first batch, and from there to its end."""
        run = self.reference(devices)
        noted = events(run.directory)
        first = next(event.time for event in noted if event.what == "training")
        return first - run.starts[0].began, noted[-1].time - first


@dataclass
class Tally:
    """What came of the runs of one fault."""

    reference: Training
    runs: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)
    wandb_lost: int = 0
    repeated: int = 0
    again: list[float] = field(default_factory=list)

    def add(self, run: Training, *, with_wandb: bool = True) -> Differences:
        """A finished run."""
        found = differences(self.reference.directory, run.directory)
        rows = [row for row in found.rows if with_wandb or not row.startswith("W&B")]
        self.runs += 1
        self.equal += not found.result and not rows
        self.wrong += [*found.result, *rows]
        self.wandb_lost += found.wandb_lost
        self.repeated += run.repeated()
        for start in run.starts[1:]:
            first = next((e for e in run.since(start) if e.what in ("training", "validation", "test")), None)
            if first is not None:
                self.again.append(first.time - start.began)
        return found

    @property
    def lost(self) -> str:
        """For the table."""
        if self.equal == self.runs:
            return f"nothing ({self.equal} of {self.runs} runs equal)"
        more = f" and {len(self.wrong) - 3} more" if len(self.wrong) > 3 else ""
        return f"**{self.runs - self.equal} of {self.runs} runs differ**: {'; '.join(self.wrong[:3])}{more}"

    def notes(self) -> list[str]:
        """On batches that were trained twice, and on W&B's own files."""
        steps = f"{self.repeated} batches were trained again, of {self.runs * EPOCHS * BATCHES} in {self.runs} runs."
        values = self.runs * len(wandb_rows(self.reference.directory))
        lost = (
            f"W&B's offline files lack {self.wandb_lost} of {values} values: its helper process, which writes once "
            "a second, was killed too. metrics.csv has them all."
        )
        kept = f"W&B's offline files have all {values} values, each once by its step."
        return [steps, lost if self.wandb_lost else kept]


FAULTS: dict[str, Callable[[Lab], Iterable[Row]]] = {}


def fault(name: str) -> Callable[[Callable[[Lab], Iterable[Row]]], Callable[[Lab], Iterable[Row]]]:
    """Give a fault its name on the command line."""

    def named(function: Callable[[Lab], Iterable[Row]]) -> Callable[[Lab], Iterable[Row]]:
        FAULTS[name] = function
        return function

    return named


# --- kills -----------------------------------------------------------------------------------------------------------


@fault("kill-9")
def kill_9(lab: Lab) -> Iterator[Row]:
    """SIGKILL at random times of a run's life, start-up included."""
    yield _kill_9(lab, devices=1, times=lab.times(20))


@fault("kill-9-ranks")
def kill_9_ranks(lab: Lab) -> Iterator[Row]:
    """The same with two ranks, which are killed together."""
    yield _kill_9(lab, devices=2, times=lab.times(3))


def _kill_9(lab: Lab, devices: int, times: int) -> Row:
    tally, phases = Tally(lab.reference(devices)), Counter[str]()
    starting, training = lab.life(devices)
    # One in each of as many equal parts of a life, in random order.
    shares = [(part + lab.rng.random()) / times for part in range(times)]
    lab.rng.shuffle(shares)
    orphans: list[float] = []
    killed = 0
    while shares:
        run, before = lab.training("kill-9", devices), killed
        for _ in range(KILLS_OF_A_RUN):
            if not shares:
                break
            moment = shares[-1] * (starting + (1 - run.progress()) * training)
            with run.started() as start:
                if not start.wait_for(_until(start.began + moment)):
                    shares[-1] *= 0.95  # it came to its end before: a little earlier on the next run
                    break
                everything = devices > 1 or killed % 2 == 1
                if everything:
                    start.kill_all()
                else:
                    os.kill(start.process.pid, signal.SIGKILL)
                start.wait()
                since = time.monotonic()
                _require(not start.wait_until_all_ended(ORPHAN_S), "a process of a killed run stays")
                if not everything:
                    orphans.append(time.monotonic() - since)
            shares.pop()
            killed += 1
            phases[run.phase(start)] += 1
            lab.say(f"kill {killed} of {times}: {moment:.1f} s after the start, in {run.phase(start)}")
        if killed > before:
            run.finish()
            tally.add(run)
    hit = ", ".join(f"{phases[phase]} {where}" for phase, where in PHASES.items() if phases[phase])
    notes = [f"Where it hit: {hit}.", *tally.notes()]
    if orphans:
        notes.append(
            "Every second kill took the training process alone, the others W&B's helper process too. Left alone, that "
            f"ended within {max(orphans):.1f} s."
        )
    what = "the process" if devices == 1 else "both of 2 ranks"
    name = "kill -9" if devices == 1 else "kill -9 of all ranks"
    return Row(name, f"SIGKILL to {what} at random times", times, tally.lost, [], tally.again, notes)


def _until(moment: float) -> Callable[[], bool]:
    return lambda: time.time() >= moment


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


@fault("kill-9-checkpoint")
def kill_9_in_a_write(lab: Lab) -> Iterator[Row]:
    """SIGKILL while a checkpoint is half written."""
    times = lab.times(10)
    tally, killed, missed, halves = Tally(lab.reference()), 0, 0, Counter[str]()
    whole = (lab.reference().directory / "checkpoints" / "last.ckpt").stat().st_size
    shares: list[float] = []
    while killed < times:
        run = lab.training("kill-9-checkpoint")
        checkpoints = run.directory / "checkpoints"
        for _ in range(KILLS_OF_A_RUN):
            if killed == times:
                break
            with run.started() as start:
                # Not always the first write, which may be that of the very place where the start went on.
                if not start.wait_for(partial(_trained, run, start, lab.rng.randint(1, BATCHES))):
                    break
                written = partial(_half_written, checkpoints, start.process.pid, int(lab.rng.random() * whole))
                if not start.wait_for(written, every=0.0005):
                    break
                os.kill(start.process.pid, signal.SIGKILL)
                start.wait()
                left = _half_written(checkpoints, start.process.pid)
            if not left:
                missed += 1  # renamed just before
                continue
            killed += 1
            halves[left[0].name.split(".")[1]] += 1
            shares.append(left[0].stat().st_size / whole)
            lab.say(f"kill {killed} of {times}: {left[0].name} has {shares[-1]:.0%} of its bytes")
        run.finish()
        _require(not _half_written(checkpoints), f"half a checkpoint stays in {checkpoints}")
        tally.add(run)
    of = " and ".join(f"{count} of {name}.ckpt" for name, count in halves.most_common())
    notes = [
        f"Half-written were {of}, with {min(shares):.0%} to {max(shares):.0%} of their bytes (median "
        f"{median(shares):.0%}); the next start deletes such a file. {missed} more kills came just after a write.",
        *tally.notes(),
    ]
    injected = "SIGKILL when the temporary file has a random share of its bytes; counted if it is there afterwards"
    yield Row("kill -9 in the middle of a checkpoint's write", injected, times, tally.lost, [], tally.again, notes)


def _trained(run: Training, start: Start, batches: int) -> bool:
    return len(run.since(start, "training")) >= batches


def _half_written(checkpoints: Path, process: int | str = "*", size: int = 0) -> list[Path]:
    """By one process, or by any that ever was, and with at least as many bytes."""
    found = []
    for file in checkpoints.glob(f".*.ckpt.{process}.tmp"):
        with suppress(FileNotFoundError):  # renamed in between
            if file.stat().st_size >= size:
                found.append(file)
    return found


@fault("torn-checkpoint")
def torn_checkpoint(lab: Lab) -> Iterator[Row]:
    """A last.ckpt that is cut off, empty, or has one flipped bit, after a kill."""
    times = lab.times(6)
    damages = (_truncate, _flip_a_bit, _empty)
    tally, detected, done = Tally(lab.reference()), list[float](), 0
    while done < times:
        run = lab.training("torn-checkpoint")
        checkpoints = run.directory / "checkpoints"
        for _ in range(3):
            with run.started() as start:
                if not start.wait_for(partial(_saved, run, start, 3)):  # so that both files are this start's
                    break
                start.kill_all()
            if done == times:
                break
            damages[done % len(damages)](checkpoints / "last.ckpt", lab.rng)
            done += 1
            _require(damage(checkpoints / "last.ckpt"), "the damage is none")
            with run.started() as start:
                words = f"{checkpoints / 'last.ckpt'} is damaged"
                _require(start.wait_to_say(words), f"no warning:\n{start.output}")
                detected.append(time.time() - start.began)
                lab.say(f"{done} of {times}: warned after {detected[-1]:.1f} s")
                start.wait_for(partial(_saved, run, start, 1))
        run.finish()
        tally.add(run)
    notes = ["previous.ckpt is used, and a warning names the damaged one.", *tally.notes()]
    injected = "last.ckpt cut off, one bit flipped, or empty, by turns, after a SIGKILL"
    yield Row("a torn or corrupt last.ckpt", injected, times, tally.lost, detected, tally.again, notes)


def _saved(run: Training, start: Start, times: int) -> bool:
    return len(run.since(start, "checkpoint")) >= times


def _truncate(file: Path, rng: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.truncate(int(rng.uniform(0.01, 0.99) * file.stat().st_size))


def _flip_a_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[int(rng.uniform(0.2, 0.8) * len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


# --- signals ---------------------------------------------------------------------------------------------------------

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75, "SIGUSR2": 75}


@fault("signals")
def signals(lab: Lab) -> Iterator[Row]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 at random times between the first batch and the end of training."""
    times, names = lab.times(8), list(CODES)
    tally, detected = Tally(lab.reference()), {name: list[float]() for name in names}
    sent = 0
    while sent < times:
        run = lab.training("signals")
        for _ in range(len(names)):
            name = names[sent % len(names)]
            with run.started() as start:
                began = start.wait_for(partial(run.since, start, "training"))
                rest = (1 - run.progress()) * lab.life()[1]
                end = time.time() + lab.rng.uniform(0, 0.4) * rest
                if not (began and start.wait_for(_until(end)) and run.phase(start) not in ("test", "end")):
                    break
                since = time.monotonic()
                start.process.send_signal(signal.Signals[name])
                code = start.wait(120)
                detected[name].append(time.monotonic() - since)
            _require(code == CODES[name], f"{name} ended with exit code {code}, not {CODES[name]}:\n{start.output}")
            sent += 1
            lab.say(f"{sent} of {times}: {name}, exit code {code} after {detected[name][-1]:.1f} s")
            if sent == times:
                break
        run.finish()
        tally.add(run)
    codes = ", ".join(f"{name} {code}" for name, code in CODES.items())
    everything = [seconds for each in detected.values() for seconds in each]
    notes = [f"Exit codes: {codes}. The times are from the signal to the exit, W&B's end included.", *tally.notes()]
    yield Row("a signal", f"{', '.join(CODES)} by turns", times, tally.lost, everything, tally.again, notes)


@fault("second-signal")
def second_signal(lab: Lab) -> Iterator[Row]:
    """A SIGTERM, and before the process has ended a second one."""
    times, detected, ends = lab.times(2), list[float](), Counter[str]()
    tally = Tally(lab.reference())
    for number in range(times):
        run = lab.training("second-signal")
        with run.started() as start:
            run.wait_for_progress(start, lab.rng.uniform(0.1, 0.9))
            start.process.send_signal(signal.SIGTERM)
            time.sleep(1.1 if number % 2 else 0.3)
            since = time.monotonic()
            if start.running():
                start.process.send_signal(signal.SIGTERM)
            code = start.wait(120)
            detected.append(time.monotonic() - since)
            ends["killed by SIGTERM" if code == -signal.SIGTERM else f"exit code {code}"] += 1
            _require(code in (143, -signal.SIGTERM), f"exit code {code}:\n{start.output}")
            _require(not start.wait_until_all_ended(ORPHAN_S), "a process stays")
        lab.say(f"{number + 1} of {times}: {code} after {detected[-1]:.1f} s")
        run.finish()
        tally.add(run)
    said = ", ".join(f"{count} × {end}" for end, count in ends.items())
    notes = [f"Ends: {said}.", *tally.notes()]
    yield Row(
        "a second signal", "SIGTERM, and 0.3 s or 1.1 s later another", times, tally.lost, detected, tally.again, notes
    )


# --- ranks -----------------------------------------------------------------------------------------------------------


@fault("ranks")
def ranks(lab: Lab) -> Iterator[Row]:
    """One of two ranks is killed, or told to stop."""
    for rank, signum in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        yield _one_rank(lab, rank, signum)


def _one_rank(lab: Lab, rank: int, signum: signal.Signals) -> Row:
    times = lab.times(2)
    tally, detected, words, codes = Tally(lab.reference(2)), list[float](), list[str](), Counter[int]()
    for number in range(times):
        run = lab.training(f"rank-{rank}-{signum.name}", 2)
        with run.started() as start:
            share = lab.rng.uniform(0.02, 0.9)
            _require(run.wait_for_progress(start, share), f"it ended:\n{start.output}")
            pid = start.rank(rank)
            since = time.monotonic()
            os.kill(pid, signum)
            left = start.wait_until_all_ended(120)
            detected.append(time.monotonic() - since)
            _require(not left, f"{len(left)} processes stay, 120 s after {signum.name} to rank {rank}")
            codes[start.wait()] += 1
            words += _last_words(start.output)
        lab.say(f"{number + 1} of {times}: all had ended after {detected[-1]:.1f} s: {words[-1] if words else ''}")
        run.finish()
        tally.add(run)
    ends = ", ".join(f"{_end(code)}" for code in codes)
    notes = [
        f"The command ended with {ends}; the times are from the signal until no process was left, W&B's included.",
        *([f"Last words: “{max(words, key=len)}”"] if words else ["It said nothing."]),
        *tally.notes(),
    ]
    what = f"rank {rank} of 2 is killed" if signum == signal.SIGKILL else f"{signum.name} to rank {rank} of 2 alone"
    return Row(what, f"{signum.name} to its process at random times", times, tally.lost, detected, tally.again, notes)


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _last_words(output: str) -> list[str]:
    """Lines that say why a run ended, without its own folder and processes."""
    said = re.findall(
        r"^(?:error: |ERROR |INFO |\s*)((?:rank|local rank|A0-).*(?:lost|gone|killed|interrupted).*)$", output, re.M
    )
    lines = (re.sub(r" in /\S+:", " in its folder:", re.sub(r", epoch \d+ was best.*", "", line)) for line in said)
    return [re.sub(r"\. Everything is in \S+|\(on \S+\) ", "", line) for line in lines]


# --- disk ------------------------------------------------------------------------------------------------------------


@fault("disk-full")
def disk_full(lab: Lab) -> Iterator[Row]:
    """No space for checkpoints, from the second epoch on, for an epoch."""
    injected = "a ballast file fills the 96 MB file system of the run's folder up to 1 MB, for an epoch"
    command = shutil.which("mount")
    if os.geteuid() != 0 or command is None:
        yield Row("disk full", injected, 0, "not measured: mounting a small file system needs root")
        return
    times, detected = lab.times(2), list[float]()
    tally, kept = Tally(lab.reference()), 0
    for number in range(times):
        place = lab.folder / f"small-{number}"
        place.mkdir()
        mounted = subprocess.run([command, "-t", "tmpfs", "-o", "size=96m", "none", place], check=False)
        if mounted.returncode != 0:
            yield Row("disk full", injected, 0, "not measured: mounting a small file system was refused")
            return
        try:
            run = Training(place / "run", lab.training("disk-full").overrides)
            with run.started() as start:
                run.wait_for_progress(start, 1 / EPOCHS)
                _fill(place, leave=1_000_000)
                since = time.monotonic()
                _require(start.wait_to_say("was not written"), f"no warning:\n{start.output}")
                detected.append(time.monotonic() - since)
                last = run.directory / "checkpoints" / "last.ckpt"
                kept += damage(last) is None
                run.wait_for_progress(start, 2.5 / EPOCHS)
                kept += damage(last) is None
                (place / "ballast").unlink()
                code = start.wait()
            _require(code == 0, f"the run ended with exit code {code}:\n{start.output}")
            tally.add(run)
            warning = re.search(r"WARNING the checkpoint \S+/(\S+ was not written.*)", start.output)
            lab.say(f"{number + 1} of {times}: warned {detected[-1]:.1f} s after the disk was full")
        finally:
            subprocess.run(["umount", place], check=True)
    notes = [
        f"The run went on to its end; last.ckpt was whole at {kept} of {2 * times} looks while the disk was full.",
        *([f"Warned: “the checkpoint {warning[1]}”"] if warning else []),
        "The time is until the next checkpoint is due.",
        tally.notes()[1],
    ]
    yield Row("disk full while checkpointing", injected, times, tally.lost, detected, [], notes)


def _fill(place: Path, leave: int) -> None:
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with (place / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


# --- W&B -------------------------------------------------------------------------------------------------------------


@fault("wandb")
def wandb_away(lab: Lab) -> Iterator[Row]:
    """A W&B server (a stand-in on the loopback interface) that is not there at the start, or goes away."""
    yield _wandb_away(lab, "W&B unreachable at the start", "the server is there only after the run", 0.0, None)
    yield _wandb_away(lab, "W&B unreachable from the middle on", "the server goes in the middle of training", 0.4, None)
    yield _wandb_away(lab, "W&B unreachable for a while", "the server goes in the training and comes back", 0.3, 0.6)


def _wandb_away(lab: Lab, name: str, injected: str, leaves: float, returns: float | None) -> Row:
    from support.wandb_server import WandbServer

    times = lab.times(1)
    tally, detected, notes = Tally(lab.reference()), list[float](), list[str]()
    missing = repeated = 0
    for number in range(times):
        run = lab.training("wandb", 1, "wandb_offline", "logger.wandb.mode=online")
        with WandbServer() as server:
            run.environment = {
                **server.environment(lab.folder / f"client-{run.directory.name}"),
                "WANDB_SILENT": "false",
            }
            run.environment["WANDB_FINISH_TIMEOUT"] = "20"
            del run.environment["WANDB_DIR"]
            if leaves == 0.0:
                server.stop()
            with run.started() as start:
                if leaves == 0.0:
                    words = "W&B does not answer"
                    _require(start.wait_to_say(words), f"no warning:\n{start.output}")
                    detected.append(time.time() - start.began)
                else:
                    run.wait_for_progress(start, leaves)
                    server.stop()
                if returns is not None:
                    run.wait_for_progress(start, returns)
                    server.come_back()
                code = start.wait()
                _require(code == 0, f"the run ended with exit code {code}:\n{start.output}")
            tally.add(run, with_wandb=False)
            if returns is None:
                server.come_back()
                then = re.findall(r"Once it answers, (.*)", start.output)
                _require(then, f"the run does not say how the rest is sent:\n{start.output[-2000:]}")
                _deliver(then[-1], run)
                notes = ["Sent afterwards with the command that the run names, `" + then[-1].split(" /")[0] + " …`."]
            held = server.run().history
            expected, found = wandb_rows(lab.reference().directory), of_steps(held)
            missing += len(expected.keys() - found.keys())
            repeated += sum(len(of_steps([row])) for row in held) - len(found)
            wrong = [key for key, value in expected.items() if key in found and repr(found[key]) != repr(value)]
            tally.wrong += [f"W&B: {metric} at step {step}" for step, metric in wrong]
            lab.say(f"{number + 1} of {times}: {len(found)} of {len(expected)} values on the server")
    values = times * len(wandb_rows(lab.reference().directory))
    notes.append(f"The server has {values - missing} of {values} values in the end, {repeated} of them twice.")
    if detected:
        notes.append("The time is from the command to the warning: imports, and the 30 s of WANDB_INIT_TIMEOUT.")
    lost = tally.lost if not missing else f"**{missing} of {values} values on W&B**; of the run {tally.lost}"
    return Row(name, injected, times, lost, detected, [], notes)


def _deliver(command: str, run: Training) -> None:
    arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
    paths = os.pathsep.join([str(ROOT / "src"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **run.environment, "PYTHONPATH": str(ROOT / "src"), "PATH": paths}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    _require(done.returncode == 0, f"{command} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


# --- numbers that are none -------------------------------------------------------------------------------------------


@fault("nan")
def nan(lab: Lab) -> Iterator[Row]:
    """Images that are no numbers: the run stops, and goes on with them put right; or leaves the step out."""
    yield _poisoned(lab, 1, 0, "nan")
    yield _poisoned(lab, 1, 0, "inf")
    yield _poisoned(lab, 2, 1, "nan")
    yield _skipped(lab)


def _poisoned(lab: Lab, devices: int, rank: int, value: str) -> Row:
    times = lab.times(2)
    tally, detected, ended, said = Tally(lab.reference(devices)), list[float](), list[float](), ""
    for number in range(times):
        step = lab.rng.randrange(1, EPOCHS * BATCHES)
        run = lab.training("nan", devices)
        run.environment = {POISON: json.dumps({"step": step, "rank": rank, "value": value})}
        with run.started() as start:
            code = start.wait()
            end = time.time()
            _require(not start.wait_until_all_ended(ORPHAN_S), "a process stays")
        report = run.directory / f"nonfinite_step_{step}.json"
        _require(code == 1 and report.exists(), f"exit code {code}, and no {report.name}:\n{start.output[-3000:]}")
        fed = next(
            e.time for e in run.since(start) if (e.what, e.epoch, e.batch) == ("training", *divmod(step, BATCHES))
        )
        detected.append(report.stat().st_mtime - fed)
        ended.append(end - fed)
        named = [
            r["rank"]
            for r in json.loads(report.read_text())["ranks"]
            for b in r["batches"]
            if isinstance(b["loss"], str)
        ]
        _require(named == [rank], f"it names ranks {named}, not {rank}")
        said = next(iter(re.findall(r"(the loss is not finite .*?)\. (?:All records|\d+ steps)", start.output)), said)
        lab.say(f"{number + 1} of {times}: named after {detected[-1]:.2f} s, ended after {ended[-1]:.1f} s")
        run.environment = {}
        run.finish()
        tally.add(run)
    notes = [
        f"The step itself is named, in {times} of {times}; all processes had ended {max(ended):.1f} s after the batch.",
        f"It says: “{said}”" if said else "",
        "The same command without the cause goes on from the last good checkpoint.",
        *tally.notes(),
    ]
    what = ("loss NaN" if value == "nan" else "loss NaN, of infinite images") + (
        f", on rank {rank} of 2" if devices > 1 else ""
    )
    injected = f"images of a random step are {'NaN' if value == 'nan' else 'infinite'}"
    return Row(what, injected, times, tally.lost, detected, tally.again, [note for note in notes if note])


def _skipped(lab: Lab) -> Row:
    times = lab.times(2)
    finished = 0
    for number in range(times):
        step, length = lab.rng.randrange(1, EPOCHS * BATCHES - 3), lab.rng.randint(1, 3)
        run = lab.training("nan-skip", 1, "wandb_offline", "callbacks.guard.on_nonfinite=skip", _poison(step, length))
        start = run.finish()
        counted = run.record()["metrics"]["train/skipped_steps"]
        finished += counted == length and start.output.count("The step is left out") == length
        lab.say(f"{number + 1} of {times}: {counted:.0f} of {length} steps left out")
    lost = f"the poisoned steps alone ({finished} of {times} runs finished, with 1 to 3 left out and counted)"
    injected = "the same, with callbacks.guard.on_nonfinite=skip"
    return Row("loss NaN, skipped", injected, times, lost if finished == times else f"**{lost}**")


def _poison(step: int, times: int) -> str:
    return f"+callbacks.poison={{_target_:support.faults.Poison,step:{step},times:{times}}}"


# --- data files ------------------------------------------------------------------------------------------------------


@fault("bad-data")
def bad_data(lab: Lab) -> Iterator[Row]:
    """A corrupt JPEG among the images, and damaged .beton files."""
    from repvgg.data.verify import read_records

    lab.reference()
    times = lab.times(3)
    photos = _photos(lab)
    yield _refused(
        lab,
        "a corrupt JPEG",
        "the second half of one of 300 images is cut off",
        times,
        lambda n: _corrupt_jpeg(lab, photos, n),
    )

    def damaged(number: int, how: str) -> Path:
        directory = lab.folder / f"{how}-{number}"
        shutil.copytree(lab.folder / "digits", directory)
        file = directory / "train.beton"
        if how == "truncated":
            _truncate(file, lab.rng)
        else:
            records = read_records(file)
            record = lab.rng.randrange(len(records))
            with file.open("r+b") as opened:
                opened.seek(int(records.images["data_ptr"][record]) + int(records.sizes[record]) // 2)
                middle = opened.read(1)
                opened.seek(-1, os.SEEK_CUR)
                opened.write(bytes([middle[0] ^ 0x10]))
        return directory

    def train(number: int) -> tuple[list[str], str]:
        options = ["data=folder", "data.resolution=32", "model=repvgg_a0", "trainer=cpu", "recipe=quick", "logger=csv"]
        directory = damaged(number, "truncated")
        place = f"hydra.run.dir={lab.folder / f'truncated-run-{number}'}"
        return ["src/train.py", *options, f"data.dir={directory}", place], "train.beton"

    def verify(number: int) -> tuple[list[str], str]:
        directory = damaged(number, "flipped")
        return ["src/write_dataset.py", "--verify", "data=folder", f"data.dir={directory}"], "train.beton"

    yield _refused(lab, "a truncated .beton", "train.py on a file that is cut off at a random byte", times, train)
    yield _refused(lab, "one flipped bit in a .beton", "write_dataset.py --verify on it", times, verify)


def _refused(lab: Lab, name: str, injected: str, times: int, bad: Callable[[int], tuple[list[str], str]]) -> Row:
    """Commands that must end with exit code 2, naming what is bad."""
    detected, said = list[float](), ""
    for number in range(times):
        command, named = bad(number)
        start = Start(command, lab.folder / "bad-data.log")
        try:
            code = start.wait()
            detected.append(time.time() - start.began)
        finally:
            start.kill_all()
        _require(code == 2 and named in start.output, f"exit code {code}, {named} not named:\n{start.output[-2000:]}")
        _require("Traceback" not in start.output, start.output[-3000:])
        said = next(line for line in start.output.splitlines() if line.startswith("error: ") and named in line)
    said = re.sub(r"/\S+/", "…/", said.removeprefix("error: "))
    lab.say(f"{name}: found {times} of {times} times, {max(detected):.1f} s at most")
    notes = [f"Exit code 2: “{said}”"]
    return Row(name, injected, times, f"nothing is trained or written ({times} of {times} named)", detected, [], notes)


def _photos(lab: Lab, count: int = 300) -> Path:
    """Class folders of photographs, larger than what is stored, so that writing them takes a while."""
    directory = lab.folder / "photos"
    if not directory.exists():
        from support.images import photo_folder

        originals = photo_folder(lab.folder / "originals", 2, 5, (1000, 750), seed=lab.seed)
        for folder in originals.iterdir():
            (directory / folder.name).mkdir(parents=True)
            files = sorted(folder.iterdir())
            for number in range(count // 2):
                os.link(files[number % len(files)], directory / folder.name / f"{number:04}.jpg")
    return directory


def _writing(images: Path, target: Path) -> list[str]:
    return [
        *("src/write_dataset.py", "data=folder", "splits=[train]", "num_workers=2"),
        *(f"data.dir={target}", f"source.train={images}"),
    ]


def _corrupt_jpeg(lab: Lab, photos: Path, number: int) -> tuple[list[str], str]:
    images = lab.folder / f"corrupt-{number}"
    shutil.copytree(photos, images, copy_function=os.link)
    bad = lab.rng.choice(sorted(images.glob("*/*.jpg")))
    content = bad.read_bytes()
    bad.unlink()  # a link to what others are
    bad.write_bytes(content[: len(content) // 2])
    return _writing(images, lab.folder / f"corrupt-out-{number}"), bad.name


@fault("kill-9-writer")
def kill_9_writer(lab: Lab) -> Iterator[Row]:
    """SIGKILL to `write_dataset.py`, and the same command again."""
    times = lab.times(12)
    photos, log = _photos(lab), lab.folder / "writer.log"
    whole = lab.folder / "whole"
    start = Start(_writing(photos, whole), log)
    try:
        _require(start.wait() == 0, start.output)
        life = time.time() - start.began
    finally:
        start.kill_all()
    shares = [(part + lab.rng.random()) / times for part in range(times)]
    lab.rng.shuffle(shares)
    files = equal = 0
    orphans = list[float]()
    while shares:
        target = lab.folder / f"killed-{files}"
        before = len(orphans)
        for _ in range(min(KILLS_OF_A_RUN, len(shares))):
            start = Start(_writing(photos, target), log)
            try:
                if not start.wait_for(_until(start.began + shares[-1] * life)):
                    shares[-1] *= 0.95
                    break
                shares.pop()
                os.kill(start.process.pid, signal.SIGKILL)
                start.wait()
                since = time.monotonic()
                _require(not start.wait_until_all_ended(ORPHAN_S), "a worker of a killed writer stays")
                orphans.append(time.monotonic() - since)
                lab.say(f"kill {len(orphans)} of {times}")
            finally:
                start.kill_all()
        if len(orphans) == before:
            shutil.rmtree(target)
            continue
        start = Start(_writing(photos, target), log)
        try:
            _require(start.wait() == 0, start.output)
        finally:
            start.kill_all()
        files += 1
        equal += all(_hash(whole / name) == _hash(target / name) for name in ("train.beton", "train.beton.json"))
    lost = f"nothing ({equal} of {files} files byte for byte equal)"
    notes = [f"Left alone, the writer's workers ended within {max(orphans):.1f} s."]
    injected = "SIGKILL to write_dataset.py (2 workers, 300 images) at random times, up to 5 times a file"
    yield Row(
        "kill -9 in the middle of writing a .beton",
        injected,
        times,
        lost if equal == files else f"**{lost}**",
        [],
        [],
        notes,
    )


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- what tests inject -----------------------------------------------------------------------------------------------


#: Of the tests in tests/cluster, those in which something is done to a run.
OF_FAULTS = "cut or not_there or cancelled or too_long or signalled or stopped or fails"


@fault("cluster")
def cluster(lab: Lab) -> Iterator[Row]:
    """Slurm and two hosts: tests in tests/cluster, one row each."""
    report = lab.folder / "cluster.xml"
    arguments = ["-m", "pytest", "tests/cluster", "-k", OF_FAULTS, f"--junitxml={report}"]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False, stdout=sys.stderr)
    for case in ET.parse(report).getroot().iter("testcase"):
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        lost = "the test passed"
        if outcomes:
            kind = "not measured" if outcomes[0].tag == "skipped" else f"**{outcomes[0].tag}**"
            lost = f"{kind}: {outcomes[0].get('message', '').partition(chr(10))[0]}"
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        file = case.get("classname", "").replace(".", "/")
        notes = [f"The test, with all its starts, took {float(case.get('time', 0)):.0f} s."]
        yield Row(name, f"see {file}.py", 1, lost, [], [], notes)


# --- the page --------------------------------------------------------------------------------------------------------


def machine() -> str:
    """What the times depend on."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pytorch-lightning", "wandb", "ffcv"))
    cores = len(os.sched_getaffinity(0))
    return f"{device_name(torch.device('cpu'))}, {cores} cores, Python {platform.python_version()}, {versions}"


def commit() -> str:
    """What ran."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def seconds(times: list[float]) -> str:
    """Median and largest."""
    if not times:
        return ""
    return f"{times[0]:.1f}" if len(times) == 1 else f"{median(times):.1f} (≤ {max(times):.1f})"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| fault | injected | times | lost | detected [s] | trains again [s] |", "|---|---|--:|---|--:|--:|"]
    for row in rows:
        cells = (row.fault, row.injected, str(row.times), row.lost, seconds(row.detected), seconds(row.again))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


PAGE = """# What a run loses, measured

`python experiments/reliability.py --output experiments/reliability.md`

Each fault is done to real `python src/train.py` processes: {epochs} epochs of {batches} batches of a narrow RepVGG-A0
on the embedded digits, with EMA, mixup and RandAugment, logging every step, and a checkpoint every 1.2 s besides those
at validations. Then the same command is given again until the run is finished. *Nothing lost* means that the run is
equal to one that was not disturbed, bit for bit: weights, momenta, averaged weights, random numbers, schedule and
metrics in `last.ckpt`, all of `best.ckpt`, the metrics of `result.json`, `health.csv`, and every one of the {values}
values that were logged at a step, each there once after merging the files of all starts. Measured times (`bench/*`,
`perf/*`, `reparam/convert_s`) are not compared.

{machine}.

Seed {seed}. Commits: {commits}.

Seconds are medians, with the largest in brackets, and hold for this machine alone, whose load average was {load}
(these processes, and whatever else it had to do). *Detected* is from the fault to what the notes say; *trains again* is
from typing the command to the first batch, imports included.

{table}

{notes}
"""


def page(rows: list[Row], seed: int, values: int) -> str:
    """The whole page."""
    parts = []
    for row in rows:
        command = f"`{row.command}`\n\n" if row.command else ""
        notes = "\n".join(f"- {note}" for note in row.notes)
        parts.append(f"**{row.fault}**: {command}{notes}".rstrip())
    commits = ", ".join(sorted({row.commit for row in rows}))
    return PAGE.format(
        epochs=EPOCHS,
        batches=BATCHES,
        values=values,
        machine=machine(),
        seed=seed,
        commits=commits,
        load=f"{min(row.load for row in rows):.1f} to {max(row.load for row in rows):.1f} meanwhile",
        table=table(rows),
        notes="\n\n".join(parts),
    )


def merged(earlier: list[Row], new: list[Row]) -> list[Row]:
    """New rows take the place of earlier ones of the same command; the order is that of `FAULTS`."""
    done = {_name(row) for row in new}
    rows = [row for row in earlier if _name(row) not in done] + new
    return sorted(rows, key=lambda row: list(FAULTS).index(_name(row)))


def _name(row: Row) -> str:
    """On the command line: `python experiments/reliability.py NAME`."""
    return row.command.split()[2]


@contextmanager
def folder(given: Path | None) -> Iterator[Path]:
    """Where the runs are: one that is asked for stays."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="reliability-") as temporary:
        yield Path(temporary)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    faults = "\n".join(f"  {name:18} {(function.__doc__ or '').splitlines()[0]}" for name, function in FAULTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"faults:\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="one or several of those below (default: all)")
    parser.add_argument("--times", type=int, help="how often each (default: as often as on the page)")
    parser.add_argument("--seed", type=int, default=0, help="of the random times and places (default: 0)")
    parser.add_argument("--folder", type=Path, help="keep the runs there (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the page there, and its numbers into a .json beside it")
    given = parser.parse_args()
    unknown = [name for name in given.faults if name not in FAULTS]
    if unknown:
        parser.error(f"there is no fault {', '.join(unknown)}; choose from {', '.join(FAULTS)}")
    if given.times is not None and given.times < 1:
        parser.error(f"--times {given.times} must be at least 1")
    return given


def main() -> int:
    """Do what was asked for, and print the table."""
    given = arguments()
    rows: list[Row] = []
    failures: list[str] = []
    with folder(given.folder) as place:
        lab = Lab(place, given.seed, given.times)
        for name in given.faults or [name for name in FAULTS if name != "cluster"]:
            print(f"{name}: {(FAULTS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
            lab.begin(name)
            began = time.monotonic()
            try:
                for row in FAULTS[name](lab):
                    times = f" --times {given.times}" if given.times else ""
                    row.command = f"python experiments/reliability.py {name}{times}"
                    row.commit, row.load = commit(), os.getloadavg()[0]
                    rows.append(row)
            except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
                failures.append(f"{name}: {error}")
                print(f"  failed: {error}", file=sys.stderr, flush=True)
            print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if given.output is not None and rows:
                _write(given.output, rows, given.seed, lab.values())
    print(table(rows))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures or any("**" in row.lost for row in rows) else 0


def _write(output: Path, rows: list[Row], seed: int, values: int) -> None:
    """The page and its numbers; rows of faults that were not asked for stay."""
    numbers = output.with_suffix(".json")
    earlier = json.loads(numbers.read_text()) if numbers.exists() else {"rows": [], "values": 0}
    rows = merged([Row(**row) for row in earlier["rows"]], rows)
    values = values or earlier["values"]
    with replacing(numbers) as file:
        content = {"seed": seed, "values": values, "rows": [asdict(row) for row in rows]}
        file.write(f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())
    with replacing(output) as file:
        file.write(page(rows, seed, values).encode())


if __name__ == "__main__":
    sys.exit(main())
