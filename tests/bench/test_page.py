"""Tables, ratios and reasons on numbers that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from repvgg.bench.lines import Line, Setting
from repvgg.bench.page import Page, comparison, lines_table
from repvgg.bench.rounds import Result

CL = Setting("deploy", "float32", "eager", "channels_last")
NCHW = replace(CL, layout="contiguous")
ORT = Setting("deploy", "float32", "onnxruntime", "its own")
BF16 = replace(CL, precision="bfloat16")


def result(side: str, setting: Setting, *rounds: float, memory: int | None = None, model: str = "repvgg_a0") -> Result:
    return Result(Line(model, side, setting), 4, [[seconds] * 3 for seconds in rounds], memory)


OURS = [result("ours", CL, 0.01, 0.02, 0.04, memory=3 << 20), result("ours", NCHW, 0.02, 0.04, 0.08)]
THEIRS = [
    result("timm", CL, 0.03, 0.04, 0.08, memory=4 << 20),  # 3, 2, 2 times ours
    result("timm", NCHW, 0.01, 0.02, 0.04),  # half of the same conditions; ours by default is equally fast
    result("timm", ORT, 0.009, 0.019, 0.041),  # only ours by default is there
    result("timm", BF16, 0.01, 0.02, 0.04),  # no counterpart of ours
]


def rows(text: str) -> list[dict[str, str]]:
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def test_a_line_shows_rates_latencies_and_memory() -> None:
    ours, other = rows(lines_table([OURS[0], THEIRS[1]]))
    assert ours["images/s"] == "200 (100 … 400)"
    assert ours["call [ms]"] == "20 (10 … 40)"
    assert ours["95 % [ms]"] == "40"
    assert (ours["memory [MiB]"], other["memory [MiB]"]) == ("3", "")
    assert (ours["layout"], other["layout"], ours["whose"], other["whose"]) == (
        *("channels_last", "contiguous"),
        *("ours", "timm"),
    )


def test_columns_that_say_nothing_are_not_there() -> None:
    converted = Result(Line("repvgg_a0", "ours", Setting()), 0, [[0.1], [0.3], [0.2]])
    (row,) = rows(lines_table([converted]))
    assert row == {"model": "repvgg_a0", "whose": "ours", "call [ms]": "200 (100 … 300)", "95 % [ms]": "290"}


def test_ratios_are_within_a_round_and_to_the_default() -> None:
    text = comparison(OURS, THEIRS)
    same, contiguous, runtime = rows(text)
    assert same["ours, same conditions [×]"] == same["ours as it comes [×]"] == "2.00 (2.00 … 3.00)"
    assert same["memory, ours to theirs"] == "0.75"
    assert same["reason"] == ""
    assert contiguous["ours, same conditions [×]"] == "0.50 (0.50 … 0.50)"
    assert contiguous["ours as it comes [×]"] == "1.00 (1.00 … 1.00)"
    assert contiguous["reason"] == "…"
    assert runtime["ours, same conditions [×]"] == ""
    assert runtime["ours as it comes [×]"] == "0.95 (0.90 … 1.02)"
    assert runtime["reason"] == "1.00 is within the spread"
    assert "as it comes" in text.splitlines()[0]


def test_where_nothing_varies_there_is_one_ratio() -> None:
    assert "as it comes" not in comparison([result("ours", ORT, 0.01)], [result("timm", ORT, 0.02)])
    text = comparison(OURS[:1], THEIRS[:1])
    assert "as it comes" not in text
    assert list(rows(text)[0])[-2:] == ["ours, same conditions [×]", "memory, ours to theirs"]


RECORD = {"command": "python src/benchmark.py inference", "machine": {"threads": 1}}


def page(results: list[Result]) -> Page:
    return Page("inference", "Inference, measured", RECORD, "a machine", "of a process", results, ["x: why"])


def test_the_page_has_everything_and_json_every_time(tmp_path: Path) -> None:
    made = page([*OURS, *THEIRS])
    assert made.write(tmp_path / "new") == tmp_path / "new" / "inference.png"
    assert (tmp_path / "new" / "inference.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new" / "inference.md").read_text()
    assert text == f"{made.text}\n"
    for part in ("`python src/benchmark.py inference`", "a machine", "Memory: of a process", "- x: why"):
        assert part in text
    content = json.loads((tmp_path / "new" / "inference.json").read_text())
    assert content["machine"] == {"threads": 1}
    assert content["left_out"] == ["x: why"]
    line = content["lines"][2]
    assert (line["model"], line["side"], line["layout"]) == ("repvgg_a0", "timm", "channels_last")
    assert line["seconds"] == [[0.03] * 3, [0.04] * 3, [0.08] * 3]
    assert line["memory_bytes"] == 4 << 20
    ratios = [ratio["speed_of_ours"]["median"] for ratio in content["ratios"]]
    assert ratios == pytest.approx([2, 0.5, 1, 0.95])  # once where ours by default has the same conditions
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_without_another_implementation_nothing_is_compared() -> None:
    assert "beside others" not in page(OURS).text
    assert page(OURS).content["ratios"] == []


def test_bars_are_told_apart_by_what_differs() -> None:
    made = page([OURS[0], THEIRS[0]])
    assert [made._label(result.line) for result in made.results] == ["repvgg_a0 ours", "repvgg_a0 timm"]
