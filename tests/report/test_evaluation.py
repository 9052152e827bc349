"""The tables of an evaluation."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from repvgg.deploy.int8 import LayerNoise
from repvgg.report.evaluation import print_evaluation, tables, write_csv
from repvgg.report.record import RunRecord
from repvgg.report.table import top1

METRICS = {
    "eval/images": 8.0,
    "eval/forms/both_right": 4.0,
    "eval/forms/only_train_form_right": 1.0,
    "eval/forms/only_deploy_right": 0.0,
    "eval/forms/both_wrong": 3.0,
    "eval/forms/different_answer": 2.0,
    "reparam/rel_l2_diff": 2e-7,
    "reparam/max_abs_logit_diff": 1e-5,
    **{"eval/top1": 0.625, "eval/top5": 1.0, "eval/loss": 1.5},
    **{"eval/deploy/top1": 0.5, "eval/deploy/top5": 1.0, "eval/deploy/loss": 1.25},
}
NAMES = ["tench, Tinca tinca", 'a "gold" fish', "shark"]
RIGHT = {"train_form": [4, 1, 0], "deploy": [3, 1, 0]}
CONFUSION = {"deploy": [[3, 1, 0], [3, 1, 0], [0, 0, 0]]}


def test_tables_are_what_was_counted(tmp_path: Path) -> None:
    made = tables(NAMES, [4, 4, 0], RIGHT, CONFUSION, METRICS)
    assert list(made) == ["per_class", "forms", "confusion_deploy"]
    read = {}
    for name, table in made.items():
        write_csv(tmp_path / f"{name}.csv", table)
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            read[name] = list(csv.reader(file))
    assert read["per_class"] == [
        ["class", "name", "images", "top1_train_form", "top1_deploy"],
        ["0", "tench, Tinca tinca", "4", "1.0", "0.75"],
        ["1", 'a "gold" fish', "4", "0.25", "0.25"],
        ["2", "shark", "0", "", ""],  # no image, no accuracy
    ]
    assert read["forms"][1:] == [
        ["both right", "4", "0.5"],
        ["only the train form right", "1", "0.125"],
        ["only the deploy form right", "0", "0.0"],
        ["both wrong", "3", "0.375"],
        ["different answers", "2", "0.25"],
    ]
    assert read["confusion_deploy"][1] == ["tench, Tinca tinca", "3", "1", "0"]
    assert list(tables(NAMES, [4, 4, 0], {"deploy": [3, 1, 0]}, {}, {})) == ["per_class"]


def test_int8_is_a_third_form() -> None:
    metrics = {
        **METRICS,
        **{"eval/int8/top1": 0.25, "eval/int8/top5": 0.75, "eval/int8/loss": 2.5},
        **{"eval/forms_int8/both_right": 1.0, "eval/forms_int8/only_deploy_right": 3.0},
        **{"eval/forms_int8/only_int8_right": 1.0, "eval/forms_int8/both_wrong": 3.0},
        **{"eval/forms_int8/different_answer": 5.0, "int8/rel_l2_diff": 0.25, "int8/max_abs_logit_diff": 3.5},
        **{"int8/output_db_min": 12.34, "int8/weight_db_min": 23.45},
    }
    layers = [LayerNoise("stem.conv", 40.5, 41.5, 3.0), LayerNoise("head", 50.5, 12.34, 1.0)]
    made = tables(NAMES, [4, 4, 0], {**RIGHT, "int8": [1, 1, 0]}, {}, metrics, layers)
    assert list(made) == ["per_class", "forms", "forms_int8", "int8_layers"]
    assert made["per_class"][0][-3:] == ["top1_train_form", "top1_deploy", "top1_int8"]
    assert made["forms"] == tables(NAMES, [4, 4, 0], RIGHT, {}, METRICS)["forms"]
    assert made["forms_int8"][1] == [
        ["both right", 1, 0.125],
        ["only the deploy form right", 3, 0.375],
        ["only the int8 form right", 1, 0.125],
        ["both wrong", 3, 0.375],
        ["different answers", 5, 0.625],
    ]
    assert made["int8_layers"][0] == ["name", "weight_db", "output_db", "channel_range"]
    assert made["int8_layers"][1][1] == ["head", 50.5, 12.34, 1.0]
    only_deployed = tables(NAMES, [4, 4, 0], {"deploy": [3, 1, 0], "int8": [1, 1, 0]}, {}, metrics)
    assert list(only_deployed) == ["per_class", "forms_int8"]

    console = Console(width=120, file=io.StringIO())
    print_evaluation("best.ckpt: 8 images", metrics, made["per_class"][1], console)
    text = console.file.getvalue()
    lines = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert lines["int8"][-3:] == ["25.00", "75.00", "2.5000"]
    assert "int8 images: 1 both right, 3 only the deploy form right, 1 only the int8 form right" in text
    assert "int8 logits: relative L2 difference 0.25, largest difference 3.5" in text
    assert "at least 12.3 dB in the outputs, 23.4 dB in the weights (int8_layers.csv)" in text


@pytest.mark.parametrize("width", [50, 120])
def test_the_terminal_shows_percent_and_both_forms(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    _, rows = tables(NAMES, [4, 4, 0], RIGHT, {}, METRICS)["per_class"]
    print_evaluation("best.ckpt: 8 images", METRICS, rows, console)
    text = console.file.getvalue()
    lines = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert lines["train form"][-3:] == ["62.50", "100.00", "1.5000"]
    assert lines["deploy"][-3:] == ["50.00", "100.00", "1.2500"]
    assert "1 only the train form right" in text
    assert 'lowest top-1 [%]: a "gold" fish (25.0), tench, Tinca tinca (75.0)\n' in text  # of the deploy form; no shark


def test_a_sweep_of_evaluations_has_its_accuracies_in_the_summary(tmp_path: Path) -> None:
    assert top1(RunRecord(tmp_path, "finished", metrics=METRICS)) == (0.625, 0.5, "eval")
    only_deploy = {"eval/deploy/top1": 0.5, "val/top1": 0.1}
    assert top1(RunRecord(tmp_path, "finished", metrics=only_deploy)) == (None, 0.5, "eval")
