"""One page of a comparison: Markdown, the same as self-contained HTML, pictures and CSV.

The page is a function of the runs: it holds no time of its own, and made twice it is the same byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.files import replacing
from repvgg.report import charts, table
from repvgg.report.compare import LEVEL, Comparison, Group, Spread, commit

if TYPE_CHECKING:
    import pandas as pd

#: What a page's directory holds, and nothing else.
FILES = ("report.md", "report.html", "data.csv", "groups.csv")
PICTURES = "pictures"


def write_page(comparison: Comparison, out: Path, title: str | None = None) -> list[Path]:
    """Writes the page into a directory that holds nothing else, and returns report.md and report.html.

    Raises ValueError if other files are there.
    """
    require_own(out)
    drawn = charts.charts(comparison)
    text = markdown(comparison, {name: words for name, (_, words) in drawn.items()}, title)
    pictures = {
        f"{PICTURES}/{name}.{kind}": charts.save(figure, kind, name)
        for name, (figure, _) in drawn.items()
        for kind in ("svg", "png")
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
    """The page's tables in Markdown: `accuracy`, and `forms` with parameters and speed of both forms."""
    return {"accuracy": _accuracy(comparison), "forms": _forms(comparison)}


def _accuracy(comparison: Comparison) -> str:
    base = next((g for g in comparison.groups if g.is_reference), None)
    to = f"− {comparison.reference} [pp]"
    rows = []
    for group in comparison.groups:
        d = group.difference
        paper = comparison.paper.number(group.runs[0], "top1")
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
                "p (Holm)": "" if d is None or d.p_holm is None else _p(d.p_holm),
                table.PAPER_TOP1: "" if paper is None else f"{100 * paper:.2f}",
                f"paper {to}": _signed(charts.paper_difference(comparison, group, base)),
            }
        )
    return _markdown(rows, comparison)


def _forms(comparison: Comparison) -> str:
    rows = []
    paper = comparison.paper
    base = next((g for g in comparison.groups if g.is_reference), None)
    speed = table.SPEED_TRAIN if paper.speed == "train_form" else table.SPEED_DEPLOY
    words = "train form" if paper.speed == "train_form" else "deploy"
    for group in comparison.groups:
        ours = base and _ratio(group.spread(speed), base.spread(speed))
        key = f"images_per_s_{paper.speed}"
        theirs, of_base = paper.number(group.runs[0], key), base and paper.number(base.runs[0], key)
        rows.append(
            {
                **_named(comparison, group),
                **{name: _spread(group, name) for name in (table.PARAMS_TRAIN, table.PARAMS_DEPLOY)},
                **{name: _spread(group, name) for name in (table.TOP1_DIFF, table.LOGIT_DIFF)},
                **{name: _spread(group, name) for name in (table.SPEED_TRAIN, table.SPEED_DEPLOY, table.SPEED_UP)},
                f"{words} speed, × {comparison.reference}": "" if ours is None else f"{ours:.2f}",
                "paper": "" if theirs is None or not of_base else f"{theirs / of_base:.2f}",
            }
        )
    return _markdown(rows, comparison)


def _named(comparison: Comparison, group: Group) -> dict[str, str]:
    if comparison.columns:
        return {name: _escaped(group.columns[name]) for name in comparison.columns}
    return {"ablation": _escaped(group.label)}


def _spread(group: Group, column: str) -> str:
    spread = group.spread(column)
    if spread is None:
        return ""
    text = table.NUMBERS[column]
    with_sd = spread.sd is not None and column not in (table.PARAMS_TRAIN, table.PARAMS_DEPLOY, table.LOGIT_DIFF)
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
    """A GitHub table without the columns that are blank in every row."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    align = ["---" if name in (*comparison.columns, "ablation") else "--:" for name in names]
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
        for name in table.NUMBERS:
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


def markdown(comparison: Comparison, pictures: Mapping[str, str], title: str | None = None) -> str:
    """The page's text; `pictures` are names and captions of files in `pictures/`."""

    def picture(name: str) -> str:
        return f"![{pictures[name]}]({PICTURES}/{name}.svg)\n\n*{pictures[name]}*\n" if name in pictures else ""

    made = tables(comparison)
    parts = [
        f"# {_escaped(title or default_title(comparison))}\n",
        _facts(comparison),
        "## Top-1\n",
        made["accuracy"],
        picture("top1"),
        "## Both forms\n",
        made["forms"],
    ]
    return "\n".join(part for part in parts if part)


def default_title(comparison: Comparison) -> str:
    """As in `Ablations of repvgg_b0 on digits`."""
    what = {"ablation": "Ablations", "model": "Models", "recipe": "Recipes"}.get(comparison.over or "", "Runs")
    of = f" of {comparison.shared['model']}" if "model" in comparison.shared else ""
    on = f" on {comparison.shared['data']}" if "data" in comparison.shared else ""
    return f"{what}{of}{on}"


def _facts(comparison: Comparison) -> str:
    return ""


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
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; }
td.long { white-space: normal; min-width: 18rem; }
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
