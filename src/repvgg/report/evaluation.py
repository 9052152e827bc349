"""The tables of one evaluation: every class, which of two forms is right, confusions, and what a terminal shows.

Files hold fractions of 1; the terminal shows percent, and says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

#: The forms as keys and in words.
FORMS = {"train_form": "train form", "deploy": "deploy", "int8": "int8"}
#: Where the numbers of a form are, and which of the forms is right, in the metrics of an evaluation.
PREFIX = {"train_form": "eval", "deploy": "eval/deploy", "int8": "eval/int8"}
#: Of two forms that are compared: the table's name, and what happens to an image.
PAIRS = {("train_form", "deploy"): "forms", ("deploy", "int8"): "forms_int8"}
ALONE = {
    "train_form": "only the train form right",
    "deploy": "only the deploy form right",
    "int8": "only the int8 form right",
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
    layers: Sequence[Any] = (),
) -> dict[str, Table]:
    """What an evaluation leaves as CSV files, by their names.

    Args:
        names: of the classes, in the order of the labels.
        images: of every class.
        right: for every form, the images of every class that it recognises.
        confusion: for every form, images by true class (row) and answer; may be empty.
        metrics: ``eval/forms/*`` where there are two forms, ``eval/forms_int8/*`` where one is int8.
        layers: of the int8 form, as dataclasses of name and numbers.
    """
    out = {"per_class": class_table(names, images, right)}
    out |= {table: outcome_table(metrics, *pair) for pair, table in PAIRS.items() if set(pair) <= right.keys()}
    if layers:
        rows = [asdict(layer) for layer in layers]
        out["int8_layers"] = (list(rows[0]), [list(row.values()) for row in rows])
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


def outcome_table(metrics: Mapping[str, float], first: str, second: str) -> Table:
    """How many images which of two forms gets right, and how many they answer differently."""
    counts = {
        "both_right": "both right",
        f"only_{first}_right": ALONE[first],
        f"only_{second}_right": ALONE[second],
        "both_wrong": "both wrong",
        "different_answer": "different answers",
    }
    found = {words: metrics[f"eval/{PAIRS[first, second]}/{key}"] for key, words in counts.items()}
    rows: list[list[Cell]] = [[words, round(count), count / metrics["eval/images"]] for words, count in found.items()]
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
    """All forms side by side, then where they differ and which classes are hardest.

    Args:
        title: what was evaluated, on what.
        metrics: ``eval/*``, ``reparam/*`` and ``int8/*``.
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
    for (first, second), name in PAIRS.items():
        if f"eval/{name}/both_right" not in metrics:
            continue
        *outcomes, different = outcome_table(metrics, first, second)[1]
        which, apart = ("int8 ", "int8") if second == "int8" else ("", "reparam")
        lines += [
            f"{which}images: {', '.join(f'{count} {words}' for words, count, _ in outcomes)}; "
            f"{different[1]} {different[0]}",
            f"{which}logits: relative L2 difference {metrics[f'{apart}/rel_l2_diff']:.2g}, "
            f"largest difference {metrics[f'{apart}/max_abs_logit_diff']:.2g}",
        ]
    if "int8/output_db_min" in metrics:
        lines.append(
            f"int8 layers: signal to quantization noise of at least {metrics['int8/output_db_min']:.1f} dB in the "
            f"outputs, {metrics['int8/weight_db_min']:.1f} dB in the weights (int8_layers.csv)"
        )
    known = [row for row in classes if row[-1] is not None]
    hardest = sorted(known, key=lambda row: float(row[-1] or 0))[:5]
    lines.append(f"lowest top-1 [%]: {', '.join(f'{row[1]} ({100 * float(row[-1] or 0):.1f})' for row in hardest)}")
    for line in (title, table, *lines):
        console.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))
