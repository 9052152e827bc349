"""The runs of an experiment side by side, with the paper's numbers beside ours: pandas, terminal, Markdown, CSV.

Files hold accuracies as fractions of 1; every table holds percent, and says so in the header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repvgg.influence import flat
from repvgg.report.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
CONF = EXPERIMENTS.parent / "conf"
TABLE6 = EXPERIMENTS / "table6.yaml"
#: What else has a paper's numbers of accuracy, beside the paper's tables; for the runs of that experiment alone.
OTHERS = ("int8.yaml",)


@dataclass(frozen=True)
class Paper:
    """What the paper reports in one table, and under which choices of model, data and recipe it holds.

    Its rows are `ablations`, or `models` with the full block.
    """

    name: str
    choices: Mapping[str, str]
    epochs: int
    ablations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def row(self, record: RunRecord) -> str | None:
        """The row that a run belongs to."""
        name = record.choice("ablation" if self.ablations else "model")
        is_full = bool(self.ablations) or record.choice("ablation") == "full"
        return name if name in (self.ablations or self.models) and is_full else None

    def number(self, record: RunRecord, name: str) -> float | None:
        """`top1`, `top1_int8` (fractions of 1), or `images_per_s_*`, of a run's row; None where the paper has none.

        Whatever the run was trained with: for the order of rows and their differences.
        """
        return self.rows.get(self.row(record) or "", {}).get(name)

    def beside(self, record: RunRecord, name: str) -> float | None:
        """As `number`, for a run that is what the number stands for; None for one that departs from it."""
        return None if self.departures(record) else self.number(record, name)

    def departures(self, record: RunRecord) -> dict[str, tuple[Any, Any]]:
        """Where a run is not what its row's numbers stand for: by key, the run's value and the paper's.

        Of network, input and recipe, as far as the run's config says them. A choice that differs stands for the values
        that it brings.
        """
        row = self.row(record)
        if row is None:
            return {}
        choices = {**self.choices, **({} if self.ablations else {"model": row})}
        found: dict[str, tuple[Any, Any]] = {
            group: (record.choice(group), choice) for group, choice in choices.items() if record.choice(group) != choice
        }
        for group, values in _values_of(choices["model"], row if self.ablations else "full", choices["recipe"]).items():
            if group not in found:
                pairs = {key: (_value_at(record.config, key, value), value) for key, value in values.items()}
                found |= {key: (ours, value) for key, (ours, value) in pairs.items() if ours != value}
        return found

    @property
    def rows(self) -> Mapping[str, Mapping[str, float]]:
        """The table's rows in its order."""
        return self.ablations or self.models

    @property
    def speed(self) -> str:
        """The form whose images/s the table has: `train_form`, `deploy`, or nothing."""
        forms = ("train_form", "deploy")
        return next((f for f in forms if any(f"images_per_s_{f}" in row for row in self.rows.values())), "")

    @property
    def setting(self) -> str:
        """As in `B0 on ImageNet, 120 epochs`."""
        model = self.choices.get("model", "").removeprefix("repvgg_").capitalize()
        return f"{f'{model} on ' if model else ''}ImageNet, {self.epochs} epochs"


def load_paper(path: str | Path = TABLE6) -> Paper:
    """Reads the paper's side of an experiment file. ValueError if the file has none."""
    from omegaconf import OmegaConf

    path = Path(path)
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    try:
        paper = content["paper"]
        rows = "ablations" if "ablations" in paper else "models"
        groups = ("model", "data", "recipe") if rows == "ablations" else ("data", "recipe")
        return Paper(
            name=paper.get("name") or re.sub(r"(?<=[a-z])(?=[0-9])", " ", path.stem).capitalize(),
            choices={group: paper[group] for group in groups},
            epochs=content["cost"]["epochs"],
            **{rows: {str(name): numbers for name, numbers in paper[rows].items()}},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} lacks {error}: an experiment file holds cost.epochs and paper.{{model, data, recipe, ablations}}, "
            "as experiments/table6.yaml does, or paper.{data, recipe, models}."
        ) from error


def paper_of(records: Sequence[RunRecord], name: str | None = None) -> Paper:
    """The table of the paper beside which these runs belong.

    The one called `name` (`table7`, a file of `experiments/`); else that of the runs' `experiment`; else the one
    with the most of their ablations, or of their models where they have one ablation alone, and with it those of the
    same training that have more of them. Table 6 where none is better. Raises ValueError for a name that is not there.
    """
    of_tables = sorted(EXPERIMENTS.glob("table*.yaml"))
    papers = {file.stem: file for file in (*of_tables, *(EXPERIMENTS / name for name in OTHERS))}
    named = {record.config.get("experiment") for record in records}
    if name is None and len(named) == 1:
        (only,) = named
        name = only if only in papers else None
    if name is not None:
        if name not in papers:
            raise ValueError(f"paper={name}: experiments/ has {', '.join(papers)}")
        return load_paper(papers[name])
    ablations = {record.choice("ablation") for record in records}

    def rows(paper: Paper) -> int:
        varies = bool(paper.ablations) == (len(ablations) > 1)
        return varies * len({paper.row(record) for record in records} - {None})

    # Table 6 first, which is then the one of those that are equally good
    tables = sorted(map(load_paper, of_tables), key=lambda paper: paper.name != "Table 6")
    best = max(tables, key=rows)
    used = [best]
    for other in tables:
        if (other.choices, other.epochs) == (best.choices, best.epochs) and rows(_joined([*used, other])) > rows(
            _joined(used)
        ):
            used.append(other)
    return _joined(sorted(used, key=lambda paper: paper.name))


def _joined(papers: Sequence[Paper]) -> Paper:
    """Tables of one training as one: `Tables 6 and 7`."""
    if len(papers) == 1:
        return papers[0]
    ablations: dict[str, dict[str, float]] = {}
    for paper in papers:
        for name, numbers in paper.ablations.items():
            ablations.setdefault(name, {}).update(numbers)
    numbers_of = " and ".join(paper.name.removeprefix("Table ") for paper in papers)
    return replace(papers[0], name=f"Tables {numbers_of}", ablations=ablations)


@cache
def _values_of(model: str, ablation: str, recipe: str) -> Mapping[str, Mapping[str, Any]]:
    """Dotted keys and values of what the paper trained, by the choice that brings them; `experiment`: by none."""
    from omegaconf import OmegaConf

    def values(name: str, node: str) -> dict[str, Any]:
        content: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
        return {f"{node}.{key}": value for key, value in flat(content)}

    usual = {"net.groups": 1, "net.squeeze_excite": False, "net.in_channels": 3}  # of train.yaml
    trained = values(f"recipe/{recipe}", "recipe")
    data = values("data/imagenet", "data")
    whole = (
        "init_from",
        "trainer.limit_train_batches",
        "trainer.limit_val_batches",
        "callbacks.ema",
        "callbacks.resize",
    )
    return {
        "model": {**usual, **values(f"model/{model}", "net")},
        "ablation": {"block.stage": None, **values(f"ablation/{ablation}", "block")},
        "data": {f"data.{key}": data[f"data.{key}"] for key in ("num_classes", "resolution", "stem_stride")},
        "recipe": {**trained, "trainer.max_epochs": trained["recipe.epochs"], **dict.fromkeys(whole)},
    }


def _value_at(config: Mapping[str, Any], key: str, unknown: Any) -> Any:
    """The value of a dotted key, and `unknown` where the config does not have it."""
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return unknown
        node = node[name]
    return node


# --- columns: the header, and how a number is printed -------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float) -> str:
    return f"{value:.2f}"


RUN, STATUS, MODEL, ABLATION, SEED = "run", "status", "model", "ablation", "seed"
PARAMS_TRAIN, PARAMS_DEPLOY = "parameters train form", "parameters deploy"
TOP1_TRAIN, TOP1_DEPLOY, TOP1_DIFF = "top-1 train form [%]", "top-1 deploy [%]", "deploy − train form [pp]"
LOGIT_DIFF = "logits rel. L2 difference"
#: Of runs with int8=…; in no table without one.
TOP1_INT8, INT8_DIFF, INT8_LOGIT_DIFF = "top-1 int8 [%]", "int8 − deploy [pp]", "int8 logits rel. L2 difference"
SPEED_TRAIN, SPEED_DEPLOY, SPEED_UP = "train form [images/s]", "deploy [images/s]", "speed-up [×]"
#: Of the rounds of a run's own measurement, see `repvgg.learn.throughput`.
SPREAD = "spread of its rounds [±%]"
PAPER_TOP1, PAPER_INT8 = "paper top-1 [%]", "paper int8 top-1 [%]"
PAPER_SPEED = {"train_form": "paper train form [images/s]", "deploy": "paper deploy [images/s]"}

#: In a table only where a run has one.
OPTIONAL = (
    *(TOP1_INT8, INT8_DIFF, INT8_LOGIT_DIFF, SPREAD, PAPER_TOP1, PAPER_INT8),
    *PAPER_SPEED.values(),
)

NUMBERS: dict[str, Callable[[float], str]] = {
    PARAMS_TRAIN: _count,
    PARAMS_DEPLOY: _count,
    TOP1_TRAIN: _percent,
    TOP1_DEPLOY: _percent,
    TOP1_DIFF: lambda value: f"{value:+.2f}",
    LOGIT_DIFF: lambda value: f"{value:.1e}",
    TOP1_INT8: _percent,
    INT8_DIFF: lambda value: f"{value:+.2f}",
    INT8_LOGIT_DIFF: lambda value: f"{value:.1e}",
    SPEED_TRAIN: _rate,
    SPEED_DEPLOY: _rate,
    SPEED_UP: lambda value: f"{value:.2f}",
    SPREAD: lambda value: f"{value:.0f}",
    PAPER_TOP1: _percent,
    PAPER_INT8: _percent,
    **dict.fromkeys(PAPER_SPEED.values(), _rate),
}


def top1(record: RunRecord) -> tuple[float | None, float | None, str]:
    """Top-1 of the train form and of the deploy form, fractions of 1, and where from: `test`, `eval` or `val`.

    `test` is the best checkpoint's, `eval` that of an evaluated file; a run without them gives its last validation.
    Both forms are of the same source.
    """
    sources = [s for s in ("test", "eval") if {f"{s}/top1", f"{s}/deploy/top1"} & record.metrics.keys()]
    source = next(iter(sources), "val")
    return record.metrics.get(f"{source}/top1"), record.metrics.get(f"{source}/deploy/top1"), source


def int8_top1(record: RunRecord) -> float | None:
    """Top-1 of the int8 form, a fraction of 1, from where :func:`top1` has the others."""
    return record.metrics.get(f"{top1(record)[2]}/int8/top1")


def table(records: Sequence[RunRecord], paper: Paper) -> pd.DataFrame:
    """One row per run in the given order, whatever its status; what a run did not measure is missing.

    The paper's numbers stand beside the runs that they are of. Columns of int8, of the paper and of the spread of a
    measurement are there if any run has a number in them.
    """
    import pandas as pd

    rows = []
    for record in records:
        train, deploy, _ = top1(record)
        int8 = int8_top1(record)
        metrics = record.metrics
        rows.append(
            {
                RUN: record.run_dir.name,
                STATUS: record.status,
                MODEL: record.choice("model"),
                ABLATION: record.choice("ablation"),
                SEED: record.config.get("seed"),
                PARAMS_TRAIN: metrics.get("params/train_form"),
                PARAMS_DEPLOY: metrics.get("params/deploy"),
                TOP1_TRAIN: _times(100, train),
                TOP1_DEPLOY: _times(100, deploy),
                TOP1_DIFF: None if train is None or deploy is None else 100 * (deploy - train),
                LOGIT_DIFF: metrics.get("reparam/rel_l2_diff"),
                TOP1_INT8: _times(100, int8),
                INT8_DIFF: None if int8 is None or deploy is None else 100 * (int8 - deploy),
                INT8_LOGIT_DIFF: None if int8 is None else metrics.get("int8/rel_l2_diff"),
                SPEED_TRAIN: metrics.get("bench/train_form/images_per_s"),
                SPEED_DEPLOY: metrics.get("bench/deploy/images_per_s"),
                SPEED_UP: metrics.get("bench/speedup"),
                SPREAD: _times(100, metrics.get("bench/spread")),
                PAPER_TOP1: _times(100, paper.beside(record, "top1")),
                PAPER_INT8: _times(100, paper.beside(record, "top1_int8")),
                **{name: paper.beside(record, f"images_per_s_{form}") for form, name in PAPER_SPEED.items()},
            }
        )
    numbers = [name for name in NUMBERS if name not in OPTIONAL or any(row[name] is not None for row in rows)]
    frame = pd.DataFrame(rows, columns=[RUN, STATUS, MODEL, ABLATION, SEED, *numbers])
    counts = dict.fromkeys((SEED, PARAMS_TRAIN, PARAMS_DEPLOY), "Int64")
    return frame.astype(counts | {name: "float64" for name in numbers if name not in counts})


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def notes(records: Sequence[RunRecord], paper: Paper) -> list[str]:
    """What a reader must know to read the table right, one sentence or two each."""
    lines = []
    departing = {key: pair for record in records for key, pair in paper.departures(record).items()}
    if departing:
        gpu = ", a 1080Ti for the images/s" if paper.speed else ""
        said = ", ".join(f"{key} {_short(ours)} (there {_short(theirs)})" for key, (ours, theirs) in departing.items())
        several = len({paper.row(record) for record in records}) > 1
        all_the_same = " The differences and the order of its rows are given all the same." if several else ""
        lines.append(
            f"The paper's {paper.name} is of {paper.setting} (one run each{gpu}). Its numbers do not stand beside runs "
            f"that depart from that: {said}.{all_the_same}"
        )
    unfinished = [record for record in records if record.status == "finished" and top1(record)[2] == "val"]
    if unfinished:
        names = ", ".join(record.run_dir.name for record in unfinished)
        lines.append(f"Top-1 of run {names}: the last validation, since it has no test of its best checkpoint.")
    settings = {bench_settings(record) for record in records if "bench/speedup" in record.metrics}
    if len(settings) > 1:
        lines.append(f"The images/s were measured under different settings: {'; '.join(sorted(settings))}.")
    elif settings != {""} and settings:
        lines.append(f"images/s: {settings.pop()}.")
    for record in records:
        if record.status != "finished":
            reason = f" ({record.error})" if record.error else ""
            lines.append(
                f"Run {record.run_dir.name}: {record.status}{reason}. Its numbers, if any, are the last it wrote."
            )
    return lines


def _short(value: Any) -> str:
    """A value or a directory's name that fits beside a picture: its ends tell it from others."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 34 else f"{text[:16]}…{text[-16:]}"


def within_spread(record: RunRecord) -> bool:
    """Whether a run's speed-up is no further from 1 than the rounds of its measurement from one another."""
    up, spread = record.metrics.get("bench/speedup"), record.metrics.get("bench/spread")
    return up is not None and spread is not None and abs(up - 1) <= spread


def bench_settings(record: RunRecord) -> str:
    """What a throughput depends on: `batch 128, float32, 224 px, <device>`; empty if the config does not say.

    From `bench.batch`, `bench.dtype`, `bench.resolution` and `bench.device`, or `device` if the run notes it there.
    """
    bench = record.config.get("bench")
    if not isinstance(bench, Mapping):
        return ""
    known = {"device": record.config.get("device")} | dict(bench)
    forms = {"batch": "batch {}", "dtype": "{}", "resolution": "{} px", "device": "{}"}
    return ", ".join(form.format(known[name]) for name, form in forms.items() if known.get(name) is not None)


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A short and unique name per run: the choices in which they differ, else with the directory's name."""
    fields = ("model", "ablation", "recipe", "data")
    described = [
        [record.choice(name) or "" for name in fields] + [f"seed {record.config.get('seed')}"] for record in records
    ]
    varying = [i for i, values in enumerate(zip(*described, strict=True)) if len(set(values)) > 1]
    names = [" ".join(filter(None, (values[i] for i in varying))) for values in described]
    if len(set(names)) == len(names) and all(names):
        return names
    return [f"{name} ({_short(record.run_dir.name)})".strip() for name, record in zip(names, records, strict=True)]


# --- the three forms of output --------------------------------------------------------------------------------------


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    """The table as text, row by row; what is missing is blank."""

    def text(name: str, value: Any) -> str:
        # a missing value is the only one that differs from itself, or is pandas' <NA>
        if value is None or str(value) in ("nan", "<NA>"):
            return ""
        return NUMBERS[name](value) if name in NUMBERS else str(value)

    return [[text(name, frame[name].iloc[i]) for name in frame.columns] for i in range(len(frame))]


def to_csv(frame: pd.DataFrame) -> str:
    """All digits; blank where missing."""
    return frame.to_csv(index=False)


def to_markdown(frame: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """A GitHub table with the notes under it."""
    align = ["--:" if name in NUMBERS else "---" for name in frame.columns]
    body = [[cell.replace("|", "\\|") for cell in row] for row in _cells(frame)]
    lines = [f"| {' | '.join(row)} |" for row in ([*frame.columns], align, *body)]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def print_table(frame: pd.DataFrame, notes: Sequence[str], console: Console) -> None:
    """Prints to a terminal: one run per row, or one per column where only that fits; never with digits cut off."""
    rows, names = _cells(frame), [*frame.columns]
    # A job's directory is often its number and then its overrides, which the columns say: the number will do here.
    numbers = [row[0].partition("_")[0] for row in rows]
    if all(number.isdecimal() for number in numbers) and len(set(numbers)) == len(numbers):
        rows = [[number, *row[1:]] for number, row in zip(numbers, rows, strict=True)]
    # What is the same for every run is said once, so that the numbers get the room. The status always shows.
    same = [i for i in (names.index(MODEL), names.index(SEED)) if len({row[i] for row in rows}) == 1]
    title = ", ".join(f"{names[i]} {rows[0][i]}" for i in same if rows and rows[0][i])
    shown = [i for i in range(len(names)) if i not in same]
    header = [names[i] for i in shown]
    cells = [[row[i] for i in shown] for row in rows]
    tables = [_rich_table(header, cells, title)]
    if _too_wide(tables[0], console):
        lying = [header[1:], *(row[1:] for row in cells)]
        for size in range(len(cells), 0, -1):
            tables = [
                _rich_table(
                    [header[0], *(row[0] for row in cells[i : i + size])],
                    [list(line) for line in zip(lying[0], *lying[1 + i : 1 + i + size], strict=True)],
                    title,
                    lying=True,
                )
                for i in range(0, len(cells), size)
            ]
            if not any(_too_wide(t, console) for t in tables):
                break
    for t in tables:
        console.print(t)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _too_wide(rich_table: Table, console: Console) -> bool:
    # Without the wide option rich measures a table as what would be left of it after cutting it to the console.
    return console.measure(rich_table, options=console.options.update(width=10_000)).minimum > console.width


def _rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, *, lying: bool = False) -> Table:
    """`lying` has the names of the columns down its left side and a run per column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {"finished": "green", "failed": "bold red"} | dict.fromkeys(
        ("interrupted", "stopped", "dry run"), "yellow"
    )
    out = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for i, name in enumerate(header):
        # Headers may wrap between words; numbers never.
        longest = max([len(row[i]) for row in rows] + [len(word) for word in name.split()])
        justify: Literal["left", "right"] = "right" if i and (lying or name in NUMBERS) else "left"
        out.add_column(Text(name), justify=justify, min_width=longest)
    for row in rows:
        out.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    return out
