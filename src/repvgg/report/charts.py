"""The pictures of a comparison, as matplotlib figures in the style of `repvgg.report.picture`."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repvgg.report import table
from repvgg.report.compare import UNEVEN, Comparison, Group
from repvgg.report.picture import COLOURS, DEPLOY, GREY, LINES, STYLE, TRAIN_FORM
from repvgg.report.runs import CURVES, LOSSES, SHARE, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

GRID = "#E3E6E9"
SEEDS = "#7FB3D8"
PAPER = "#D55E00"
WIDTH = 10.0
#: The block of the paper, before others in a legend.
KINDS = ("conv3x3", "conv1x1", "identity")


def charts(comparison: Comparison) -> dict[str, tuple[Figure, str]]:
    """By file name: the figure, and what it shows in words. What no run measured has no picture."""
    import matplotlib as mpl

    drawn = {}
    with mpl.rc_context(STYLE):
        for name, draw in (
            ("top1", _top1),
            ("speed", _speed),
            ("curves", _curves),
            ("losses", _losses),
            ("branches", _branches),
        ):
            made = draw(comparison)
            if made is not None:
                drawn[name] = made
    return drawn


def save(figure: Figure, name: str) -> dict[str, bytes]:
    """An SVG and a PNG: on one machine the same bytes for the same figure."""
    import matplotlib as mpl

    files = {}
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        out = io.BytesIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
            figure.savefig(out, format=kind, metadata=metadata)
        figure.set_layout_engine("none")  # it is laid out now, which takes longer than drawing
        files[kind] = out.getvalue()
    return files


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


# --- top-1 and its differences ------------------------------------------------------------------------------------


def _top1(comparison: Comparison) -> tuple[Figure, str] | None:
    """Every seed's top-1 on the left; on the right the differences to the reference, seed by seed; None of one run."""
    if len(comparison.runs) == 1:
        return None
    groups = comparison.groups
    with_differences = any(group.difference is not None for group in groups)
    figure = _figure(1.3 + 0.46 * len(groups))
    panels = figure.subplots(1, 1 + with_differences, squeeze=False, sharey=True)[0]
    _draw_top1(panels[0], comparison)
    if with_differences:
        _draw_differences(panels[1], comparison)
    panels[0].set_ylim(len(groups) - 0.35, -0.55)
    panels[0].set_yticks(range(len(groups)), [_wrapped(group.label) for group in groups])
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        for row in range(1, len(groups), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#F6F7F8", zorder=0, lw=0)
    words = "Top-1 of the runs: a small dot is a seed, a large one the mean, the bar one standard deviation (n − 1)."
    if with_differences:
        words += (
            f" Right: differences to {comparison.reference} of the same seeds, with the 95 % interval of the mean "
            "where there are two or more; the dot is filled where the interval leaves out 0."
        )
    if with_differences and any(_paper_differences(comparison)):
        words += f" Orange diamonds: the paper's {comparison.paper.name} ({comparison.paper.setting})."
    return figure, words


def _draw_top1(axes: Any, comparison: Comparison) -> None:
    for row, group in enumerate(comparison.groups):
        values = group.values[comparison.form].dropna()
        spread = group.spread(comparison.form)
        if spread is None:
            continue
        axes.plot(values, _below(row, len(values)), "o", ms=4.5, color=SEEDS, mew=0)
        axes.errorbar(spread.mean, row, xerr=spread.sd, fmt="o", ms=7, color=DEPLOY, elinewidth=2, capsize=0)
    axes.set(title=_form(comparison), xlabel="top-1 [%], mean ± standard deviation")
    _at_least(axes, 1.0, highest=100.2)


def _draw_differences(axes: Any, comparison: Comparison) -> None:
    for row, group in enumerate(comparison.groups):
        d = group.difference
        if group.is_reference:
            axes.annotate("reference", (0, row), xytext=(6, 0), textcoords="offset points", va="center", color=GREY)
        if d is None:
            continue
        axes.plot([*d.by_seed.values()], _below(row, len(d.by_seed)), "o", ms=4.5, color=SEEDS, mew=0)
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [row, row], color=DEPLOY, lw=2, solid_capstyle="butt")
        axes.plot(d.mean, row, "o", ms=7, color=DEPLOY if d.excludes_zero else "white", mec=DEPLOY, mew=1.8)
        theirs = paper_difference(comparison, group, comparison.base(group))
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


def _paper_differences(comparison: Comparison) -> list[float]:
    found = [paper_difference(comparison, group, comparison.base(group)) for group in comparison.groups]
    return [difference for difference in found if difference is not None]


def _form(comparison: Comparison) -> str:
    return "Deploy form" if comparison.form == table.TOP1_DEPLOY else "Train form"


def _below(row: int, n: int) -> list[float]:
    """Under the row's line, one lower than the other: seeds with one value stay apart."""
    return [row + 0.17 + 0.2 * i / max(1, n - 1) for i in range(n)]


def _wrapped(label: str) -> str:
    if len(label) <= 24:
        return label
    lines = label.replace(", ", ",\n", 1)
    return lines if len(lines) <= 70 else textwrap.fill(label, 34, max_lines=3, placeholder=" …")


def _at_least(axes: Any, width: float, highest: float | None = None) -> None:
    """Closer up, the noise of a few runs would look like a result."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max(width, high - low) / 2
    if highest is not None:
        middle = min(middle, highest - half)
    axes.set_xlim(middle - half, middle + half)
    axes.xaxis.set_major_locator(MaxNLocator(6))


# --- accuracy and speed -------------------------------------------------------------------------------------------


def _speed(comparison: Comparison) -> tuple[Figure, str] | None:
    """Top-1 over images/s of both forms; None where it was not measured, or not under one setting."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    settings = {table.bench_settings(run) for run in comparison.runs if "bench/deploy/images_per_s" in run.metrics}
    points: list[tuple[Group, dict[str, tuple[float, float]]]] = []
    for group in comparison.groups:
        both = {}
        for form, speed, top1 in (
            ("train", table.SPEED_TRAIN, table.TOP1_TRAIN),
            ("deploy", table.SPEED_DEPLOY, table.TOP1_DEPLOY),
        ):
            x, y = group.spread(speed), group.spread(top1)
            if x is not None and y is not None:
                both[form] = (x.mean, y.mean)
        if "deploy" in both:
            points.append((group, both))
    if not points or len(settings) > 1:
        return None
    figure = _figure(max(4.2, 1.6 + 0.24 * len(points)))
    axes = figure.subplots()
    every = [point for _, both in points for point in both.values()]
    front = pareto_front(every)
    even = (comparison.unevenness or 1) <= UNEVEN and len(points) > 1
    if even and len(front) > 1:
        axes.step(*zip(*front, strict=True), where="pre", color=DEPLOY, lw=1, ls=":", zorder=1)
    for _, both in points:
        if "train" in both:
            arrow = {"arrowstyle": "-|>", "color": TRAIN_FORM, "lw": 1.2, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", both["deploy"], both["train"], arrowprops=arrow, zorder=2)
            axes.plot(*both["train"], "o", ms=7, mfc="white", mec=TRAIN_FORM, mew=2, zorder=3)
        axes.plot(*both["deploy"], "o", ms=8, color=DEPLOY, zorder=4)
    axes.margins(x=0.06, y=0.12)
    _label_right(axes, [(_one_line(group.label), both["deploy"]) for group, both in points])
    speeds = [x for x, _ in every]
    if max(speeds) > 4 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    (setting,) = settings or {""}
    axes.set(xlabel="images/s" + (f" ({setting})" if setting else ""), ylabel="top-1 [%]")
    axes.set_title("Accuracy and speed of both forms")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    handles = [
        Line2D([], [], marker="o", ls="", mfc="white", mec=TRAIN_FORM, mew=2, ms=7, label="train form"),
        Line2D([], [], marker="o", ls="", color=DEPLOY, ms=8, label="deploy form"),
    ]
    if not any("train" in both for _, both in points):
        del handles[0]
    if even and len(front) > 1:
        handles.append(Line2D([], [], color=DEPLOY, lw=1, ls=":", label="Pareto front"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=11)
    means = "" if len(comparison.runs) == 1 else "Means over seeds. "
    words = f"{means}An arrow leads from a network as trained to the same network deployed"
    if len(points) == 1:
        return figure, f"{words}."
    if not even:
        return figure, f"{words}. The machine was not as fast at all times, so there is no Pareto front."
    return (
        figure,
        f"{words}; nothing that was measured is both faster and more accurate than a point of the Pareto front.",
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which none has more of both, by x: what is as good in one and worse in the other is not there."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _label_right(axes: Any, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Names beside the right edge in the order of the points, apart from one another, with a line to each."""
    low, high = axes.get_ylim()
    wanted = sorted((((y - low) / (high - low), name, (x, y)) for name, (x, y) in points), key=lambda item: item[:2])
    heights = spread_apart([height for height, _, _ in wanted], 1.0 / max(14, len(wanted)))
    for height, (_, name, point) in zip(heights, wanted, strict=True):
        axes.annotate(
            name,
            point,
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=11,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "relpos": (0, 0.5), "shrinkB": 5},
        )


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as possible (least squares) so that neighbours are at least `gap` apart.

    In [0, 1] if they fit there.
    """
    from scipy import optimize  # type: ignore[import-untyped]

    room = max(0.0, 1.0 - (len(heights) - 1) * gap)
    wanted = [height - i * gap for i, height in enumerate(heights)]
    moved = optimize.isotonic_regression(wanted).x
    return [min(max(float(height), 0.0), room) + i * gap for i, height in enumerate(moved)]


def _one_line(label: str) -> str:
    return label if len(label) <= 34 else f"{label[:31]}…"


# --- learning curves ----------------------------------------------------------------------------------------------


def _curves(comparison: Comparison) -> tuple[Figure, str] | None:
    """One panel per group with its seeds and the means of both forms, over the others' means."""
    figure = _learning(comparison, CURVES, "top-1 on validation [%]", 100)
    if figure is None:
        return None
    return (
        figure,
        "Top-1 on the validation images after every epoch, of both forms: where the thin line lies in the "
        "middle of the thick one, the forms score the same.",
    )


def _losses(comparison: Comparison) -> tuple[Figure, str] | None:
    """The same of the loss, with that of the training images."""
    figure = _learning(comparison, LOSSES[1:], "loss", 1, training=LOSSES[0])
    if figure is None:
        return None
    return (
        figure,
        "Loss on the validation images after every epoch, of both forms, and its mean over the epoch's training images "
        "as the recipe has them (augmentation, label smoothing, mixup).",
    )


def _learning(
    comparison: Comparison, forms: Sequence[str], label: str, factor: float, training: str | None = None
) -> Figure | None:
    """Panels of a metric of the train form and of the deploy form; the legend says what is drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = [*forms, *([] if training is None else [training])]
    means = [{name: factor * _mean_curve(group, name) for name in names} for group in comparison.groups]
    if all(curve.empty for curves in means for curve in curves.values()):
        return None
    train, deploy = forms
    several = any(len(group.runs) > 1 for group in comparison.groups)
    of_mean = ", mean" if several else ""
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "other": ("the other groups", {"color": "#D0D5DA", "lw": 0.9, "zorder": 1}),
        "seed": ("deploy form, seeds", {"color": SEEDS, "lw": 0.9, "zorder": 2}),
        "training": (f"training images{of_mean}", {"color": PAPER, "lw": 1.4, "ls": "--", "zorder": 3}),
        "train": (f"train form{of_mean}", {"color": TRAIN_FORM, "lw": 5, "solid_capstyle": "round", "zorder": 4}),
        "deploy": (f"deploy form{of_mean}", {"color": DEPLOY, "lw": 1.8, "ms": 4, "zorder": 5}),
    }
    drawn = set()
    figure, panels = _panels(len(comparison.groups), height=2.3)
    for group, axes, own in zip(comparison.groups, panels, means, strict=True):
        curves = [("other", others[deploy]) for others in means if others is not own]
        curves += [("seed", factor * _curve(run, deploy)) for run in group.runs if len(group.runs) > 1]
        curves += [] if training is None else [("training", own[training])]
        for kind, curve in [*curves, ("train", own[train]), ("deploy", own[deploy])]:
            if not curve.empty:
                drawn.add(kind)
                marker = "o" if len(curve) == 1 and kind != "other" else None
                axes.plot(curve, marker=marker, **styles[kind][1])
        if len(comparison.groups) > 1:
            axes.set_title(_wrapped(group.label), fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    figure.supxlabel("epochs trained", fontsize=12)
    figure.supylabel(label, fontsize=12)
    handles = [Line2D([], [], label=words, **style) for kind, (words, style) in styles.items() if kind in drawn]
    figure.legend(handles=handles[::-1], loc="outside upper right", ncols=5, frameon=False, fontsize=11)
    return figure


def _curve(run: Run, name: str) -> pd.Series[float]:
    """By epochs trained."""
    history = run.history[(run.history["metric"] == name)].dropna(subset="epoch")
    return history.drop_duplicates("epoch", keep="last").set_index(history["epoch"].astype("int64") + 1)["value"]


def _mean_curve(group: Group, name: str) -> pd.Series[float]:
    import pandas as pd

    return pd.concat([_curve(run, name) for run in group.runs]).groupby(level=0).mean()


def _panels(n: int, height: float) -> tuple[Figure, list[Any]]:
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = _figure(1.2 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for unused in axes.flat[n:]:
        unused.set_axis_off()
    for column in range(columns):  # sharing hides them, and the last row may have no panel there
        last = (n - 1 - column) // columns
        axes[last, column].tick_params(labelbottom=True)
    return figure, list(axes.flat[:n])


# --- branches -----------------------------------------------------------------------------------------------------


def _branches(comparison: Comparison) -> tuple[Figure, str] | None:
    """The share of every kind of branch in the fused kernel, by stage; groups with one branch say nothing by it."""
    from matplotlib.lines import Line2D

    found = [(group, shares) for group in comparison.groups if len(shares := branch_shares(group)) > 1]
    if not found:
        return None
    kinds = sorted({kind for _, shares in found for kind in shares}, key=_kind_order)
    stages = sorted({stage for _, shares in found for kind in shares.values() for stage in kind})
    style: dict[str, dict[str, Any]] = {
        kind: {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i // len(COLOURS) % len(LINES)], "marker": "o", "ms": 4}
        for i, kind in enumerate(kinds)
    }
    figure, panels = _panels(len(found), height=2.2)
    for axes, (group, shares) in zip(panels, found, strict=True):
        axes.axhline(0, color=GREY, lw=0.8)
        for kind, by_stage in shares.items():
            there = [stage for stage in stages if stage in by_stage]
            x = [stages.index(stage) for stage in there]
            axes.errorbar(
                x,
                [by_stage[stage][0] for stage in there],
                yerr=[by_stage[stage][1] for stage in there],
                lw=1.6,
                elinewidth=1,
                **style[kind],
            )
        axes.set_title(_wrapped(group.label), fontsize=11)
        axes.set_xticks(range(len(stages)), [stage.removeprefix("stage") for stage in stages])
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    figure.supxlabel("stage", fontsize=12)
    figure.supylabel("share of the fused kernel", fontsize=12)
    handles = [Line2D([], [], label=kind, **style[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(6, len(kinds)), frameon=False, fontsize=11)
    over = "layers" if len(comparison.runs) == 1 else "layers and seeds, bars one standard deviation of the seeds"
    return figure, (
        "What part of the fused 3×3 kernel lies along each kind of branch at the end of training, by stage: means over "
        f"{over}. A block's shares add up to 1; a negative one works against the others."
    )


def _kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def branch_shares(group: Group) -> dict[str, dict[str, tuple[float, float]]]:
    """By kind of branch and stage: mean and standard deviation over seeds (0 of one), of each run's last epoch."""
    from statistics import fmean, stdev

    values: dict[str, dict[str, list[float]]] = {}
    for run in group.runs:
        for name, value in run.metrics.items():
            if name.startswith(SHARE) and math.isfinite(value):
                stage, _, kind = name.removeprefix(SHARE).partition("/")
                values.setdefault(kind, {}).setdefault(stage, []).append(value)
    return {
        kind: {stage: (fmean(v), stdev(v) if len(v) > 1 else 0.0) for stage, v in sorted(stages.items())}
        for kind, stages in sorted(values.items())
    }
