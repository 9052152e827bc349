"""One picture of an experiment: how its runs learned, how fast both forms are, and how accurate, beside the paper.

Drawn with matplotlib's objects and the Agg canvas: no pyplot, so no global state and no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.files import replacing
from repvgg.report.record import RunRecord, read_history
from repvgg.report.table import Paper, bench_settings, labels, top1

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour blindness; without its yellow, too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
TRAIN_FORM, DEPLOY = "#A3ADB8", "#0072B2"
GREY = "#5A6169"
CURVE = "val/deploy/top1"
STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": "#20242A",
}


def write_picture(records: Sequence[RunRecord], paper: Paper, path: Path) -> Path:
    """Draws and writes a PNG atomically; returns its path."""
    figure = draw(records, paper)
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return path


def draw(records: Sequence[RunRecord], paper: Paper) -> Figure:
    """Left learning curves, then images/s, top-1 and the paper's top-1, of which the last three share their rows."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    names = [
        name if record.status == "finished" else f"{name}\n({record.status})"
        for name, record in zip(labels(records), records, strict=True)
    ]
    with_paper = any(paper.number(record, "top1") is not None for record in records)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(16, max(5.2, 2.2 + 0.5 * len(records))),
            dpi=110,
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
        )
        FigureCanvasAgg(figure)
        figure.suptitle(_title(records), x=0.008, ha="left", fontsize=15, fontweight="bold")
        curves, speed, accuracy, *rest = figure.subplots(
            1, 3 + with_paper, width_ratios=[1.5, 1.35, 0.9, 0.6][: 3 + with_paper]
        )
        _draw_curves(curves, records, names)
        _draw_speed(speed, records)
        _draw_accuracy(accuracy, records)
        if rest:
            _draw_paper(rest[0], records, paper)
        forms = [Patch(color=TRAIN_FORM, label="train form"), Patch(color=DEPLOY, label="deploy form")]
        figure.legend(handles=forms, loc="upper right", ncols=2, frameon=False, handlelength=1.2)
        for axes in (speed, accuracy, *rest):
            axes.set_ylim(len(records) - 0.4, -0.6)  # the first run on top
            axes.set_yticks(range(len(records)), names if axes is speed else [""] * len(records))
            axes.tick_params(axis="y", length=0)
        return figure


def _title(records: Sequence[RunRecord]) -> str:
    shared = [
        next(iter(values))
        for name in ("model", "data", "recipe")
        if len(values := {record.choice(name) for record in records}) == 1 and None not in values
    ]
    return " · ".join([*map(str, shared), f"{len(records)} runs" if len(records) > 1 else "1 run"])


def _draw_curves(axes: Any, records: Sequence[RunRecord], names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    ablations = [record.choice("ablation") or "" for record in records]
    # A colour per ablation and a line style per run of it; where that is one colour for all, a colour per run.
    keys = ablations if len(set(ablations)) > 1 else list(names)
    colours = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    used: dict[str, int] = {}
    for record, name, key in zip(records, names, keys, strict=True):
        repeat = used[key] = used.get(key, -1) + 1
        try:
            history = read_history(record.run_dir)
        except (FileNotFoundError, ValueError):
            continue  # a run that ended before its first validation; its row in the other panels names it
        curve = history[history["metric"] == CURVE].dropna(subset="epoch")
        if curve.empty:
            continue
        style = (colours[key] // len(COLOURS) + repeat) % len(LINES)
        axes.plot(
            curve["epoch"] + 1,
            100 * curve["value"],
            label=name.replace("\n", " "),
            color=COLOURS[colours[key] % len(COLOURS)],
            linestyle=LINES[style],
            linewidth=2,
            marker="o" if len(curve) <= 25 else None,
            markersize=4,
        )
    axes.set(title="Learning: deploy form", xlabel="epochs trained", ylabel="top-1 on validation [%]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#E3E6E9")
    if axes.lines:
        axes.legend(frameon=False, loc="best", ncols=1 if len(records) <= 6 else 2, fontsize=11)
    else:
        _say(axes, f"no run logged {CURVE}")


def _draw_speed(axes: Any, records: Sequence[RunRecord]) -> None:
    rows, train, deploy, speedup = [], [], [], []
    for i, record in enumerate(records):
        metrics = record.metrics
        if {"bench/train_form/images_per_s", "bench/deploy/images_per_s"} <= metrics.keys():
            rows.append(i)
            train.append(metrics["bench/train_form/images_per_s"])
            deploy.append(metrics["bench/deploy/images_per_s"])
            speedup.append(metrics.get("bench/speedup"))
    settings = {bench_settings(record) for record in records} - {""}
    axes.set_title("Speed of both forms")
    axes.set_xlabel("images/s" + (f"\n{settings.pop()}" if len(settings) == 1 else ""))
    if not rows:
        _say(axes, "no throughput measured")
        return
    axes.barh([i - 0.19 for i in rows], train, height=0.36, color=TRAIN_FORM)
    axes.barh([i + 0.19 for i in rows], deploy, height=0.36, color=DEPLOY)
    for i, value, factor in zip(rows, deploy, speedup, strict=True):
        if factor is not None:
            axes.annotate(
                f"×{factor:.2f}",
                (value, i + 0.19),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=DEPLOY,
            )
    axes.set_xlim(0, 1.18 * max(train + deploy))
    axes.grid(axis="x", color="#E3E6E9")
    axes.set_axisbelow(True)


def _draw_accuracy(axes: Any, records: Sequence[RunRecord]) -> None:
    sources = set()
    for i, record in enumerate(records):
        train, deploy, source = top1(record)
        if train is not None:
            axes.plot(100 * train, i, "o", ms=13, mfc="none", mec=TRAIN_FORM, mew=2.2, clip_on=False)
        if deploy is not None:
            axes.plot(100 * deploy, i, "o", ms=7, color=DEPLOY, clip_on=False)
            text = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 11}
            axes.annotate(f"{100 * deploy:.2f}", (100 * deploy, i), **text)
        if train is not None or deploy is not None:
            sources.add(source)
    which = {"test": "best checkpoint", "val": "last validation"}
    axes.set(title="Top-1", xlabel="[%]\n" + " / ".join(which[source] for source in sorted(sources)))
    if not sources:
        _say(axes, "no top-1 measured")
        return
    axes.grid(color="#E3E6E9")
    _spread(axes)


def _draw_paper(axes: Any, records: Sequence[RunRecord], paper: Paper) -> None:
    for i, record in enumerate(records):
        number = paper.number(record, "top1")
        if number is not None:
            axes.plot(100 * number, i, "D", ms=7, color=GREY)
            text = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 11}
            axes.annotate(f"{100 * number:.2f}", (100 * number, i), color=GREY, **text)
    axes.set_title(f"Paper, {paper.name}", color=GREY)
    axes.set_xlabel(f"[%], {paper.setting.replace(', ', chr(10))}", color=GREY)
    axes.grid(color="#E3E6E9")
    _spread(axes)
    axes.set_facecolor("#F6F7F8")


def _spread(axes: Any) -> None:
    """Room for the numbers, and at least two points: closer up, the noise of one run would look like a result."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervalx
    half = max(1.0, 0.72 * (high - low))
    middle = min((low + high) / 2, 100.2 - half)  # no ticks above 100 %
    axes.set_xlim(middle - half, max(middle + half, high + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
