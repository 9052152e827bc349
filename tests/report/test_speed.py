"""The table of speeds, its ratios and its rank correlation, on numbers that can be checked by hand."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.report.speed import Speed, page, paper_speeds, rank_agreement, speed_table, write

PAPER = {"repvgg_b0": 1000.0, "repvgg_a0": 2000.0, "repvgg_b1": 400.0}
SPEEDS = [
    Speed("repvgg_a0", [100, 120, 110], [150, 360, 220]),
    Speed("repvgg_b0", [50, 60, 55], [100, 120, 110]),
    Speed("repvgg_d2se", [1, 2, 3], [4.04, 5, 6]),
]


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in lines}


def test_medians_ranges_and_ratios() -> None:
    table = rows(speed_table(SPEEDS, PAPER))
    assert table["repvgg_a0"] == [
        "110 (100 … 120)",
        "220 (150 … 360)",
        "2.00 (1.50 … 3.00)",  # within a round: 1.5, 3, 2
        "2.00",  # of 1.5, 3, 2
        "2,000",
        "2.00",
    ]
    assert table["repvgg_b0"][3:] == ["1.00", "1,000", "1.00"]
    assert table["repvgg_d2se"] == ["2 (1 … 3)", "5 (4.04 … 6)", "2.50 (2.00 … 4.04)", "0.04", "", ""]
    without = rows(speed_table(SPEEDS[:1], PAPER))["repvgg_a0"]
    assert without[3:] == ["", "2,000", "2.00"]


def test_the_papers_speeds_are_of_tables_4_and_5() -> None:
    paper = paper_speeds()
    assert (paper["repvgg_a0"], paper["repvgg_b0"], paper["repvgg_b3"], paper["repvgg_b3g4"]) == (3256, 1817, 363, 464)
    assert len(paper) == 11
    assert "repvgg_d2se" not in paper


@given(st.permutations([1.0, 2.0, 3.0, 4.0, 5.0]))
def test_kendalls_tau_counts_pairs_in_order(ours: list[float]) -> None:
    paper = {f"m{i}": float(i) for i in range(5)}
    speeds = [Speed(f"m{i}", [1.0], [value]) for i, value in enumerate(ours)]
    agreeing = sum((ours[i] < ours[j]) - (ours[i] > ours[j]) for i, j in combinations(range(5), 2))
    squares = sum((i + 1 - value) ** 2 for i, value in enumerate(ours))
    said = rank_agreement([*speeds, Speed("not in the paper", [1], [9])], paper)
    assert f"τ = {agreeing / 10:.3f}, n = 5 variants" in said.replace("-0.000", "0.000")
    rho = float(said.split("ρ = ")[1].split(",")[0])
    assert rho == pytest.approx(1 - 6 * squares / (5 * 24), abs=6e-4)


def test_one_variant_has_no_order() -> None:
    assert "1 of them in the paper, too few" in rank_agreement(SPEEDS[:1], PAPER)


def test_table_record_and_picture_are_written(tmp_path: Path) -> None:
    text = page("python src/benchmark.py speed", "a machine", SPEEDS)
    write(tmp_path / "new", SPEEDS, text, {"images_per_s": {"a": [1.5]}})
    assert (tmp_path / "new" / "speed.md").read_text() == f"{text}\n"
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == {"images_per_s": {"a": [1.5]}}
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3
