"""Measured speeds of the variants beside the paper's (Tables 4 and 5): Markdown, rank agreement, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from repvgg.files import replacing
from repvgg.report.bars import Bar, write_bars
from repvgg.report.table import EXPERIMENTS

#: Ratios are to this one's deploy form.
REFERENCE = "repvgg_b0"


@dataclass(frozen=True)
class Speed:
    """Images per second of both forms of one variant, a value per round."""

    model: str
    train_form: Sequence[float]
    deploy: Sequence[float]

    @property
    def speedup(self) -> list[float]:
        """Deploy to train form, within a round."""
        return [deploy / train for train, deploy in zip(self.train_form, self.deploy, strict=True)]


def paper_speeds() -> dict[str, float]:
    """Images per second of the deploy form on the paper's 1080Ti, of Tables 4 and 5."""
    from omegaconf import OmegaConf

    paper: Any = OmegaConf.load(EXPERIMENTS / "table4.yaml").paper
    rows = {**paper.models, **paper.table5.models}
    return {str(model): float(numbers.images_per_s_deploy) for model, numbers in rows.items()}


def speed_table(speeds: Sequence[Speed], paper: Mapping[str, float]) -> str:
    """Markdown, a line per variant: medians over the rounds with the smallest and largest value."""
    reference = next((speed for speed in speeds if speed.model == REFERENCE), None)
    lines = [
        "| model | train form [images/s] | deploy [images/s] | speed-up [×] | deploy to B0's | paper [images/s] "
        "| paper, to B0's |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for speed in speeds:
        cells = [speed.model, *(_spread(values, _rate) for values in (speed.train_form, speed.deploy))]
        cells.append(_spread(speed.speedup, _ratio))
        if reference is None:
            cells.append("")
        else:
            cells.append(_ratio(median(a / b for a, b in zip(speed.deploy, reference.deploy, strict=True))))
        theirs = paper.get(speed.model)
        cells += ["", ""] if theirs is None else [_rate(theirs), _ratio(theirs / paper[REFERENCE])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rank_agreement(speeds: Sequence[Speed], paper: Mapping[str, float]) -> str:
    """Whether the variants have the paper's order: rank correlations of the deploy form's medians, one sentence."""
    from scipy import stats  # type: ignore[import-untyped]

    both = [(median(speed.deploy), paper[speed.model]) for speed in speeds if speed.model in paper]
    if len(both) < 2:
        return f"Order of the variants: {len(both)} of them in the paper, too few to compare."
    ours, theirs = zip(*both, strict=True)
    rho, tau = stats.spearmanr(ours, theirs).statistic, stats.kendalltau(ours, theirs).statistic
    return (
        f"Order of the variants by images/s of the deploy form, here and in the paper (1080Ti): Spearman's ρ = "
        f"{rho:.3f}, Kendall's τ = {tau:.3f}, n = {len(both)} variants."
    )


def page(command: str, conditions: str, speeds: Sequence[Speed]) -> str:
    """Markdown: the command, under which conditions it ran, the table, and whether the order is the paper's."""
    paper = paper_speeds()
    parts = [
        "# Speed of the variants, measured",
        f"`{command}`",
        f"{conditions}. Median (smallest … largest) of the rounds; networks are untrained.",
        speed_table(speeds, paper),
        rank_agreement(speeds, paper),
    ]
    return "\n\n".join(parts)


def write(directory: Path, speeds: Sequence[Speed], text: str, record: Mapping[str, Any]) -> None:
    """speed.md, speed.json and speed.png, each whole or not there."""
    directory.mkdir(parents=True, exist_ok=True)
    draw(speeds, directory / "speed.png")
    for name, content in (("speed.json", json.dumps(record, indent=1)), ("speed.md", text)):
        with replacing(directory / name) as file:
            file.write(f"{content}\n".encode())


def draw(speeds: Sequence[Speed], path: Path) -> None:
    """Bars of both forms, a panel each on one scale; written atomically."""
    panels = {
        title: [
            Bar(speed.model, median(values), min(values), max(values), ours=form == "deploy")
            for speed in speeds
            for values in [getattr(speed, form)]
        ]
        for form, title in (("train_form", "Train form"), ("deploy", "Deploy form"))
    }
    write_bars(panels, "images/s", path)


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"{shown(median(values))} ({shown(min(values))} … {shown(max(values))})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"
