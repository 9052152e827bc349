"""A benchmark as a W&B run of job type ``bench``: its conditions, its table, its picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from repvgg.bench.page import Page
from repvgg.bench.rounds import Result


@contextmanager
def tracked(out: Path | None, name: str, config: Mapping[str, Any]) -> Iterator[Callable[[Page, Path], None]]:
    """A run that begins before anything is measured, and takes the page and the picture at the end.

    Args:
        out: directory of the files; None for no run.
        name: the benchmark's.
        config: command, machine, versions, protocol.

    Raises:
        ValueError: W&B refuses.
    """
    if out is None:
        yield lambda page, picture: None
        return
    from repvgg.learn.logging import RunLogger
    from repvgg.learn.run import code

    out.mkdir(parents=True, exist_ok=True)
    logger = RunLogger(
        mode=cast(Any, os.environ.get("WANDB_MODE", "online")),
        project="repvgg",
        save_dir=str(out),
        name=f"bench-{name}",
        job_type="bench",
    )
    logger.log_hyperparams({**code(), **config})
    summary: dict[str, float] = {}

    def log(page: Page, picture: Path) -> None:
        rows = [_row(result) for result in page.results]
        logger.log_table(f"bench/{name}", columns=list(rows[0]), data=[list(row.values()) for row in rows])
        logger.log_image(f"bench/{name}/picture", [str(picture)])
        summary.update({_key(result): value for result in page.results for value in [_value(result)]})

    exit_code = 1
    try:
        yield log
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
        raise
    finally:
        logger.finish(summary, exit_code)


def _row(result: Result) -> dict[str, Any]:
    latency = result.latency
    row = {"model": result.line.model, "whose": result.line.side, **asdict(result.line.setting)}
    if result.batch:
        row |= {f"images_per_s/{name}": value for name, value in asdict(result.images_per_s).items()}
    row |= {f"call_s/{name}": value for name, value in asdict(latency).items()}
    return {**row, "call_s/p95": result.p95, "memory_bytes": result.memory}


def _key(result: Result) -> str:
    setting = [value for value in asdict(result.line.setting).values() if value]
    unit = "images_per_s" if result.batch else "seconds"
    return "/".join(["bench", result.line.model, result.line.side, *setting, unit])


def _value(result: Result) -> float:
    return result.images_per_s.median if result.batch else result.latency.median
