"""The pictures of a comparison, as matplotlib figures in the style of `repvgg.report.picture`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from repvgg.report import table
from repvgg.report.compare import Comparison, Group
from repvgg.report.picture import DEPLOY, GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = "#E3E6E9"
SEEDS = "#7FB3D8"
PAPER = "#D55E00"
WIDTH = 10.0


def charts(comparison: Comparison) -> dict[str, tuple[Figure, str]]:
    """By file name: the figure, and what it shows in words. What no run measured has no picture."""
    drawn = {
        "top1": (_top1(comparison), _top1_words(comparison)),
    }
    return {name: (figure, words) for name, (figure, words) in drawn.items() if figure is not None}


def save(figure: Figure, kind: str, name: str) -> bytes:
    """An SVG or a PNG: the same bytes for the same figure, on one machine."""
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return out.getvalue()


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


# --- top-1 and its differences ------------------------------------------------------------------------------------


def _top1(comparison: Comparison) -> Figure:
    """Every seed's top-1 on the left; on the right the differences to the reference, seed by seed."""
    import matplotlib as mpl

    groups = comparison.groups
    with_differences = any(group.difference is not None for group in groups)
    with mpl.rc_context(STYLE):
        figure = _figure(1.7 + 0.42 * len(groups))
        panels = figure.subplots(1, 1 + with_differences, squeeze=False, sharey=True)[0]
        _draw_top1(panels[0], comparison)
        if with_differences:
            _draw_differences(panels[1], comparison)
        panels[0].set_ylim(len(groups) - 0.4, -0.6)
        panels[0].set_yticks(range(len(groups)), [group.label for group in groups])
        for axes in panels:
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color=GRID)
            axes.set_axisbelow(True)
        return figure


def _draw_top1(axes: Any, comparison: Comparison) -> None:
    for row, group in enumerate(comparison.groups):
        values = group.values[comparison.form].dropna()
        spread = group.spread(comparison.form)
        if spread is None:
            continue
        axes.plot(values, _jitter(row, len(values)), "o", ms=4.5, color=SEEDS, mew=0)
        axes.errorbar(spread.mean, row, xerr=spread.sd, fmt="o", ms=7, color=DEPLOY, elinewidth=2, capsize=0)
    axes.set(title=_form(comparison), xlabel="top-1 [%], mean ± standard deviation")
    _at_least(axes, 1.0, highest=100.2)


def _draw_differences(axes: Any, comparison: Comparison) -> None:
    base = next((g for g in comparison.groups if g.is_reference), None)
    for row, group in enumerate(comparison.groups):
        d = group.difference
        if group.is_reference:
            axes.annotate("reference", (0, row), xytext=(6, 0), textcoords="offset points", va="center", color=GREY)
        if d is None:
            continue
        axes.plot([*d.by_seed.values()], _jitter(row, len(d.by_seed)), "o", ms=4.5, color=SEEDS, mew=0)
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [row, row], color=DEPLOY, lw=2, solid_capstyle="butt")
        axes.plot(d.mean, row, "o", ms=7, color=DEPLOY if d.excludes_zero else "white", mec=DEPLOY, mew=1.8)
        theirs = paper_difference(comparison, group, base)
        if theirs is not None:
            axes.plot(theirs, row, "D", ms=6, mfc="none", mec=PAPER, mew=1.5)
    axes.axvline(0, color=GREY, lw=1)
    axes.set(title=f"Difference to {comparison.reference}", xlabel="percentage points, 95 % interval of paired seeds")
    _at_least(axes, 0.5)


def paper_difference(comparison: Comparison, group: Group, base: Group | None) -> float | None:
    """What the paper has for this difference, in percentage points."""
    if base is None or group.is_reference:
        return None
    theirs = comparison.paper.number(group.runs[0], "top1")
    reference = comparison.paper.number(base.runs[0], "top1")
    return None if theirs is None or reference is None else 100 * (theirs - reference)


def _top1_words(comparison: Comparison) -> str:
    return (
        "Small dots are seeds, large ones means. Left, bars are one standard deviation; right, 95 % intervals, and a "
        "filled dot where the interval leaves out zero. Orange diamonds: the paper."
    )


def _form(comparison: Comparison) -> str:
    return "Deploy form" if comparison.form == table.TOP1_DEPLOY else "Train form"


def _jitter(row: int, n: int) -> list[float]:
    """Under the row's line, one below the other: seeds with one value stay apart."""
    return [row + 0.18 + 0.16 * i / max(1, n - 1) for i in range(n)]


def _at_least(axes: Any, width: float, highest: float | None = None) -> None:
    """Closer up, the noise of a few runs would look like a result."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max(width, high - low) / 2
    if highest is not None:
        middle = min(middle, highest - half)
    axes.set_xlim(middle - half, middle + half)
    axes.xaxis.set_major_locator(MaxNLocator(6))
