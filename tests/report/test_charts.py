from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.report import charts, page
from repvgg.report.compare import Comparison, compare
from repvgg.report.record import RunRecord
from repvgg.report.runs import read_runs

Make = Callable[..., RunRecord]
SHARES = {f"health/share/stage{i}/{kind}": 0.5 for i in (1, 2) for kind in ("conv3x3", "identity")}


def metrics(top1: float, speed: float = 300.0, **more: float) -> dict[str, float]:
    forms = {"train_form": speed, "deploy": 2 * speed}
    return {
        **{"test/top1": top1, "test/deploy/top1": top1, "bench/speedup": 2.0},
        **{f"bench/{form}/images_per_s": value for form, value in forms.items()},
        **SHARES,
        **more,
    }


@pytest.fixture
def comparison(make_run: Make, tmp_path: Path) -> Comparison:
    for seed, (full, plain) in enumerate([(0.75, 0.70), (0.76, 0.72), (0.74, 0.69)]):
        make_run(f"full-{seed}", "full", seed=seed, metrics=metrics(full), curve=(0.25, 0.5 + seed / 10))
        make_run(f"plain-{seed}", "plain", seed=seed, metrics=metrics(plain, 400), curve=(0.25, 0.5))
    return compare(read_runs([str(tmp_path)])[0])


def test_the_forest_plot_shows_every_seed_the_interval_and_the_paper(comparison: Comparison) -> None:
    figure, words = charts.charts(comparison)["top1"]
    top1, differences = figure.axes
    assert [label.get_text() for label in top1.get_yticklabels()] == ["full", "plain"]
    seeds = [sorted(line.get_xdata()) for line in top1.lines if len(line.get_xdata()) == 3]
    assert seeds == [pytest.approx([74, 75, 76]), pytest.approx([69, 70, 72])]
    found = comparison.groups[1].difference
    assert found is not None
    drawn = [list(line.get_xdata()) for line in differences.lines]
    assert pytest.approx([-5, -4, -5]) in drawn
    assert [found.low, found.high] in drawn
    assert [pytest.approx(72.39 - 75.14)] in drawn
    assert "filled" in words
    low, high = differences.get_xlim()
    assert low < found.low < found.high < high


def test_curves_are_means_over_seeds_of_both_forms(comparison: Comparison) -> None:
    figure, _ = charts.charts(comparison)["curves"]
    panel = next(axes for axes in figure.axes if axes.get_title(loc="left") == "full")
    assert list(panel.lines[-1].get_xdata()) == [1, 2]
    assert list(panel.lines[-1].get_ydata()) == pytest.approx([25, 60])


def test_speed_has_an_arrow_from_each_form_to_the_other(comparison: Comparison) -> None:
    figure, _ = charts.charts(comparison)["speed"]
    (axes,) = figure.axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert sorted(points) == [(300, 75), (400, pytest.approx(70.3333)), (600, 75), (800, pytest.approx(70.3333))]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["plain", "full"]
    assert "cpu" in axes.get_xlabel()


def test_what_was_not_measured_has_no_picture(make_run: Make, tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(seed, seed=seed, metrics={"test/top1": 0.5, "test/deploy/top1": 0.5}, curve=())
    assert [*charts.charts(compare(read_runs([str(tmp_path)])[0]))] == ["top1"]
    assert charts.charts(compare(read_runs([str(tmp_path / "1")])[0])) == {}  # one number is no picture


def test_speeds_of_two_machines_are_not_in_one_picture(make_run: Make, tmp_path: Path) -> None:
    for i, device in enumerate(("cpu", "some GPU")):
        bench = {"batch": 64, "dtype": "float32", "device": device, "resolution": 32}
        make_run(i, seed=i, config={"bench": bench, "device": device})
    assert "speed" not in charts.charts(compare(read_runs([str(tmp_path)])[0]))


@pytest.mark.parametrize(("other", "even"), [(650.0, True), (900.0, False)])
def test_an_uneven_machine_has_no_pareto_front(make_run: Make, tmp_path: Path, other: float, even: bool) -> None:
    """Both ablations deploy to one network, so its two speeds say how even the machine was."""
    for ablation, speed in (("full", 600.0), ("plain", other)):
        more = {"macs/deploy": 1e6, "params/deploy": 1000.0, "bench/deploy/images_per_s": speed}
        for seed in (1, 2):
            make_run(f"{ablation}-{seed}", ablation, seed=seed, metrics=metrics(0.5 + 0.01 * seed, **more))
    comparison = compare(read_runs([str(tmp_path)])[0])
    assert comparison.unevenness == pytest.approx(other / 600)
    _, words = charts.charts(comparison)["speed"]
    assert ("more accurate than a point of the Pareto front" in words) == even
    said = "\n".join(page.reading(comparison))
    assert ("at speeds up to 1.5 times apart" in said) == (not even)


def test_shares_are_means_over_seeds(make_run: Make, tmp_path: Path) -> None:
    for seed, share in enumerate((0.2, 0.4)):
        more = {"health/share/stage1/identity": share, "health/share/stage2/identity": float("nan")}
        make_run(seed, seed=seed, metrics=metrics(0.5, **more))
    (group,) = compare(read_runs([str(tmp_path)])[0]).groups
    shares = charts.branch_shares(group)
    assert shares["identity"] == {"stage1": (pytest.approx(0.3), pytest.approx(0.02**0.5))}
    assert shares["conv3x3"]["stage2"] == (0.5, 0.0)


# few values, so that points share a coordinate
points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1)


@given(points)
def test_the_front_is_what_no_other_point_is_better_than(drawn: list[tuple[float, float]]) -> None:
    def dominated(p: tuple[float, float]) -> bool:
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in drawn)

    assert charts.pareto_front(drawn) == sorted({p for p in drawn if not dominated(p)})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_keep_their_order_and_distance(heights: list[float]) -> None:
    heights = sorted(heights)
    placed = charts.spread_apart(heights, 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(placed))
    assert min(placed) >= 0
    assert max(placed) <= 1 + 1e-9
    if all(b - a >= 0.05 for a, b in pairwise(heights)):
        assert placed == pytest.approx(heights)
