"""Lines that take turns, and what their times say."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from repvgg.bench.lines import Line, Setting


def _nothing() -> None:
    """What there is to let go of after most calls."""


@dataclass(frozen=True)
class Program:
    """What a line does when its turn comes.

    Attributes:
        call: does the work once, to its end.
        rest: lets go of what a call leaves behind only for the next one to drop.
    """

    call: Callable[[], object]
    rest: Callable[[], object] = _nothing


def visits(lines: Sequence[Line], turn: int, seed: int) -> list[Line]:
    """The order in which round ``turn`` visits ``lines`` (of one variant): every one once.

    Settings come in an order that is drawn for each round. Sides of one setting come right after one another, since
    they are compared; who is first moves on by one from round to round.
    """
    by_setting: dict[Setting, list[Line]] = {}
    for line in lines:
        by_setting.setdefault(line.setting, []).append(line)
    settings = list(by_setting)
    random.Random(f"{seed}/{turn}").shuffle(settings)
    order: list[Line] = []
    for setting in settings:
        sides = by_setting[setting]
        first = (turn + seed) % len(sides)
        order += sides[first:] + sides[:first]
    return order


def measure(
    programs: Mapping[Line, Program], *, rounds: int, warmup: int, batches: int, seed: int
) -> Iterator[tuple[Line, list[float]]]:
    """Of every visit, in the order of the visits, the seconds of each timed call.

    Args:
        rounds: in each of which every line is visited once.
        warmup: calls before the clock starts, at every visit.
        batches: timed calls of a visit.
        seed: of the order.
    """
    for turn in range(rounds):
        for line in visits(list(programs), turn, seed):
            call = programs[line].call
            for _ in range(warmup):
                call()
            times = []
            for _ in range(batches):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            yield line, times


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass
class Result:
    """What was measured of a line.

    Attributes:
        line: which.
        seconds: of every round, every timed call.
        batch: images per call; 0 where a call is not about images.
        memory: bytes above what is there at rest, None where it was not measured.
    """

    line: Line
    batch: int = 0
    seconds: list[list[float]] = field(default_factory=list)
    memory: int | None = None

    @property
    def round_seconds(self) -> list[float]:
        """The median of each round."""
        return [median(times) for times in self.seconds]

    @property
    def latency(self) -> Spread:
        """Of all calls, seconds."""
        return Spread.of([time for times in self.seconds for time in times])

    @property
    def p95(self) -> float:
        """What 95 % of all calls took at most, seconds."""
        return percentile_95([time for times in self.seconds for time in times])

    @property
    def images_per_s(self) -> Spread:
        """Of the rounds' medians."""
        return Spread.of([self.batch / seconds for seconds in self.round_seconds])

    def speed_to(self, other: Result) -> Spread:
        """How many times as fast as ``other`` it is, within a round: above 1 it is faster."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.round_seconds, other.round_seconds, strict=True)])


def percentile_95(values: Sequence[float]) -> float:
    """Interpolated between the values around it."""
    return values[0] if len(values) == 1 else quantiles(values, n=20, method="inclusive")[-1]
