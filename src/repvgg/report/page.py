"""One page of a comparison: Markdown, the same as self-contained HTML, pictures and CSV.

The page is a function of the runs: it holds no time of its own, and made twice it is the same byte for byte.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.files import replacing
from repvgg.report import charts, table
from repvgg.report.compare import EQUAL, LEVEL, UNEVEN, Comparison, Difference, Group, Spread, commit, flat_items
from repvgg.report.runs import Run

if TYPE_CHECKING:
    import pandas as pd

#: What a page's directory holds, and nothing else.
FILES = ("report.md", "report.html", "data.csv", "groups.csv")
PICTURES = "pictures"
#: Characters of an error that the page shows; data.csv has all.
REASON = 240


def write_page(comparison: Comparison, out: Path, title: str | None = None) -> list[Path]:
    """Writes the page into a directory that holds nothing else, and returns report.md and report.html.

    Raises ValueError if other files are there.
    """
    require_own(out)
    drawn = charts.charts(comparison)
    text = markdown(comparison, {name: words for name, (_, words) in drawn.items()}, title, with_files=True)
    pictures = {
        f"{PICTURES}/{name}.{kind}": content
        for name, (figure, _) in drawn.items()
        for kind, content in charts.save(figure, name).items()
    }
    files = {
        **pictures,
        "data.csv": run_frame(comparison).to_csv(index=False).encode(),
        "groups.csv": group_frame(comparison).to_csv(index=False).encode(),
        "report.html": html(text, pictures).encode(),
        "report.md": text.encode(),
    }
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(out / name) as file:
            file.write(content)
    for stale in (out / PICTURES).iterdir():
        if f"{PICTURES}/{stale.name}" not in files:
            stale.unlink()
    return [out / "report.md", out / "report.html"]


def require_own(out: Path) -> None:
    """ValueError if a directory holds what is not of a page."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: name a directory")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in (*FILES, PICTURES)) if out.exists() else []
    if foreign:
        raise ValueError(f"out={out} holds other files ({', '.join(foreign[:5])}): name a directory of the page's own")


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(comparison: Comparison) -> dict[str, str]:
    """The page's tables in Markdown: `accuracy`; `forms`, how both forms compare; `speed`, empty if not measured."""
    return {"accuracy": _accuracy(comparison), "forms": _forms(comparison), "speed": _speed(comparison)}


def _accuracy(comparison: Comparison) -> str:
    to = f"− {comparison.reference} [pp]"
    rows = []
    for group in comparison.groups:
        d = group.difference
        paper = comparison.paper.beside(group.runs[0], "top1")
        rows.append(
            {
                **_named(comparison, group),
                "n": str(len(group.runs)),
                table.TOP1_TRAIN: _spread(group, table.TOP1_TRAIN),
                table.TOP1_DEPLOY: _spread(group, table.TOP1_DEPLOY),
                to: "" if d is None else f"{d.mean:+.2f}",
                f"{LEVEL:.0%} interval": "" if d is None or d.low is None else f"{d.low:+.2f} … {d.high:+.2f}",
                "pairs": "" if d is None else str(len(d.by_seed)),
                "p": "" if d is None or d.p is None else _p(d.p),
                "p (Holm)": "" if d is None or d.p_holm is None or comparison.comparisons < 2 else _p(d.p_holm),
                table.PAPER_TOP1: "" if paper is None else f"{100 * paper:.2f}",
                f"paper {to}": _signed(charts.paper_difference(comparison, group, comparison.base(group))),
            }
        )
    return _markdown(rows, comparison)


def _forms(comparison: Comparison) -> str:
    names = (
        *(table.PARAMS_TRAIN, table.PARAMS_DEPLOY, table.TOP1_DIFF, table.LOGIT_DIFF),
        *(table.TOP1_INT8, table.INT8_DIFF, table.INT8_LOGIT_DIFF, table.PAPER_INT8),
    )
    return _markdown(
        [{**_named(comparison, g), **{name: _spread(g, name) for name in names}} for g in comparison.groups], comparison
    )


def _speed(comparison: Comparison) -> str:
    rows = []
    paper = comparison.paper
    speed = table.SPEED_TRAIN if paper.speed == "train_form" else table.SPEED_DEPLOY
    words = "train form" if paper.speed == "train_form" else "deploy"
    key = f"images_per_s_{paper.speed}"
    for group in comparison.groups:
        base = comparison.base(group)
        ours = base and _ratio(group.spread(speed), base.spread(speed))
        theirs, of_base = paper.number(group.runs[0], key), base and paper.number(base.runs[0], key)
        names = (table.SPEED_TRAIN, table.SPEED_DEPLOY, table.SPEED_UP, table.SPREAD)
        rows.append(
            {
                **_named(comparison, group),
                **{name: _spread(group, name) for name in names},
                f"{words} speed, × {comparison.reference}": "" if ours is None else f"{ours:.2f}",
                "paper": "" if ours is None or theirs is None or not of_base else f"{theirs / of_base:.2f}",
            }
        )
    measured = any(group.spread(table.SPEED_UP) is not None for group in comparison.groups)
    return _markdown(rows, comparison) if measured else ""


def _named(comparison: Comparison, group: Group) -> dict[str, str]:
    if comparison.columns:
        return {name: _escaped(group.columns[name]) for name in comparison.columns}
    return {"ablation": _escaped(group.label)}


def _spread(group: Group, column: str) -> str:
    spread = group.spread(column) if column in group.values else None
    if spread is None:
        return ""
    text = table.NUMBERS[column]
    counts = (table.PARAMS_TRAIN, table.PARAMS_DEPLOY)
    without = (*counts, table.LOGIT_DIFF, table.INT8_LOGIT_DIFF, table.PAPER_INT8, table.SPREAD)
    with_sd = spread.sd is not None and column not in without
    return (
        f"{text(spread.mean)} ± {text(spread.sd).lstrip('+')}"
        if with_sd and spread.sd is not None
        else text(spread.mean)
    )


def _ratio(a: Spread | None, b: Spread | None) -> float | None:
    return None if a is None or b is None or b.mean == 0 else a.mean / b.mean


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(rows: Sequence[Mapping[str, str]], comparison: Comparison) -> str:
    return _grid(rows, text=(*comparison.columns, "ablation"))


def _grid(rows: Sequence[Mapping[str, str]], text: Collection[str]) -> str:
    """A GitHub table without the columns that are blank in every row; those not in `text` are numbers."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    align = ["---" if name in text else "--:" for name in names]
    lines = [names, align, *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    """As plain text in Markdown, in one line."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))


def run_frame(comparison: Comparison) -> pd.DataFrame:
    """data.csv: one row per run, also of those that are in no mean, with the reason."""
    import pandas as pd

    used = {id(run): group.label for group in comparison.groups for run in group.runs}
    reasons = {id(run): reason for run, reason in comparison.left}
    runs = sorted([*comparison.runs, *(run for run, _ in comparison.left)], key=lambda run: (run.name, run.ids))
    frame = table.table(runs, comparison.paper)
    frame[table.RUN] = [run.name for run in runs]
    extra = {
        "group": [used.get(id(run), "") for run in runs],
        "left out because": [" ".join(reasons.get(id(run), "").split()) for run in runs],
        "wandb id": [" ".join(run.ids) for run in runs],
        "commit": [commit(run) for run in runs],
        "ended or began [UTC]": ["" if run.when is None else f"{run.when:%Y-%m-%d %H:%M:%S}" for run in runs],
    }
    return pd.concat([frame, pd.DataFrame(extra, index=frame.index)], axis=1)


def group_frame(comparison: Comparison) -> pd.DataFrame:
    """groups.csv: one row per group, all digits."""
    import pandas as pd

    rows = []
    for group in comparison.groups:
        d = group.difference
        row: dict[str, Any] = {**comparison.shared, **group.columns, "n": len(group.runs)}
        for name in (name for name in table.NUMBERS if name in group.values):
            spread = group.spread(name)
            row[name] = spread and spread.mean
            if not name.startswith("paper"):
                row[f"{name} sd"] = spread and spread.sd
        row |= {
            f"difference to {comparison.reference} [pp]": d and d.mean,
            "difference sd": d and d.sd,
            "interval low": d and d.low,
            "interval high": d and d.high,
            "pairs": d and len(d.by_seed),
            "p": d and d.p,
            "p holm": d and d.p_holm,
        }
        rows.append(row)
    return pd.DataFrame(rows)


# --- the page -------------------------------------------------------------------------------------------------------


def markdown(
    comparison: Comparison, pictures: Mapping[str, str], title: str | None = None, *, with_files: bool = False
) -> str:
    """The page's text; `pictures` are names and captions of files in `pictures/`, `with_files`: the CSV files too."""

    def picture(name: str) -> str:
        words = pictures.get(name)
        return f"![{words.partition('.')[0]}]({PICTURES}/{name}.svg)\n\n*{words}*\n" if words else ""

    made = tables(comparison)
    parts = [
        f"# {_escaped(title or default_title(comparison))}\n",
        _list(facts(comparison)),
        "The numbers: [data.csv](data.csv), a row per run, and [groups.csv](groups.csv).\n" if with_files else "",
        "## In short\n",
        _list(reading(comparison)),
        "## Top-1\n",
        made["accuracy"],
        picture("top1"),
        "## Both forms\n",
        made["forms"],
        "## Speed\n" if made["speed"] else "",
        made["speed"],
        picture("speed"),
        "" if {"curves", "losses"}.isdisjoint(pictures) else "## Learning curves\n",
        picture("curves"),
        picture("losses"),
        "" if "branches" not in pictures else "## Branches\n",
        picture("branches"),
        "## Runs that are in no mean\n" if comparison.left else "",
        _left(comparison) if comparison.left else "",
        "## To be read with it\n",
        _list([*limits(comparison), *map(_escaped, comparison.notes)]),
        "## The same again\n",
        _commands(comparison),
    ]
    return "\n".join(part for part in parts if part)


def _list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def facts(comparison: Comparison) -> list[str]:
    """What was compared, when, where and with which code: Markdown, one line each."""
    runs = comparison.runs
    by = f" by {', '.join(map(_escaped, comparison.columns))}" if comparison.columns else ""
    shared = ", ".join(f"{name} {_escaped(value)}" for name, value in comparison.shared.items())
    seeds = _ranges(sorted({int(seed) for run in runs if (seed := run.config.get("seed")) is not None}))
    times = sorted(run.when for run in runs if run.when is not None)
    unknown = f" ({len(runs) - len(times)} runs do not say)" if times and len(times) < len(runs) else ""
    first, last = (f"{time:%Y-%m-%d %H:%M}" for time in (times[0], times[-1])) if times else ("", "")
    when = f"{first if first == last else f'{first} to {last}'} UTC{unknown}" if times else "the runs do not say"
    versions = _values(runs, lambda config: _joined(config.get("versions")))
    compared = f"Compared: {_plural(len(comparison.groups), 'group')}{by}, {_plural(len(runs), 'finished run')}"
    if len(runs) == 1:
        compared = f"One finished run, `{runs[0].name.replace('`', '')}`"
    return [
        compared
        + (f", seed{'s' * (len(runs) > 1)} {seeds}" if seeds else "")
        + (f"; {_plural(len(comparison.left), 'run')} in no mean (below)" if comparison.left else ""),
        *([f"{'Choices' if len(runs) == 1 else 'In common'}: {shared}"] if shared else []),
        *([f"Settings: {settings}"] if (settings := _values(runs, _settings)) else []),
        f"Trained: {when}",
        f"On: {_values(runs, _machine)}" + (f"; {versions}" if versions else ""),
        f"Commit: {_values_of([commit(run) for run in runs])}",
    ]


def _settings(config: Mapping[str, Any]) -> str:
    """What a choice of model, data or recipe may have been given beside its name."""
    forms = {
        "net.width_a": "a = {:g}",
        "net.width_b": "b = {:g}",
        "data.resolution": "{:g} px",
        "trainer.max_epochs": "{:g} epochs",
        "recipe.batch_size": "batch {:g}",
        "recipe.lr": "lr {:g}",
    }
    values = dict(flat_items(config))
    return ", ".join(form.format(values[key]) for key, form in forms.items() if isinstance(values.get(key), float))


def _machine(config: Mapping[str, Any]) -> str:
    count = config.get("world_size")
    return f"{f'{count} × ' if count and count > 1 else ''}{config.get('device') or 'a device the run does not name'}"


def _joined(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) if versions else ""


def _values(runs: Sequence[Run], of: Callable[[Mapping[str, Any]], str]) -> str:
    return _values_of([of(run.config) for run in runs])


def _values_of(values: Sequence[str]) -> str:
    """The different ones, each with how many have it where they are several."""
    counts = sorted(Counter(value for value in values if value).items())
    return "; ".join(
        _escaped(value) + (f" ({_plural(count, 'run')})" if len(counts) > 1 else "") for value, count in counts
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`1–3, 7` for 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def reading(comparison: Comparison) -> list[str]:
    """What the numbers say, and how far: Markdown, one line each."""
    lines = []
    different = [(group, group.difference) for group in comparison.groups if group.difference is not None]
    clear = [(g, d) for g, d in different if d.excludes_zero]
    unclear = [(g, d) for g, d in different if d.low is not None and not d.excludes_zero]
    blank = [(g, d) for g, d in different if d.low is None]
    if clear or unclear:
        lines.append(
            f"The {LEVEL:.0%} interval of the difference to {_escaped(str(comparison.reference))} leaves out 0 for "
            f"{len(clear)} of {len(clear) + len(unclear)}"
            + (f": {_named_differences(clear)}." if clear else ".")
            + (f" It holds 0 for {_named_differences(unclear)}: these runs do not tell them apart." if unclear else "")
        )
    if comparison.comparisons > 1:
        holds = [_escaped(g.label) for g, d in different if d.p_holm is not None and d.p_holm < 1 - LEVEL]
        lines.append(
            f"Adjusted for all {comparison.comparisons} comparisons (Holm), p < {1 - LEVEL:.2f} for "
            f"{', '.join(holds) if holds else 'none'}."
        )
    single = [(g, d) for g, d in blank if len(d.by_seed) == 1]
    same = [(g, d) for g, d in blank if len(d.by_seed) > 1]
    if single:
        lines.append(f"One pair of seeds has no interval: {_named_differences(single)}. Train more seeds.")
    if same:
        lines.append(f"Every pair differs by the same, so there is no spread to go by: {_named_differences(same)}.")
    if len(comparison.groups) == 1:
        lines += _top1_alone(comparison.groups[0])
    elif not different:
        lines.append("No group is compared with another: there is no reference among them.")
    gaps = [abs(gap) for group in comparison.groups for gap in group.values[table.TOP1_DIFF].dropna()]
    if gaps:
        lines.append(
            f"Both forms score the same{f' in all {len(gaps)} runs' if len(gaps) > 1 else ''}."
            if max(gaps) < EQUAL
            else f"The two forms of a run differ by at most {max(gaps):.2f} percentage points of top-1."
        )
    quantized = [(g, _of_int8(g)) for g in comparison.groups]
    if any(change is not None for _, change in quantized):
        changes = ", ".join(f"{_escaped(g.label)} {change:+.2f} pp" for g, change in quantized if change is not None)
        lines.append(f"int8 changes the deploy form's top-1, in the mean: {changes}.")
    ups = [float(up) for group in comparison.groups for up in group.values[table.SPEED_UP].dropna()]
    if ups:
        lines.append(
            f"Deployed, the networks are {min(ups):.2f} to {max(ups):.2f} times as fast."
            if len(ups) > 1
            else f"Deployed, the network is {ups[0]:.2f} times as fast."
        )
    else:
        lines.append("No run measured the speed of its forms.")
    if within := [run for run in comparison.runs if table.within_spread(run)]:
        names = ", ".join(_escaped(run.name) for run in within[:5]) + (", …" if len(within) > 5 else "")
        lines.append(
            f"Of {_plural(len(within), 'run')} the speed-up lies within the spread of its own measurement, and says "
            f"nothing: {names}. Something else used the machine, or both forms are as fast."
        )
    if (comparison.unevenness or 1) > UNEVEN:
        lines.append(
            f"One and the same deployed network was measured at speeds up to {comparison.unevenness:.1f} times apart, "
            "by groups: the machine was not as fast at all times. Only the speed-ups hold, since a run's two forms "
            "take turns."
        )
    if comparison.tau is not None:
        tau, n = comparison.tau
        lines.append(
            f"Order of our means and of the paper's {comparison.paper.name}: Kendall's τ = {tau:+.2f}, n = {n}."
        )
    return lines


def _top1_alone(group: Group) -> list[str]:
    """Of a page with one group."""
    forms = {"as trained": table.TOP1_TRAIN, "deployed": table.TOP1_DEPLOY}
    said = [f"{number} % {form}" for form, column in forms.items() if (number := _spread(group, column))]
    return [f"Top-1: {', '.join(said)}."]


def _of_int8(group: Group) -> float | None:
    spread = group.spread(table.INT8_DIFF) if table.INT8_DIFF in group.values else None
    return None if spread is None else spread.mean


def _named_differences(of: Sequence[tuple[Group, Difference]]) -> str:
    return ", ".join(f"{_escaped(group.label)} ({d.mean:+.2f} pp)" for group, d in of)


def limits(comparison: Comparison) -> list[str]:
    """What the page does not say: Markdown, one line each."""
    alone = len(comparison.runs) == 1
    lines = [
        "A group is the runs whose logged config is equal in every value but the seed and what cannot change a result: "
        "names and places, logging, the loader's threads. The commit does not separate groups; it is named.",
    ]
    if alone:
        lines = ["One run says nothing of what another seed gives."]
    if any("test/deploy/top1" in run.metrics or "test/top1" in run.metrics for run in comparison.runs):
        lines.append(
            "Top-1 is the best checkpoint's on the validation images that also chose it, so it is too high"
            + ("." if alone else ", for all groups alike; ± is the standard deviation (n − 1) over seeds.")
        )
    pairs = [len(g.difference.by_seed) for g in comparison.groups if g.difference is not None]
    if pairs:
        few = min(pairs) < 5
        lines.append(
            f"Differences are of the same seeds, run by run; the {LEVEL:.0%} interval is Student's t for their mean. "
            "It covers what a seed changes (first weights, order, augmentation), and neither other images nor another "
            "recipe, and it takes the differences for normal, which "
            + ("so few pairs cannot show." if few else "is not tested here.")
        )
        if min(pairs) < 3:
            lines.append(
                "With two pairs, an interval is 12.7 standard errors to either side: only a very large difference can "
                "leave out 0."
            )
    if comparison.comparisons > 1:
        lines.append(
            f"{comparison.comparisons} differences are compared with 0. Intervals and p are each difference's own; p "
            "(Holm) is adjusted for all of them, so that with no difference at all the chance of one below 0.05 is at "
            "most 5 %."
        )
    precisions = _values(comparison.runs, lambda config: str((config.get("trainer") or {}).get("precision") or ""))
    if precisions:
        lines.append(f"Trained in {precisions}.")
    return lines


def _left(comparison: Comparison) -> str:
    rows = []
    for run, reason in comparison.left:
        curve = run.history[run.history["metric"] == "val/deploy/top1"].dropna(subset="epoch")
        rows.append(
            {
                "run": f"`{run.name.replace('`', '')}`".replace("|", "\\|"),
                "status": _escaped(run.status),
                "model": _escaped(run.choice("model") or ""),
                "ablation": _escaped(run.choice("ablation") or ""),
                "seed": "" if run.config.get("seed") is None else str(run.config["seed"]),
                "epochs validated": "" if curve.empty else str(int(curve["epoch"].max()) + 1),
                "last top-1 deploy [%]": "" if curve.empty else f"{100 * curve['value'].iloc[-1]:.2f}",
                "why": _escaped(reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"),
            }
        )
    return _grid(rows, text=("run", "status", "model", "ablation", "why"))


def _commands(comparison: Comparison) -> str:
    lines, unknown = commands(comparison.runs)
    text = "```bash\n" + "\n".join(lines) + "\n```\n" if lines else ""
    if unknown:
        text += f"\nOf {_plural(unknown, 'run')} the command is not known.\n"
    return text


def commands(runs: Sequence[Run]) -> tuple[list[str], int]:
    """The commands that train these runs again, seeds, ablations and models gathered; and how many are not known."""
    swept = ("model", "ablation", "seed")
    values: dict[tuple[tuple[str, ...], ...], None] = {}
    for run in runs:
        if run.overrides is not None:
            rest = tuple(o for o in run.overrides if o.partition("=")[0] not in swept)
            own = dict(o.split("=", 1) for o in run.overrides if o.partition("=")[0] in swept)
            values[(rest, *((own[name],) if name in own else () for name in swept))] = None
    for position in (3, 2, 1):  # seeds of one ablation, then ablations with the same seeds, then models
        gathered: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for key in values:
            gathered.setdefault((*key[:position], *key[position + 1 :]), []).extend(key[position])
        values = {
            (*key[:position], tuple(dict.fromkeys(found)), *key[position:]): None for key, found in gathered.items()
        }
    lines = []
    for rest, *lists in values:
        given = [f"{name}={','.join(found)}" for name, found in zip(swept, lists, strict=True) if found]
        several = ["-m"] if any(len(found) > 1 for found in lists) else []
        lines.append(shlex.join(["python", "src/train.py", *several, *rest, *given]))
    return lines, sum(run.overrides is None for run in runs)


def default_title(comparison: Comparison) -> str:
    """As in `Ablations of repvgg_b0 on digits`."""
    what = {"ablation": "Ablations", "model": "Models", "recipe": "Recipes"}.get(comparison.over or "", "Runs")
    what = "A run" if len(comparison.runs) == 1 else what
    of = f" of {comparison.shared['model']}" if "model" in comparison.shared else ""
    on = f" on {comparison.shared['data']}" if "data" in comparison.shared else ""
    return f"{what}{of}{on}"


# --- HTML -----------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --text: #20242a; --grey: #5a6169; --line: #d5d9de; --page: #ffffff;
  --stripe: #f6f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --grey: #a3adb8; --line: #3a4149; --page: #16191d; --stripe: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
em { color: var(--grey); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { vertical-align: bottom; font-weight: 600; }
td:not([style]) { min-width: 4rem; }
td:last-child:not([style]) { min-width: 18rem; overflow-wrap: anywhere; }
td code { overflow-wrap: anywhere; }
table:has(th:nth-child(9)) { font-size: .8rem; }
table:has(th:nth-child(9)) :is(th, td) { padding: .35rem .4rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
tbody tr:nth-child(even) { background: var(--stripe); }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px; padding: .4rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--stripe); border-radius: 6px; }
code { font-size: .88em; }
"""


def html(text: str, pictures: Mapping[str, bytes]) -> str:
    """The Markdown page as one file that asks for nothing from outside."""
    import base64
    import html as escape

    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or []:
            source = child.attrs.get("src") if child.type == "image" else None
            if source in pictures:  # after parsing, since the parser takes no SVG in a link
                child.attrs["src"] = f"data:image/svg+xml;base64,{base64.b64encode(pictures[str(source)]).decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    title = escape.escape(re.sub(r"\\(.)", r"\1", text.split("\n", 1)[0].removeprefix("# ")))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
