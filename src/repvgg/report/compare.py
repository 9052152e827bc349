"""Runs compared: groups that differ in nothing but the seed, their spread, and paired differences to a reference.

Accuracies are percent here, as in every table; differences are percentage points.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from repvgg.influence import comparable, flat, is_under, splits_groups
from repvgg.report import table
from repvgg.report.runs import UNREADABLE, Run

if TYPE_CHECKING:
    import pandas as pd

#: What a group is called by, and what a reference can be one of.
CHOICES = ("model", "ablation", "data", "recipe")
REFERENCES = ("ablation", "model", "recipe")
CHECKPOINT = "top-1 of"
#: Of which choices a config value may be a consequence, by the start of its key; the first that fits counts.
OWNERS: dict[str, tuple[str, ...]] = {
    "block": ("ablation",),
    **dict.fromkeys(("net.depths", "net.width_a", "net.width_b", "net.groups", "net.squeeze_excite"), ("model",)),
    **dict.fromkeys(("net.num_classes", "net.in_channels", "net.strides", "data", "bench.resolution"), ("data",)),
    "net": ("ablation",),
    **dict.fromkeys(("recipe", "bench", "trainer", "callbacks", "compile", "channels_last", "tf32"), ("recipe",)),
}
#: Top-1 is counted in images and kept in float32: differences nearer than this, in percentage points, are equal.
EQUAL = 1e-4
LEVEL = 0.95
#: `Comparison.unevenness` above which speeds of different runs are not compared.
UNEVEN = 1.1


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n − 1) of n values; no deviation of one."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A group minus its reference, over the seeds that both have, in percentage points of top-1.

    `low` and `high` are the 95 % interval of the mean by Student's t with n − 1 degrees of freedom; `p` is the
    two-sided t test's against no difference, and `p_holm` the same adjusted for all comparisons of the page (Holm
    1979). All four are None for one pair, and where all pairs differ by the same: there is no spread to go by.
    """

    by_seed: Mapping[int, float]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is there and on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, eq=False)
class Group:
    """Finished runs with equal configs but for the seed, in its order.

    `columns` are what sets the groups of the page apart, `values` the table's numbers of the runs, a row per run.
    """

    label: str
    columns: Mapping[str, str]
    runs: Sequence[Run]
    values: pd.DataFrame
    difference: Difference | None = None
    is_reference: bool = False

    def apart_from(self, over: str | None) -> tuple[str, ...]:
        """What else sets it apart than the kind of choice that is compared."""
        return tuple(value for name, value in self.columns.items() if name != over)

    def spread(self, column: str) -> Spread | None:
        """Of the runs that measured it; None if none did."""
        values = self.values[column].dropna()
        if values.empty:
            return None
        return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the pages show.

    `columns` are the names of what sets the groups apart, `shared` what all groups have of model, ablation, data and
    recipe, `form` the column of the top-1 that is compared, `over` the kind of choice that `reference` is (None: there
    is no reference), `left` the runs that are in no mean with the reason for each, and `tau` Kendall's rank correlation
    of our means with the paper's, with its number of groups.
    """

    groups: Sequence[Group]
    columns: Sequence[str]
    shared: Mapping[str, str]
    form: str
    over: str | None
    reference: str | None
    paper: table.Paper
    tau: tuple[float, int] | None
    left: Sequence[tuple[Run, str]]
    notes: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        """Those that are in the means."""
        return [run for group in self.groups for run in group.runs]

    def base(self, group: Group) -> Group | None:
        """The group that this one is compared with: the reference where everything else is equal."""
        context = group.apart_from(self.over)
        return next(
            (other for other in self.groups if other.is_reference and other.apart_from(self.over) == context), None
        )

    @property
    def unevenness(self) -> float | None:
        """How many times as fast as another time one and the same network was measured.

        Of groups that deploy to as many parameters and multiply-adds, under one setting: the largest mean images/s over
        the smallest. None without two such groups. Far above 1, the machine was not as fast at all times.
        """
        alike: dict[tuple[Any, ...], list[float]] = {}
        for group in self.groups:
            metrics, speed = group.runs[0].metrics, group.spread(table.SPEED_DEPLOY)
            if speed is not None and "macs/deploy" in metrics:
                network = (metrics.get("params/deploy"), metrics["macs/deploy"], table.bench_settings(group.runs[0]))
                alike.setdefault(network, []).append(speed.mean)
        return max((max(speeds) / min(speeds) for speeds in alike.values() if len(speeds) > 1), default=None)

    @property
    def comparisons(self) -> int:
        """How many differences have a p value."""
        return sum(g.difference is not None and g.difference.p is not None for g in self.groups)


def compare(
    runs: Sequence[Run],
    *,
    reference: str | None = None,
    paper: str | None = None,
    ignore: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Groups the finished runs and compares them; the others are named and in no number.

    Args:
        reference: an ablation, model or recipe that the others are compared with; None is `full`, if it is there.
        paper: as in `repvgg.report.table.paper_of`.
        ignore: starts of config keys that are not to separate groups, beside what `repvgg.influence` says.
        notes: of the reading.

    Raises:
        ValueError: nothing to compare, or a reference that no run is of.
    """
    said = list(notes)
    if ignore:
        said.append(f"By request, groups are not separated by {', '.join(ignore)}.")
    runs = sorted(runs, key=lambda run: (run.name, run.ids))
    trained, left = _usable(runs, said)
    keys = {run: _key(run, ignore) for run in trained}
    _know_the_same(keys, said)
    trained, repeats = _newest(trained, keys, said)
    left += repeats
    measured = [run for run in trained if any(top1 is not None and isfinite(top1) for top1 in table.top1(run)[:2])]
    left += [(run, "finished without a top-1") for run in trained if run not in measured]
    if not measured:
        raise ValueError(" ".join([_nothing(runs, left), *(note for note in notes if "Not counted" in note)]))

    by_key: dict[str, list[Run]] = {}
    for run in measured:
        by_key.setdefault(json.dumps(keys[run], sort_keys=True), []).append(run)
    members = [sorted(group, key=_order) for group in by_key.values()]
    columns, shared = _columns([keys[group[0]] for group in members], said)
    chosen = table.paper_of(measured, paper)
    over, reference = _reference(measured, reference, said)

    groups = []
    for group in members:
        named = {name: _text(keys[group[0]].get(name)) for name in columns}
        groups.append(Group(_label(named, group[0]), named, group, table.table(group, chosen)))
    rows = list(chosen.rows)

    def position(group: Group) -> tuple[Any, ...]:
        first = group.runs[0]
        context = tuple(value for name, value in group.columns.items() if name not in (over, "ablation", "model"))
        row = chosen.row(first)
        own = over is not None and first.choice(over) == reference
        return (context, not own, rows.index(row) if row in rows else len(rows), tuple(group.columns.values()))

    groups.sort(key=position)
    form = table.TOP1_DEPLOY
    if all(group.spread(form) is None for group in groups):
        form = table.TOP1_TRAIN
        said.append("No run measured its deploy form's top-1: differences are of the train form.")
    groups = _with_differences(groups, over, reference, form, said)
    _say_commits(groups, said)
    return Comparison(
        groups=groups,
        columns=columns,
        shared=shared,
        form=form,
        over=over,
        reference=reference,
        paper=chosen,
        tau=_rank_agreement(groups, chosen, form),
        left=sorted(left, key=lambda pair: (pair[0].name, pair[0].ids)),
        notes=[*said, *table.notes(measured, chosen)],
    )


# --- which runs ---------------------------------------------------------------------------------------------------


def _usable(runs: Sequence[Run], said: list[str]) -> tuple[list[Run], list[tuple[Run, str]]]:
    evaluations = [run for run in runs if run.evaluation]
    # One that cannot be read may well have an ablation.
    foreign = [
        run for run in runs if not run.evaluation and run.status != UNREADABLE and run.choice("ablation") is None
    ]
    for kind, which in (("evaluations of checkpoints", evaluations), ("of no ablation", foreign)):
        if which:
            names = ", ".join(run.name for run in which[:5]) + (", …" if len(which) > 5 else "")
            said.append(f"{len(which)} of the runs are {kind} and left out: {names}.")
    rest = [run for run in runs if run not in evaluations and run not in foreign]
    reasons = {run: _why_left(run) for run in rest}
    return [run for run in rest if reasons[run] is None], [
        (run, why) for run, why in reasons.items() if why is not None
    ]


def _why_left(run: Run) -> str | None:
    """Why a run is in no mean; None for one that finished."""
    if run.status == "dry run" or (run.config.get("trainer") or {}).get("fast_dev_run"):
        return "a dry run, trainer.fast_dev_run"
    return None if run.status == "finished" else run.error or run.status


def _nothing(runs: Sequence[Run], left: Sequence[tuple[Run, str]]) -> str:
    if not runs:
        return (
            "runs: there is no run in it. A run's directory holds result.json, .hydra or W&B's files; train some with\n"
            "  python src/train.py -m '+experiment=[table6,on_digits]' seed=1,2,3"
        )
    found = "; ".join(f"{run.name}: {run.status} ({reason})" for run, reason in left[:5])
    more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
    return f"runs: none of {len(runs)} is a finished training with a top-1. {found}{more}"


def _key(run: Run, ignore: Sequence[str]) -> dict[str, Any]:
    """What separates a run from others, seed aside: its config, flat, without what cannot change a result."""
    config = {name: value for name, value in run.config.items() if name != "choices"}
    own = str(run.config.get("output_dir") or run.run_dir)
    data: Any = config.get("data")
    own_files = isinstance(data, Mapping) and bool(data.get("prepare"))
    kept = {
        name: value
        for name, value in flat_items(config)
        if splits_groups(name, own_files=own_files)
        and not any(is_under(name, start) for start in ignore)
        and not (isinstance(value, str) and value.startswith(own))
    }
    source = {"test": "the best checkpoint", "val": "the last validation", "eval": "the file"}[table.top1(run)[2]]
    return {**{name: run.choice(name) for name in CHOICES}, CHECKPOINT: source, **kept}


def flat_items(node: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Dotted keys and their values, such that equal ones are of one type."""
    for name, value in flat(node):
        yield name, comparable(name, value)


def _know_the_same(keys: Mapping[Run, dict[str, Any]], said: list[str]) -> None:
    """Where some runs do not say which callbacks ran, these separate nothing."""
    without = [run.name for run, key in keys.items() if not any(is_under(name, "callbacks") for name in key)]
    if without and len(without) < len(keys):
        for key in keys.values():
            for name in [name for name in key if is_under(name, "callbacks")]:
                del key[name]
        said.append(f"Which callbacks ran is not known of {len(without)} runs, and not compared: {without[0]}, ….")


def _newest(
    runs: Sequence[Run], keys: Mapping[Run, dict[str, Any]], said: list[str]
) -> tuple[list[Run], list[tuple[Run, str]]]:
    """Of the runs that repeat one another, seed and all, the newest."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        seed = run.config.get("seed")
        if seed is None:
            said.append(f"{run.name} does not say its seed: it is in the means, and in no pair.")
        same.setdefault(json.dumps([keys[run], run.name if seed is None else seed], sort_keys=True), []).append(run)
    kept, repeats = [], []
    for group in same.values():
        *older, newest = sorted(group, key=lambda run: (run.when is not None, str(run.when), run.name))
        kept.append(newest)
        repeats += [(run, f"the same configuration and seed as {newest.name}, which is newer") for run in older]
    return kept, repeats


def _order(run: Run) -> tuple[bool, float, str]:
    seed = run.config.get("seed")
    return seed is None, float(seed or 0), run.name


# --- groups -------------------------------------------------------------------------------------------------------


def _columns(keys: Sequence[Mapping[str, Any]], said: list[str]) -> tuple[list[str], dict[str, str]]:
    """The names of what sets groups apart, without what follows from other columns; and the choices that all share."""

    def values(name: str) -> set[str]:
        return {_text(key.get(name)) for key in keys}

    choices = [name for name in CHOICES if len(values(name)) > 1]
    shared = {name: _text(keys[0].get(name)) for name in CHOICES if name not in choices}
    names = dict.fromkeys(name for key in keys for name in key if name not in CHOICES)
    varying = [name for name in names if len({json.dumps(key.get(name)) for key in keys}) > 1]

    def follows(name: str) -> bool:
        owners = next((own for start, own in OWNERS.items() if is_under(name, start)), ())
        of_owners: dict[tuple[Any, ...], set[str]] = {}
        for key in keys:
            of_owners.setdefault(tuple(key.get(own) for own in owners), set()).add(json.dumps(key.get(name)))
        return all(len(found) == 1 for found in of_owners.values())

    # One setting often stands in several keys: of those that divide the groups alike, the first names it.
    divisions: dict[tuple[int, ...], list[str]] = {}
    for name in varying:
        if not follows(name):
            found = [json.dumps(key.get(name)) for key in keys]
            divisions.setdefault(tuple(map(found.index, found)), []).append(name)
    for first, *others in divisions.values():
        if others:
            said.append(f"Where {first} differs, {', '.join(others)} differ{'s' * (len(others) == 1)} too.")
    return [*choices, *(names[0] for names in divisions.values())], shared


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _label(columns: Mapping[str, str], run: Run) -> str:
    words = [value if name in CHOICES else f"{name}={value}" for name, value in columns.items()]
    return ", ".join(words) or run.choice("ablation") or run.name


def _reference(runs: Sequence[Run], reference: str | None, said: list[str]) -> tuple[str | None, str | None]:
    found = {kind: sorted({c for run in runs if (c := run.choice(kind)) is not None}) for kind in REFERENCES}
    for kind, names in found.items():
        if (reference or "full") in names and (len(names) > 1 or reference is not None):
            return kind, reference or "full"
    if reference is not None:
        there = "; ".join(f"{kind} {', '.join(names)}" for kind, names in found.items())
        raise ValueError(f"reference={reference}: no finished run is of it. There are {there}")
    others = [name for names in found.values() if len(names) > 1 for name in names]
    if others:
        said.append(f"No differences: there is no `full` beside others. Choose one of them, as reference={others[0]}.")
    return None, None


# --- statistics ---------------------------------------------------------------------------------------------------


def _with_differences(
    groups: Sequence[Group], over: str | None, reference: str | None, form: str, said: list[str]
) -> list[Group]:
    import dataclasses

    if over is None:
        return list(groups)

    own = {group.apart_from(over): group for group in groups if group.runs[0].choice(over) == reference}
    differences: list[Difference | None] = []
    for group in groups:
        base = own.get(group.apart_from(over))
        if base is None:
            which = ", ".join(f"{name} {value}" for name, value in group.columns.items() if name != over)
            said.append(f"{group.label} is compared with nothing: there is no {reference} with its {which}.")
        if base is None or base is group:
            differences.append(None)
            continue
        ours, theirs = _by_seed(group, form), _by_seed(base, form)
        pairs = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
        if not pairs:
            said.append(f"{group.label} and {base.label} have no seed in common, so no difference: train one of both.")
        differences.append(paired(pairs) if pairs else None)
    adjusted = iter(holm([d.p for d in differences if d is not None and d.p is not None]))
    return [
        dataclasses.replace(
            group,
            is_reference=group.runs[0].choice(over) == reference,
            difference=dataclasses.replace(d, p_holm=next(adjusted)) if d is not None and d.p is not None else d,
        )
        for group, d in zip(groups, differences, strict=True)
    ]


def _by_seed(group: Group, form: str) -> dict[int, float]:
    pairs = zip((run.config.get("seed") for run in group.runs), group.values[form], strict=True)
    return {int(seed): float(value) for seed, value in pairs if seed is not None and value == value}


def paired(by_seed: Mapping[int, float]) -> Difference:
    """The mean of differences with its interval and p value, not adjusted."""
    import numpy as np
    from scipy import stats  # type: ignore[import-untyped]

    values = np.array(list(by_seed.values()), dtype=np.float64)
    mean = float(values.mean())
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    if sd is None or np.ptp(values) <= EQUAL:
        return Difference(by_seed, mean, sd, None, None, None)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(LEVEL)
    return Difference(by_seed, mean, sd, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given: the k-th smallest of m times m − k + 1, never falling."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _rank_agreement(groups: Sequence[Group], paper: table.Paper, form: str) -> tuple[float, int] | None:
    """Kendall's tau-b of our means with the paper's numbers; None below 3 groups, or if one side is all equal.

    Of two groups with one row of the paper (two recipes, say) neither is the one to compare: None as well.
    """
    from scipy import stats

    pairs = [
        (paper.row(group.runs[0]), spread.mean, theirs)
        for group in groups
        if (spread := group.spread(form)) is not None and (theirs := paper.number(group.runs[0], "top1")) is not None
    ]
    if len(pairs) < 3 or len({row for row, _, _ in pairs}) < len(pairs):
        return None
    tau = float(stats.kendalltau([ours for _, ours, _ in pairs], [theirs for _, _, theirs in pairs]).statistic)
    return None if tau != tau else (tau, len(pairs))


def commit(run: Run) -> str:
    """The commit a run was trained at, ten digits, with `-dirty` after it where the tree had changes."""
    git: Any = run.config.get("git")
    sha = str(git.get("sha") or "unknown") if isinstance(git, Mapping) else "unknown"
    name, dirty, _ = sha.partition("-dirty")
    return name[:10] + dirty


def _say_commits(groups: Sequence[Group], said: list[str]) -> None:
    mixed = [group.label for group in groups if len({commit(run) for run in group.runs}) > 1]
    if mixed:
        said.append(f"Runs of more than one commit are averaged in: {'; '.join(mixed)}.")
    dirty = sorted({run.name for group in groups for run in group.runs if commit(run).endswith("-dirty")})
    if dirty:
        names = ", ".join(dirty[:5]) + (", …" if len(dirty) > 5 else "")
        said.append(f"{len(dirty)} runs were trained with changes that are in no commit (-dirty): {names}.")
