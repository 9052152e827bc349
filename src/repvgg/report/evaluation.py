"""The tables of one evaluation: every class, which of the two forms is right, confusions, and what a terminal shows.

Files hold fractions of 1; the terminal shows percent, and says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

#: The two forms as keys and in words.
FORMS = {"train_form": "train form", "deploy": "deploy"}
#: Where the numbers of a form are, and which of the forms is right, in the metrics of an evaluation.
PREFIX = {"train_form": "eval", "deploy": "eval/deploy"}
OUTCOMES = {
    "both_right": "both right",
    "only_train_form_right": "only the train form right",
    "only_deploy_right": "only the deploy form right",
    "both_wrong": "both wrong",
}

Cell = str | int | float | None
#: A header and rows.
Table = tuple[list[str], list[list[Cell]]]


def tables(
    names: Sequence[str],
    images: Sequence[int],
    right: Mapping[str, Sequence[int]],
    confusion: Mapping[str, Sequence[Sequence[int]]],
    metrics: Mapping[str, float],
) -> dict[str, Table]:
    """What an evaluation leaves as CSV files, by their names.

    Args:
        names: of the classes, in the order of the labels.
        images: of every class.
        right: for every form, the images of every class that it recognises.
        confusion: for every form, images by true class (row) and answer; may be empty.
        metrics: ``eval/forms/*`` where there are two forms.
    """
    out = {"per_class": class_table(names, images, right)}
    if len(right) == 2:
        out["forms"] = outcome_table(metrics)
    for form, matrix in confusion.items():
        out[f"confusion_{form}"] = confusion_table(names, matrix)
    return out


def class_table(names: Sequence[str], images: Sequence[int], right: Mapping[str, Sequence[int]]) -> Table:
    """Header and one row per class: number, name, images, and top-1 of every form, None for a class without images."""
    header = ["class", "name", "images", *(f"top1_{form}" for form in right)]
    rows: list[list[Cell]] = [
        [i, name, images[i], *(count[i] / images[i] if images[i] else None for count in right.values())]
        for i, name in enumerate(names)
    ]
    return header, rows


def outcome_table(metrics: Mapping[str, float]) -> Table:
    """How many images which of the forms gets right, and how many the forms answer differently."""
    counts = {**OUTCOMES, "different_answer": "different answers"}
    rows: list[list[Cell]] = [
        [words, round(metrics[f"eval/forms/{key}"]), metrics[f"eval/forms/{key}"] / metrics["eval/images"]]
        for key, words in counts.items()
    ]
    return ["outcome", "images", "share"], rows


def confusion_table(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> Table:
    """A row per true class, a column per answer."""
    return ["true \\ answered", *names], [[name, *row] for name, row in zip(names, matrix, strict=True)]


def write_csv(path: Path, table: Table) -> None:
    """Write a table atomically; what is missing is blank."""
    header, rows = table
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def print_evaluation(title: str, metrics: Mapping[str, float], classes: list[list[Cell]], console: Console) -> None:
    """Both forms side by side, then where they differ and which classes are hardest.

    Args:
        title: what was evaluated, on what.
        metrics: ``eval/*`` and ``reparam/*``.
        classes: the rows of :func:`class_table`.
        console: rich's.
    """
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    table = rich_table.Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("form", no_wrap=True)
    for name in ("top-1 [%]", "top-5 [%]", "loss"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for form, words in FORMS.items():
        prefix = PREFIX[form]
        if f"{prefix}/top1" in metrics:
            top1, top5, loss = (metrics[f"{prefix}/{name}"] for name in ("top1", "top5", "loss"))
            table.add_row(words, f"{100 * top1:.2f}", f"{100 * top5:.2f}", f"{loss:.4f}")
    lines = []
    if "eval/forms/both_right" in metrics:
        *outcomes, different = outcome_table(metrics)[1]
        lines += [
            f"images: {', '.join(f'{count} {words}' for words, count, _ in outcomes)}; {different[1]} {different[0]}",
            f"logits: relative L2 difference {metrics['reparam/rel_l2_diff']:.2g}, "
            f"largest difference {metrics['reparam/max_abs_logit_diff']:.2g}",
        ]
    known = [row for row in classes if row[-1] is not None]
    hardest = sorted(known, key=lambda row: float(row[-1] or 0))[:5]
    lines.append(f"lowest top-1 [%]: {', '.join(f'{row[1]} ({100 * float(row[-1] or 0):.1f})' for row in hardest)}")
    for line in (title, table, *lines):
        console.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))
