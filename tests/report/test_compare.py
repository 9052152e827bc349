"""Against scipy's paired test, definitions written out anew, and laws that hold for all runs."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repvgg.report import page
from repvgg.report.compare import Comparison, Difference, Group, compare, holm, paired
from repvgg.report.runs import Run
from repvgg.report.table import TOP1_DEPLOY, TOP1_TRAIN, load_paper, paper_of

FULL, PLAIN = [0.75, 0.76, 0.74, 0.77], [0.72, 0.74, 0.73, 0.72]


def run(
    ablation: str = "full",
    seed: int | None = 1,
    top1: float | None = 0.75,
    *,
    status: str = "finished",
    name: str | None = None,
    minutes: int = 0,
    config: dict[str, Any] | None = None,
    evaluation: bool = False,
    **choices: str,
) -> Run:
    chosen = {"model": "repvgg_b0", "ablation": ablation, "data": "digits", "recipe": "quick"} | choices
    metrics = {} if top1 is None else {"test/top1": top1, "test/deploy/top1": top1}
    return Run(
        run_dir=Path(name or f"{ablation}-{seed}"),
        status=status,
        config={"choices": chosen, "seed": seed, "git": {"sha": "a" * 40}} | (config or {}),
        metrics=metrics,
        name=name or f"{ablation}-{seed}",
        started=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes),
        evaluation=evaluation,
    )


def runs_of(ablation: str, values: Sequence[float], **more: Any) -> list[Run]:
    return [run(ablation, seed, value, **more) for seed, value in enumerate(values, start=1)]


def group(comparison: Comparison, label: str) -> Group:
    (found,) = [g for g in comparison.groups if g.label == label]
    return found


def difference(comparison: Comparison, label: str) -> Difference:
    found = group(comparison, label).difference
    assert found is not None
    return found


def test_the_difference_is_scipys_paired_test() -> None:
    comparison = compare([*runs_of("full", FULL), *runs_of("plain", PLAIN)])
    ours = difference(comparison, "plain")
    theirs = stats.ttest_rel(100 * np.array(PLAIN), 100 * np.array(FULL))
    interval = theirs.confidence_interval(0.95)
    assert ours.mean == pytest.approx(100 * (np.mean(PLAIN) - np.mean(FULL)))
    assert ours.sd == pytest.approx(np.std(100 * (np.array(PLAIN) - FULL), ddof=1))
    assert (ours.low, ours.high, ours.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))
    assert ours.p_holm == ours.p
    assert [*ours.by_seed] == [1, 2, 3, 4]
    spread = group(comparison, "full").spread(TOP1_DEPLOY)
    assert spread is not None
    assert (spread.mean, spread.sd, spread.n) == pytest.approx((75.5, np.std([75, 76, 74, 77], ddof=1), 4))
    assert group(comparison, "full").is_reference


def test_the_interval_by_hand() -> None:
    # t of 2 degrees of freedom at 97.5 %: 4.302653
    found = paired({1: 1.0, 2: 2.0, 3: 3.0})
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert not found.excludes_zero
    assert paired({1: 1.9, 2: 2.0, 3: 2.1}).excludes_zero


def test_only_the_seeds_that_both_have_are_pairs() -> None:
    comparison = compare([*runs_of("full", FULL), run("plain", 2, 0.70), run("plain", 4, 0.71), run("plain", 9, 0.99)])
    assert difference(comparison, "plain").by_seed == pytest.approx({2: -6.0, 4: -6.0})
    assert len(group(comparison, "plain").runs) == 3


def test_one_pair_has_a_difference_and_no_interval() -> None:
    comparison = compare([run("full", 1, 0.75), run("plain", 1, 0.72)])
    found = difference(comparison, "plain")
    assert found.mean == pytest.approx(-3)
    assert (found.sd, found.low, found.high, found.p, found.p_holm) == (None,) * 5
    text = page.markdown(comparison, {})
    assert "One pair of seeds has no interval: plain (-3.00 pp)" in text
    assert "nan" not in text.lower()


def test_equal_differences_have_no_interval_either() -> None:
    # top-1 is a float32 of a count: 1 of 360 more, in different places of the scale
    values = [np.float32(n / 360) for n in (340, 345, 350)]
    more = [np.float32(n / 360) for n in (341, 346, 351)]
    found = difference(compare([*runs_of("full", values), *runs_of("id", more)]), "id")
    assert found.mean == pytest.approx(100 / 360, abs=1e-4)
    assert (found.low, found.p) == (None, None)


def test_no_seed_in_common_is_no_difference() -> None:
    comparison = compare([run("full", 1), run("plain", 2)])
    assert group(comparison, "plain").difference is None
    assert any("plain and full have no seed in common" in note for note in comparison.notes)


def test_a_setting_separates_groups_and_is_compared_with_the_reference_of_its_own() -> None:
    low, high = ({"recipe": {"lr": lr}} for lr in (0.05, 0.1))
    comparison = compare(
        [
            *runs_of("full", FULL, config=low),
            *[run("full", i, v, config=high, name=f"high-{i}") for i, v in enumerate(PLAIN, 1)],
            *runs_of("plain", PLAIN, config=low),
        ]
    )
    assert comparison.columns == ["ablation", "recipe.lr"]
    assert [g.label for g in comparison.groups] == [
        "full, recipe.lr=0.05",
        "plain, recipe.lr=0.05",
        "full, recipe.lr=0.1",
    ]
    assert difference(comparison, "plain, recipe.lr=0.05").mean == pytest.approx(-2.75)


def test_a_setting_of_one_ablation_alone_is_no_fair_comparison() -> None:
    comparison = compare(
        [*runs_of("full", FULL, config={"recipe": {"lr": 0.1}}), *runs_of("id", FULL, config={"recipe": {"lr": 0.2}})]
    )
    assert group(comparison, "id, recipe.lr=0.2").difference is None
    assert any("compared with nothing: there is no full with its recipe.lr 0.2" in note for note in comparison.notes)
    ignored = compare(
        [*runs_of("full", FULL, config={"recipe": {"lr": 0.1}}), *runs_of("id", FULL, config={"recipe": {"lr": 0.2}})],
        ignore=["recipe.lr"],
    )
    assert difference(ignored, "id").mean == pytest.approx(0)
    assert any("not separated by recipe.lr" in note for note in ignored.notes)


def test_what_follows_from_a_choice_is_no_column_of_its_own() -> None:
    def config(ablation: str, width: float) -> dict[str, Any]:
        return {"block": {"branches": [ablation]}, "net": {"branches": [ablation], "width_a": width}}

    both = [*runs_of("full", FULL, config=config("full", 1.0)), *runs_of("id", FULL, config=config("id", 1.0))]
    assert compare(both).columns == ["ablation"]
    narrow = [*runs_of("full", FULL, config=config("full", 1.0)), *runs_of("id", FULL, config=config("id", 0.25))]
    assert compare(narrow).columns == ["ablation", "net.width_a"]


def test_names_and_places_separate_nothing() -> None:
    def config(i: int) -> dict[str, Any]:
        return {
            "output_dir": f"/runs/{i}",
            "run": {"name": f"r{i}", "id": f"{i}"},
            "trainer": {"default_root_dir": f"/runs/{i}", "log_every_n_steps": i, "max_epochs": [120, 120.0][i % 2]},
            "data": {"prepare": {"directory": f"/d{i}"}, "dir": f"/d{i}", "num_threads": i},
            "callbacks": {"best": {"dirpath": f"/runs/{i}/checkpoints"}, "health": {"every_n_epochs": i}},
            "git": {"sha": f"{i}" * 40},
        }

    comparison = compare([run("full", i, 0.75, config=config(i)) for i in range(4)])
    assert len(comparison.groups) == 1
    assert any("more than one commit are averaged in: full" in note for note in comparison.notes)
    folders = [run("full", i, 0.75, config={"data": {"prepare": None, "dir": f"/d{i}"}}) for i in range(2)]
    assert compare(folders).columns == ["data.dir"]


def test_settings_that_go_together_are_one_column_and_a_sentence() -> None:
    cpu = {"trainer": {"accelerator": "cpu"}, "device": "some CPU", "threads": 2}
    gpu = {"trainer": {"accelerator": "gpu"}, "device": "some GPU", "threads": 8}
    comparison = compare([run("full", 1, config=cpu), run("full", 2, config=gpu)])
    assert comparison.columns == ["trainer.accelerator"] or comparison.columns == ["device"]
    assert any(note.startswith("Where ") and "differ too" in note for note in comparison.notes)


def test_of_repeated_runs_the_newest_counts() -> None:
    comparison = compare([run("full", 1, 0.5, name="old"), run("full", 1, 0.75, name="new", minutes=9), run("id", 1)])
    assert [r.name for r in group(comparison, "full").runs] == ["new"]
    assert [(r.name, "which is newer" in reason) for r, reason in comparison.left] == [("old", True)]


def test_the_last_validation_is_not_averaged_with_the_best_checkpoint() -> None:
    only_val = run("full", 2, None)
    object.__setattr__(only_val, "metrics", {"val/top1": 0.5, "val/deploy/top1": 0.5})
    comparison = compare([run("full", 1), only_val])
    assert {g.columns["top-1 of"] for g in comparison.groups} == {"the best checkpoint", "the last validation"}


def test_without_a_deploy_form_the_train_form_is_compared_and_the_page_says_so() -> None:
    runs = [run("full", 1), run("id", 1)]
    for r in runs:
        object.__setattr__(r, "metrics", {"test/top1": 0.5})
    comparison = compare(runs)
    assert comparison.form == TOP1_TRAIN
    assert any("differences are of the train form" in note for note in comparison.notes)


def test_evaluations_and_runs_of_something_else_are_named_and_left_out() -> None:
    other = run("full", 1, name="other", config={"choices": {}})
    comparison = compare([run("full", 1), run("full", 2, evaluation=True, name="eval-2"), other])
    assert len(comparison.runs) == 1
    assert any("1 of the runs are evaluations of checkpoints and left out: eval-2" in n for n in comparison.notes)
    assert any("of no ablation and left out: other" in n for n in comparison.notes)


@pytest.mark.parametrize(
    ("runs", "reference", "says"),
    [
        ([], None, "there is no run in it"),
        ([run(status="failed", top1=None)], None, r"none of 1 is a finished training with a top-1\. full-1: failed"),
        ([run(top1=None)], None, "finished without a top-1"),
        (
            [run("id"), run("full")],
            "identity",
            "no finished run is of it.*ablation full, id; model",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_error(runs: list[Run], reference: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compare(runs, reference=reference)


def test_a_model_or_a_recipe_may_be_the_reference() -> None:
    models = [run("full", s, v, model=m, name=f"{m}{s}") for m, v in (("a", 0.5), ("b", 0.6)) for s in (1, 2)]
    assert compare(models).over is None
    comparison = compare(models, reference="b")
    assert (comparison.over, [g.label for g in comparison.groups]) == ("model", ["b", "a"])
    assert difference(comparison, "a").mean == pytest.approx(-10)
    recipes = [run("full", s, recipe=r, name=f"{r}{s}") for r in ("fast", "slow") for s in (1, 2)]
    assert compare(recipes, reference="fast").over == "recipe"


def test_without_full_nothing_is_compared_and_the_page_says_so() -> None:
    comparison = compare([run("id", 1), run("plain", 1)])
    assert comparison.over is None
    assert any("reference=id" in note for note in comparison.notes)


# --- the paper ------------------------------------------------------------------------------------------------------


def test_the_papers_table_is_that_of_the_runs_experiment() -> None:
    assert paper_of([run("full", config={"experiment": "table7"})]).name == "Table 7"
    assert paper_of([run("full"), run("plain")]).name == "Table 6"
    assert paper_of([run("full"), run("dirac"), run("acb")]).name == "Table 7"
    assert paper_of([run("full", model="repvgg_a0"), run("full", model="repvgg_b1")]).name == "Table 4"
    both = paper_of([run("full"), run("plain"), run("dirac"), run("acb")])
    assert both.name == "Tables 6 and 7"
    numbers = [both.number(run(name), "top1") for name in ("plain", "full", "dirac")]
    assert numbers == [0.7239, 0.7514, 0.7397]
    assert both.number(run("full"), "images_per_s_train_form") == 1061
    assert paper_of([run("mine")]).name == "Table 6"
    assert paper_of([run("full", config={"experiment": "table7"})], "table6").name == "Table 6"
    # its numbers are a quantized A0's: only for the runs of that experiment, or by name
    assert paper_of([run("full"), run("qarepvgg")]).name == "Table 6"
    int8 = paper_of([run("full", config={"experiment": "int8"})])
    assert (int8.name, int8.setting) == ("int8 table of arXiv 2212.01593", "A0 on ImageNet, 120 epochs")
    assert [int8.number(run(name), "top1_int8") for name in ("full", "qarepvgg", "id")] == [0.522, 0.704, None]
    with pytest.raises(ValueError, match="paper=table9: experiments/ has table4, table6, table7, int8"):
        paper_of([run()], "table9")


def test_the_models_of_table_4_hold_for_the_full_block() -> None:
    paper = load_paper(Path(__file__).parents[2] / "experiments" / "table4.yaml")
    assert paper.number(run("full", model="repvgg_b1"), "top1") == 0.7837
    assert paper.number(run("plain", model="repvgg_b1"), "top1") is None
    assert (paper.speed, paper.setting) == ("deploy", "ImageNet, 120 epochs")


def test_kendalls_tau_is_the_count_of_pairs_in_the_papers_order() -> None:
    ours = {"plain": 0.70, "id": 0.72, "1x1": 0.74, "full": 0.73}
    theirs = {"plain": 0.7239, "id": 0.7479, "1x1": 0.7315, "full": 0.7514}
    signs = [np.sign((ours[a] - ours[b]) * (theirs[a] - theirs[b])) for a, b in combinations(ours, 2)]
    comparison = compare([run(name, 1, value) for name, value in ours.items()])
    assert comparison.tau == (pytest.approx(sum(signs) / 6), 4)
    assert compare([run(name, 1, ours[name]) for name in ("plain", "full")]).tau is None
    assert compare([run(name, 1, 0.5) for name in ours]).tau is None
    assert compare([run("mine", 1, 0.5), run("yours", 1, 0.6), run("full", 1, 0.7)]).tau is None


# --- laws -----------------------------------------------------------------------------------------------------------

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(p_values, st.floats(1e-3, 0.5))
def test_holm_rejects_what_its_procedure_rejects(values: list[float], level: float) -> None:
    rejected = set()
    for k, i in enumerate(np.argsort(values)):  # Holm 1979: stop at the first that is not rejected
        if values[i] * (len(values) - k) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected


def test_holm_of_a_published_example() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04), "holm") of R
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


one_run = st.tuples(st.sampled_from(["full", "id", "plain"]), st.integers(0, 4), st.integers(0, 360))
counts = st.lists(one_run, min_size=1)


@settings(max_examples=15, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_the_order_of_the_runs_changes_nothing(drawn: list[tuple[str, int, int]], random: Any) -> None:
    runs = [run(a, s, n / 360, name=f"r{i}", minutes=i) for i, (a, s, n) in enumerate(drawn)]
    shuffled = runs.copy()
    random.shuffle(shuffled)
    assert page.markdown(compare(runs), {}) == page.markdown(compare(shuffled), {})


@settings(max_examples=15, deadline=None)
@given(counts, st.sampled_from(["failed", "interrupted", "not finished", "running"]), st.floats(0, 1))
def test_a_run_that_did_not_finish_changes_no_number(
    drawn: list[tuple[str, int, int]], status: str, top1: float
) -> None:
    runs = [run(a, s, n / 360, name=f"r{i}", minutes=i) for i, (a, s, n) in enumerate(drawn)]
    unfinished = run("full", 99, top1, status=status, name="unfinished", config={"recipe": {"lr": 7}})
    before, after = compare(runs), compare([*runs, unfinished])
    assert page.tables(before) == page.tables(after)
    assert page.group_frame(before).equals(page.group_frame(after))
    assert f"| `unfinished` | {status} |" in page.markdown(after, {})
