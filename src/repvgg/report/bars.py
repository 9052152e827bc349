"""A bar chart of measurements with their spread: one panel per comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repvgg.files import replacing
from repvgg.report.picture import DEPLOY, GREY, STYLE, TRAIN_FORM


@dataclass(frozen=True)
class Bar:
    """One line: the median is drawn, the smallest and largest value as a whisker; `ours` gets the strong colour."""

    label: str
    median: float
    smallest: float
    largest: float
    ours: bool = False


def write_bars(panels: Mapping[str, Sequence[Bar]], unit: str, path: Path) -> None:
    """Draw the panels side by side, on one scale, and write a PNG atomically."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        rows = max(map(len, panels.values()))
        figure = Figure(figsize=(6.5 * len(panels), 1.2 + 0.42 * rows), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for panel, (title, bars) in zip(axes, panels.items(), strict=True):
            spread = [[b.median - b.smallest for b in bars], [b.largest - b.median for b in bars]]
            panel.barh(
                [b.label for b in bars],
                [b.median for b in bars],
                color=[DEPLOY if b.ours else TRAIN_FORM for b in bars],
                xerr=spread,
                ecolor=GREY,
            )
            for row, bar in enumerate(bars):
                panel.annotate(
                    f"{bar.median:,.0f}", (bar.largest, row), xytext=(4, 0), textcoords="offset points", va="center"
                )
            panel.invert_yaxis()
            panel.margins(x=0.15)
            panel.set_title(title)
            panel.set_xlabel(unit)
        with replacing(path) as file:
            figure.savefig(file, format="png")
