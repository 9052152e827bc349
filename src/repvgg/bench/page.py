"""What was measured, as Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from repvgg.bench.lines import LAYOUTS, SETTING_FIELDS, Line, Setting
from repvgg.bench.rounds import Result, Spread
from repvgg.files import replacing
from repvgg.report.bars import Bar, write_bars

OURS = "ours"
MIB = 2**20


@dataclass(frozen=True)
class Page:
    """All that is said of a benchmark.

    Attributes:
        name: of the files, and the subcommand.
        title: of the page.
        record: command, machine, versions and protocol.
        conditions: the same as text.
        memory: what the column of memory means; empty where it was not measured.
        results: in the order of the tables.
        left_out: what is not in them, and why.
    """

    name: str
    title: str
    record: Mapping[str, Any]
    conditions: str
    memory: str
    results: Sequence[Result]
    left_out: Sequence[str]

    @property
    def text(self) -> str:
        """Markdown."""
        ours = [result for result in self.results if result.line.side == OURS]
        theirs = [result for result in self.results if result.line.side != OURS]
        parts = [f"# {self.title}", f"`{self.record['command']}`", self.conditions, lines_table(self.results)]
        if self.memory:
            parts.append(f"Memory: {self.memory}")
        if ours and theirs:
            parts += ["## Ours beside others", comparison(ours, theirs)]
        if self.left_out:
            parts += ["Left out:", "\n".join(f"- {reason}" for reason in self.left_out)]
        return "\n\n".join(parts)

    @property
    def content(self) -> dict[str, Any]:
        """For JSON: every single time."""
        lines = [
            {**_names(result.line), "batch": result.batch, "seconds": result.seconds, "memory_bytes": result.memory}
            for result in self.results
        ]
        ratios = [
            {**_names(other.line), "speed_of_ours": asdict(mine.speed_to(other)), "ours": asdict(mine.line.setting)}
            for other in self.results
            if other.line.side != OURS
            for mine in _of_ours(self.results, other.line)
        ]
        return {**self.record, "lines": lines, "ratios": ratios, "left_out": self.left_out}

    def draw(self, path: Path) -> None:
        """Bars of every line, a panel for each form."""
        panels: dict[str, list[Bar]] = {}
        for result in self.results:
            values, _ = _shown(result)
            panels.setdefault(result.line.setting.form.replace("_", " ") or self.title, []).append(
                Bar(self._label(result.line), *values, ours=result.line.side == OURS)
            )
        write_bars(panels, _shown(self.results[0])[1], path)

    def _label(self, line: Line) -> str:
        """What tells a line from the others of its panel."""
        names = [_names(result.line) for result in self.results]
        differing = [key for key in names[0] if key not in ("form", "model") and len({n[key] for n in names}) > 1]
        return " ".join([line.model, *(_names(line)[key] for key in differing)])

    def write(self, directory: Path) -> Path:
        """``NAME.json``, ``NAME.md`` and ``NAME.png``, each whole or not there; the picture's path."""
        directory.mkdir(parents=True, exist_ok=True)
        picture = directory / f"{self.name}.png"
        self.draw(picture)
        for suffix, content in ((".json", json.dumps(self.content, indent=1)), (".md", self.text)):
            with replacing(directory / f"{self.name}{suffix}") as file:
                file.write(f"{content}\n".encode())
        return picture


def _names(line: Line) -> dict[str, str]:
    return {"model": line.model, "side": line.side, **asdict(line.setting)}


def _shown(result: Result) -> tuple[tuple[float, float, float], str]:
    """The value of a bar with its spread, and its unit."""
    if result.batch:
        rate = result.images_per_s
        return (rate.median, rate.smallest, rate.largest), "images/s"
    time = Spread.of(result.round_seconds)
    return (1e3 * time.median, 1e3 * time.smallest, 1e3 * time.largest), "ms"


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(columns: Mapping[str, Sequence[str]], *, left: Sequence[str]) -> str:
    """Markdown of the columns that say anything; those in ``left`` are text, the others numbers."""
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rule = ["---" if name in left else "--:" for name in columns]
    rows = zip(*columns.values(), strict=True)
    return "\n".join([f"| {' | '.join(columns)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)])


NAMES = ("model", *SETTING_FIELDS, "whose", "reason")


def lines_table(results: Sequence[Result]) -> str:
    """A row for every line: images/s of the rounds, latency of all calls, memory."""
    names = [_names(result.line) for result in results]
    columns = {name: [row[name] for row in names] for name in ("model", *SETTING_FIELDS)}
    columns["whose"] = [row["side"] for row in names]
    columns["images/s"] = [_spread(result.images_per_s, _rate) if result.batch else "" for result in results]
    columns["call [ms]"] = [_spread(result.latency, _milliseconds) for result in results]
    columns["95 % [ms]"] = [_milliseconds(result.p95) for result in results]
    columns["memory [MiB]"] = ["" if r.memory is None else f"{r.memory / MIB:,.0f}" for r in results]
    return _table(columns, left=NAMES)


def comparison(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """A row for every line of the others, and what it says; above 1, ours is faster."""
    rows = []
    for other in theirs:
        same, default = (_find(ours, other.line, setting) for setting in _counterparts(other.line.setting))
        if same is not None or default is not None:
            rows.append((other, same, default))
    names = [_names(other.line) for other, _, _ in rows]
    columns = {name: [row[name] for row in names] for name in ("model", *SETTING_FIELDS)}
    columns["whose"] = [row["side"] for row in names]
    explained = "Each line of another implementation, and how many times as fast ours is, under the same conditions"
    columns["ours, same conditions [×]"] = [_ratio(same, other) for other, same, _ in rows]
    if any(default is not None and default is not same for _, same, default in rows):
        explained += ", and as it comes (eager, channels_last) at the same precision"
        columns["ours as it comes [×]"] = [_ratio(default, other) for other, _, default in rows]
    columns["memory, ours to theirs"] = [_memory(same, other) for other, same, _ in rows]
    columns["reason"] = [reason(other, [mine for mine in (same, default) if mine]) for other, same, default in rows]
    explained += ". Ratios are taken within a round: median (smallest … largest)."
    return f"{explained}\n\n{_table(columns, left=NAMES)}"


def reason(other: Result, ours: Sequence[Result]) -> str:
    """Why a ratio is below 1, as far as the numbers say it; the rest is for a reader to write in place of the dots."""
    below = [spread for mine in ours if (spread := mine.speed_to(other)).median < 1]
    if not below:
        return ""
    return "1.00 is within the spread" if all(spread.largest >= 1 for spread in below) else "…"


def _counterparts(setting: Setting) -> tuple[Setting, Setting]:
    """Of ours: under the same conditions, and as it comes at that precision."""
    if not setting.runtime:
        return setting, setting
    return setting, replace(setting, runtime="eager", layout=LAYOUTS[0])


def _find(results: Sequence[Result], line: Line, setting: Setting) -> Result | None:
    return next((r for r in results if r.line.model == line.model and r.line.setting == setting), None)


def _of_ours(results: Sequence[Result], line: Line) -> list[Result]:
    """The counterparts that were measured, each once."""
    ours = [result for result in results if result.line.side == OURS]
    found = [_find(ours, line, setting) for setting in dict.fromkeys(_counterparts(line.setting))]
    return [result for result in found if result is not None]


def _ratio(mine: Result | None, other: Result) -> str:
    return "" if mine is None else _spread(mine.speed_to(other), lambda value: f"{value:.2f}")


def _memory(mine: Result | None, other: Result) -> str:
    if mine is None or not mine.memory or not other.memory:
        return ""
    return f"{mine.memory / other.memory:.2f}"


def _spread(spread: Spread, shown: Callable[[float], str]) -> str:
    return f"{shown(spread.median)} ({shown(spread.smallest)} … {shown(spread.largest)})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"
