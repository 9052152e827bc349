"""Who is measured when, and what the times say, on numbers that can be checked by hand."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.bench.lines import Line, Setting
from repvgg.bench.rounds import Program, Result, Spread, measure, percentile_95, visits

SETTINGS = [Setting("deploy", precision) for precision in ("float32", "bfloat16", "int8", "float16", "x", "y")]


def lines(settings: int, sides: int) -> list[Line]:
    return [Line("m", f"side{side}", setting) for setting in SETTINGS[:settings] for side in range(sides)]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
def test_a_round_visits_every_line_once_and_what_is_compared_together(settings, sides, turn, seed) -> None:
    all_lines = lines(settings, sides)
    order = visits(all_lines, turn, seed)
    assert Counter(order) == Counter(all_lines)
    assert order == visits(all_lines, turn, seed)
    for start in range(0, len(order), sides):
        assert len({line.setting for line in order[start : start + sides]}) == 1


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_every_side_is_first_equally_often(settings: int, sides: int, seed: int) -> None:
    firsts = Counter(
        (line.setting, line.side)
        for turn in range(3 * sides)
        for line in visits(lines(settings, sides), turn, seed)[::sides]
    )
    assert set(firsts.values()) == {3}
    assert len(firsts) == settings * sides


def test_the_order_of_settings_changes_with_round_and_seed() -> None:
    all_lines = lines(6, 1)
    assert len({tuple(visits(all_lines, turn, 0)) for turn in range(6)}) > 3
    assert len({tuple(visits(all_lines, 0, seed)) for seed in range(6)}) > 3


def test_every_visit_warms_up_and_times_its_calls() -> None:
    called: list[str] = []
    two = lines(1, 2)
    programs = {line: Program(lambda line=line: called.append(line.side)) for line in two}
    measured = list(measure(programs, rounds=2, warmup=1, batches=2, seed=0))
    assert [line.side for line, _ in measured] == ["side0", "side1", "side1", "side0"]
    assert called == ["side0"] * 3 + ["side1"] * 6 + ["side0"] * 3
    assert all(len(times) == 2 for _, times in measured)


def test_only_the_timed_calls_are_in_the_times() -> None:
    slow_at_first = iter([0.2, 0.0, 0.0])
    programs = {lines(1, 1)[0]: Program(lambda: time.sleep(next(slow_at_first)))}
    ((_, times),) = measure(programs, rounds=1, warmup=1, batches=2, seed=0)
    assert sum(times) < 0.2


A = Result(lines(1, 2)[0], 10, [[1, 2, 9], [4, 4, 4], [2, 2, 8]])
B = Result(lines(1, 2)[1], 10, [[4, 4, 4], [2, 8, 4], [1, 1, 1]])


def test_medians_of_rounds_and_ratios_within_a_round() -> None:
    assert A.round_seconds == [2, 4, 2]
    assert A.images_per_s == Spread(5, 2.5, 5)
    assert A.latency == Spread(4, 1, 9)
    assert A.speed_to(B) == Spread(1, 0.5, 2)  # 4/2, 4/4, 1/2
    assert B.speed_to(A) == Spread(1, 0.5, 2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        A.speed_to(Result(B.line, 10, B.seconds[:2]))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_the_95th_percentile_is_numpys(values: list[float]) -> None:
    assert percentile_95(values) == pytest.approx(np.percentile(values, 95))
