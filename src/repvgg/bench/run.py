"""From lines to results: variant by variant, every line of a variant in every round."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from repvgg.bench.lines import Line
from repvgg.bench.memory import NotMeasuredError, peak
from repvgg.bench.programs import Work
from repvgg.bench.rounds import Program, Result, measure


@dataclass(frozen=True)
class Protocol:
    """How lines are timed.

    Attributes:
        rounds: in which every line of a variant has one turn.
        warmup: calls at the beginning of a turn that are not timed.
        batches: timed calls of a turn.
        seed: of the order of the turns.
    """

    rounds: int
    warmup: int
    batches: int
    seed: int

    def __str__(self) -> str:
        return (
            f"warm-up calls {self.warmup} and timed calls {self.batches} at every turn; n = {self.rounds} round(s) in "
            f"which the lines of a variant take turns (order by seed {self.seed})"
        )


#: Of a variant, its lines' work, and what is left out and why; gets a directory for files.
Works = Callable[[str, Path], tuple[list[Work], list[str]]]


def compare(works: Works, models: Sequence[str], protocol: Protocol, *, memory: bool) -> tuple[list[Result], list[str]]:
    """Measure all lines of all variants; the results, and what was left out and why.

    Args:
        works: of a variant.
        models: variants.
        protocol: how.
        memory: measure it too.
    """
    results: list[Result] = []
    left_out: list[str] = []
    with Progress(console=Console(stderr=True)) as progress:
        for model in progress.track(models, description="variants"):
            with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
                of_model, missing = works(model, Path(scratch))
                left_out += _announced(missing, left_out, progress)
                measured, missing = _of_one_variant(of_model, protocol, memory, progress)
                left_out += _announced(missing, left_out, progress)
                results += measured
    return results, left_out


def _announced(reasons: Sequence[str], before: Sequence[str], progress: Progress) -> list[str]:
    """Those that are new, said on stderr at once."""
    new = [reason for reason in dict.fromkeys(reasons) if reason not in before]
    for reason in new:
        progress.console.print(f"left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    return new


def _of_one_variant(
    works: Sequence[Work], protocol: Protocol, memory: bool, progress: Progress
) -> tuple[list[Result], list[str]]:
    """The results of all lines, and why the memory of some is not known."""
    results = {work.line: Result(work.line, work.images_per_call) for work in works}
    missing = []
    task = progress.add_task("", total=len(works) * (1 + protocol.rounds + memory))
    programs: dict[Line, Program] = {}
    for work in works:
        progress.update(task, description=f"building {work.line}")
        with _fits(work):
            programs[work.line] = work.prepare()
        progress.advance(task)
    progress.update(task, description=f"{works[0].line.model if works else ''}, in turns")
    with _fits(*works):
        for line, seconds in measure(programs, **asdict(protocol)):
            results[line].seconds.append(seconds)
            progress.advance(task)
    programs.clear()
    for work in works if memory else ():
        progress.update(task, description=f"memory of {work.line}")
        try:
            results[work.line].memory = peak(work)
        except NotMeasuredError as error:
            missing.append(f"memory of {work.line}: {error}")
        progress.advance(task)
    progress.remove_task(task)
    return list(results.values()), missing


@contextmanager
def _fits(*works: Work) -> Iterator[None]:
    """An error of memory says what to do.

    Raises:
        ValueError: the lines do not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        which = str(works[0].line) if len(works) == 1 else f"the {len(works)} lines of {works[0].line.model}"
        conditions = works[0].conditions
        raise ValueError(
            f"{which}, with {conditions.batch} images of {conditions.resolution} px, do not fit into the memory of "
            f"{conditions.device}: lower --batch, or ask for fewer lines at once"
        ) from error
