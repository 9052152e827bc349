import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from repvgg.report import table
from repvgg.report.record import RunRecord

Make = Callable[..., RunRecord]
#: Of the paper's numbers.
PAPERS = {"data": "imagenet", "recipe": "paper_120"}


@pytest.fixture
def paper() -> table.Paper:
    return table.load_paper()


def number(cell: str) -> float | None:
    return float(cell.replace(",", "")) if cell else None


def from_markdown(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_papers_numbers_are_table_6(make_run: Make, paper: table.Paper) -> None:
    assert {name: row["top1"] for name, row in paper.ablations.items()} == {
        "plain": 0.7239, "id": 0.7479, "1x1": 0.7315, "full": 0.7514,
    }  # fmt: skip
    assert {name: row["images_per_s_train_form"] for name, row in paper.ablations.items()} == {
        "plain": 1810, "id": 1569, "1x1": 1230, "full": 1061,
    }  # fmt: skip
    assert (paper.choices, paper.epochs) == ({"model": "repvgg_b0", "data": "imagenet", "recipe": "paper_120"}, 120)
    assert (paper.name, paper.setting, paper.speed) == ("Table 6", "B0 on ImageNet, 120 epochs", "train_form")
    assert paper.number(make_run(0, "id"), "top1") == 0.7479
    assert paper.number(make_run(1, "acb"), "top1") is None
    assert paper.number(RunRecord(Path(), "finished"), "top1") is None


def test_the_papers_speeds_are_of_the_form_that_its_table_has(make_run: Make) -> None:
    record = make_run(0, "full", model="repvgg_b1", **PAPERS)
    row = table.table([record], table.load_paper(table.EXPERIMENTS / "table4.yaml")).iloc[0]
    assert (row["paper top-1 [%]"], row["paper deploy [images/s]"]) == (pytest.approx(78.37), 685)
    assert "paper train form [images/s]" not in row
    int8 = table.load_paper(table.EXPERIMENTS / "int8.yaml")  # of no form
    assert not {*table.PAPER_SPEED.values()} & {*table.table([record], int8).columns}
    assert (
        "int8 table of arXiv 2212.01593 is of A0 on ImageNet, 120 epochs (one run each). Its"
        in table.notes([record], int8)[0]
    )


def test_an_experiment_file_without_the_papers_side_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("what: nothing\n")
    with pytest.raises(ValueError, match=r"x\.yaml lacks 'paper': an experiment file holds"):
        table.load_paper(tmp_path / "x.yaml")


def test_values_and_units(make_run: Make, paper: table.Paper) -> None:
    frame = table.table([make_run(0, "1x1", seed=3, **PAPERS)], paper)
    row = frame.iloc[0]
    assert [*frame.columns] == [
        "run", "status", "model", "ablation", "seed", "parameters train form", "parameters deploy",
        "top-1 train form [%]", "top-1 deploy [%]", "deploy − train form [pp]", "logits rel. L2 difference",
        "train form [images/s]", "deploy [images/s]", "speed-up [×]", "paper top-1 [%]", "paper train form [images/s]",
    ]  # fmt: skip
    assert [*row[:7]] == ["0", "finished", "repvgg_b0", "1x1", 3, 15817960, 14339048]
    assert [*row[7:]] == pytest.approx([95.25, 95.5, 0.25, 3.25e-6, 300, 630, 2.1, 73.15, 1230])


def test_without_a_test_both_forms_are_the_last_validation_and_the_table_says_so(
    make_run: Make, paper: table.Paper
) -> None:
    record = make_run(0, metrics={"val/top1": 0.5, "val/deploy/top1": 0.25})
    row = table.table([record], paper).iloc[0]
    assert (row[table.TOP1_TRAIN], row[table.TOP1_DEPLOY], row[table.TOP1_DIFF]) == (50, 25, -25)
    assert any("run 0: the last validation" in note for note in table.notes([record], paper))
    # one form of the test beside the other form of the validation would be a difference of nothing
    half = make_run(1, metrics={"val/top1": 0.5, "val/deploy/top1": 0.5, "test/top1": 0.75})
    assert table.top1(half) == (0.75, None, "test")


def test_a_failed_run_is_a_row_and_says_why(make_run: Make, paper: table.Paper) -> None:
    records = [
        make_run(0, "plain", **PAPERS),
        make_run(1, "custom", status="failed", metrics={}, error="RuntimeError: no | good"),
    ]
    frame, notes = table.table(records, paper), table.notes(records, paper)
    assert frame["status"].tolist() == ["finished", "failed"]
    assert frame[table.TOP1_DEPLOY].isna().tolist() == [False, True]
    rows = from_markdown(table.to_markdown(frame, notes))
    assert rows[1]["status"] == "failed"
    assert (rows[1]["ablation"], rows[1][table.PAPER_TOP1], rows[1][table.PARAMS_DEPLOY]) == ("custom", "", "")
    assert "Run 1: failed (RuntimeError: no | good)." in table.to_markdown(frame, notes)


def test_markdown_and_csv_parse_back_to_the_numbers(make_run: Make, paper: table.Paper) -> None:
    records = [make_run(i, name) for i, name in enumerate(("plain", "id", "1x1", "full"))]
    frame = table.table(records, paper)
    from_csv = list(csv.DictReader(io.StringIO(table.to_csv(frame))))
    for i, (md, exact) in enumerate(zip(from_markdown(table.to_markdown(frame)), from_csv, strict=True)):
        assert (md["run"], md["ablation"]) == (str(i), ("plain", "id", "1x1", "full")[i])
        for name in (name for name in frame.columns if name in table.NUMBERS):
            value = float(frame[name].iloc[i])
            assert float(exact[name]) == value
            assert number(md[name]) == pytest.approx(value, rel=0.02, abs=0.005)
        assert number(md[table.PARAMS_TRAIN]) == 15817960


def test_no_number_of_the_paper_stands_beside_another_network_input_or_recipe(
    make_run: Make, paper: table.Paper
) -> None:
    whole = {
        "net": {"depths": [4, 6, 16, 1], "width_a": 1.0, "width_b": 2.5, "groups": 1},
        "data": {"resolution": 224, "num_classes": 1000},
        "recipe": {"lr": 0.1, "epochs": 120, "optimizer": {"momentum": 0.9}},
        "trainer": {"max_epochs": 120, "limit_train_batches": None},
        **{"callbacks": {"ema": None}, "init_from": None},
    }
    same = make_run("same", config=whole, **PAPERS)
    assert paper.departures(same) == {}
    assert paper.beside(same, "top1") == 0.7514
    assert not any("paper" in note for note in table.notes([same], paper))
    for i, (node, key, value, says) in enumerate(
        [
            ("net", "width_a", 0.25, "net.width_a 0.25 (there 1)"),
            ("net", "depths", [1, 2, 3, 1], "net.depths [1, 2, 3, 1] (there [4, 6, 16, 1])"),
            ("data", "resolution", 192, "data.resolution 192 (there 224)"),
            ("recipe", "lr", 0.2, "recipe.lr 0.2 (there 0.1)"),
            ("recipe", "optimizer", {"momentum": 0.8}, "recipe.optimizer.momentum 0.8 (there 0.9)"),
            ("trainer", "max_epochs", 1, "trainer.max_epochs 1 (there 120)"),
            ("trainer", "limit_train_batches", 5, "trainer.limit_train_batches 5 (there None)"),
            ("callbacks", "ema", {"decay": 0.9}, "callbacks.ema {'decay': 0.9} (there None)"),
        ]
    ):
        other = make_run(i, config={**whole, node: {**whole[node], key: value}}, **PAPERS)
        frame = table.table([same, other], paper)
        assert frame[table.PAPER_TOP1].isna().tolist() == [False, True], key
        assert frame[table.PAPER_SPEED["train_form"]].isna().tolist() == [False, True]
        (note,) = [note for note in table.notes([same, other], paper) if "paper" in note]
        assert note == (
            "The paper's Table 6 is of B0 on ImageNet, 120 epochs (one run each, a 1080Ti for the images/s). Its "
            f"numbers do not stand beside runs that depart from that: {says}."
        )
        assert table.PAPER_TOP1 not in table.table([other], paper)


def test_a_choice_stands_for_the_values_that_it_brings(make_run: Make, paper: table.Paper) -> None:
    config = {"net": {"depths": [2, 4, 14, 1], "width_a": 0.75}, "recipe": {"lr": 0.005}, "data": {"resolution": 32}}
    other = make_run(0, model="repvgg_a0", config=config)
    assert paper.departures(other).keys() == {"model", "data", "recipe"}
    (note,) = [note for note in table.notes([other, make_run(1, "id")], paper) if "paper" in note]
    assert "model repvgg_a0 (there repvgg_b0), data digits (there imagenet), recipe quick (there paper_120)." in note
    assert note.endswith("The differences and the order of its rows are given all the same.")
    models = table.load_paper(table.EXPERIMENTS / "table4.yaml")  # whose rows say the network
    assert models.departures(other).keys() == {"data", "recipe"}


def test_throughputs_under_different_settings_are_pointed_out(make_run: Make, paper: table.Paper) -> None:
    a, b = make_run(0), make_run(1)
    assert "images/s: batch 64, float32, 32 px, cpu." in table.notes([a, b], paper)
    b.config["bench"]["batch"] = 128
    del b.config["bench"]["device"]
    b.config["device"] = "some GPU"
    assert any(
        "under different settings: batch 128, float32, 32 px, some GPU; batch 64" in note
        for note in table.notes([a, b], paper)
    )


def test_labels_say_what_differs_and_are_unique(make_run: Make) -> None:
    a, b = make_run(0, "plain"), make_run(1, "id")
    assert table.labels([a, b]) == ["plain", "id"]
    c = make_run(2, "id", seed=1)
    assert table.labels([a, b, c]) == ["plain seed 0", "id seed 0", "id seed 1"]
    assert table.labels([a]) == ["(0)"]
    long = make_run("7_" + "recipe.lr=0.1," * 9 + "seed=1", "id")
    assert table.labels([b, c, long])[2] == "seed 0 (7_recipe.lr=0.1,…pe.lr=0.1,seed=1)"
    assert table.labels([a, b, make_run(3, "id")]) == ["plain (0)", "id (1)", "id (3)"]


@pytest.mark.parametrize("width", [60, 80, 120, 220])
def test_the_terminal_table_shows_every_digit_at_any_width(make_run: Make, paper: table.Paper, width: int) -> None:
    records = [
        make_run(f"{i}_ablation={name}", name, **PAPERS) for i, name in enumerate(("plain", "id", "1x1", "full"))
    ]
    out = io.StringIO()
    console = Console(file=out, width=width)
    table.print_table(table.table(records, paper), table.notes(records, paper), console)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for value, count in {"15,817,960": 4, "14,339,048": 4, "95.50": 4, "3.2e-06": 4, "72.39": 1, "1,061": 1}.items():
        assert text.count(value) == count, (value, text)
    assert "[images/s]" in text, "rich would take it for markup"
    assert "…" not in text


def test_int8_has_columns_where_a_run_measured_it(make_run: Make, paper: table.Paper) -> None:
    measured = {"test/top1": 0.75, "test/deploy/top1": 0.74, "test/int8/top1": 0.5, "int8/rel_l2_diff": 0.125}
    # of another source than the other forms: the last validation's
    validated = {"test/top1": 0.75, "test/deploy/top1": 0.74, "val/int8/top1": 0.6, "int8/rel_l2_diff": 0.5}
    records = [make_run("a", metrics=measured), make_run("b", metrics=validated), make_run("c")]
    frame = table.table(records, paper)
    assert frame[table.TOP1_INT8].tolist()[0] == 50
    assert frame[table.INT8_DIFF].tolist()[0] == pytest.approx(-24)
    assert frame[table.INT8_LOGIT_DIFF].tolist()[0] == 0.125
    assert frame.loc[1:, [table.TOP1_INT8, table.INT8_DIFF, table.INT8_LOGIT_DIFF]].isna().all(axis=None)
    assert "| 50.00 | -24.00 | 1.2e-01 |" in table.to_markdown(frame)
    assert not {table.TOP1_INT8, table.INT8_DIFF, table.INT8_LOGIT_DIFF} & {*table.table(records[2:], paper).columns}
