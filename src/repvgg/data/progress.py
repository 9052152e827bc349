"""How far a long piece of work is: a bar where somebody looks on, a line per minute in a log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LINE_EVERY_S = 60.0

Advance = Callable[[int], None]


@contextmanager
def progress(what: str, total: int, *, done: int = 0, enabled: bool = True) -> Iterator[Advance]:
    """Yield a function that takes how many more images are done. The bar is on standard error."""
    began = last_line = time.monotonic()
    start = done
    name, rate_column = TextColumn("{task.description}"), TextColumn("{task.fields[rate]:.0f} images/s")
    bar = Progress(
        *(name, BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn(), TextColumn("left")),
        console=Console(stderr=True),
        disable=not (enabled and sys.stderr.isatty()),
    )
    task = bar.add_task(what, total=total, completed=done, rate=0.0)

    def advance(images: int) -> None:
        nonlocal done, last_line
        done += images
        now = time.monotonic()
        rate = (done - start) / max(now - began, 1e-3)
        bar.update(task, completed=done, rate=rate)
        if bar.disable and enabled and now - last_line >= LINE_EVERY_S:
            last_line = now
            left_s = (total - done) / max(rate, 1e-9)
            log.info("%s: %d of %d, %.0f images/s, %.0f min left", what, done, total, rate, left_s / 60)

    with bar:
        yield advance
