"""The comparison as a W&B report: `build` describes it without a network, `publish` sends it.

`wandb-workspaces` 0.4 says nothing where a filter, a group or a metric addresses nothing: the panel is empty. So
`specification` compares what would be sent with what was meant, before anything is sent. Found in its source:

- `"config.data.name = 'x'"` as a filter is an empty one; only `Config('…')`, `Metric('…')` address anything.
- A filter's values are put between quotes as they are and parsed again, where `=` becomes `==` and `<` becomes `<=`.
- Groups and panels put `.value` behind the first part of a config key (`choices.value.ablation`), filters do not,
  though W&B's page does (wandb-workspaces#34). So the filters here are on runs' ids alone, and with `IN`, which the
  same report of an error found to work where `=` did not.
- Where a run set has an entity and a project, serialising it asks the server. So run sets get theirs in `publish`.
"""

from __future__ import annotations

import copy
import re
import shlex
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import wandb
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from repvgg.report import page
from repvgg.report.compare import CHOICES
from repvgg.report.runs import ONLINE

with warnings.catch_warnings():
    # wandb-workspaces 0.4 with pydantic 2
    warnings.filterwarnings("ignore", "Pydantic V1 style `@validator` validators are deprecated", DeprecationWarning)
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

if TYPE_CHECKING:
    from repvgg.report.compare import Comparison
    from repvgg.report.runs import Run

#: Config keys, nested: one line or bar of a panel is all runs that have these in common.
GROUPING = ("choices.ablation", "choices.model")
#: Names of the two run sets.
COMPARED, LEFT_OUT = "Runs compared", "Runs left out"
X_AXIS = "epoch"
#: Of a panel grid, in its own units; it is 24 wide.
WIDTH, HEIGHT, ROW = 8, 8, 24
#: What the client passes into its own small language without escaping, or changes.
UNSAFE = frozenset("'\\=<>")

HOW_TO_READ = (
    "Accuracies are fractions of 1 in panels and percent in tables, measured on the validation images; speed is in "
    "images per second. *Deploy* is the network after its blocks have become convolutions, *train form* the network as "
    "it was trained. Panels show the runs of the tables, by group: lines are means over a group's runs, bands reach "
    "from the smallest to the largest, and bars are means. Tables and selection of runs are of the time when this "
    "report was written; the same command again brings both up to date, here in this report."
)


@dataclass(frozen=True)
class Selection:
    """The runs that a report shows, by W&B's ids: exactly those of its tables, which no filter by config could say.

    Attributes:
        compared: in the means.
        left_out: not in the means: unfinished, failed, repeated. They have a section of their own.
        directories: W&B's files of ids; an error about a run that is not in the project yet then names the command.
        elsewhere: names of runs compared that W&B was not told of; the report says so.

    Raises:
        ValueError: nothing to compare, or an id that W&B's client cannot put into a filter.
    """

    compared: Sequence[str]
    left_out: Sequence[str] = ()
    directories: Mapping[str, Path] = field(default_factory=dict)
    elsewhere: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.compared:
            raise ValueError(
                "None of the runs was logged to W&B, so a report there has nothing to show: train with logger=wandb, "
                "or with logger=wandb_offline and then `wandb sync`. Without W&B: target=page"
            )
        for name in (*self.compared, *self.left_out):
            if not name or UNSAFE & set(name) or not name.isprintable():
                raise ValueError(
                    f"W&B's client cannot filter by {name!r}, only by printable ids without any of "
                    f"{' '.join(sorted(UNSAFE))}. Leave this run out of runs="
                )


def select(compared: Iterable[Run], left_out: Iterable[Run] = ()) -> Selection:
    """These runs by W&B's ids: the last one of a run that was resumed under a new id, which holds its end."""
    ids: list[str] = []
    elsewhere: list[str] = []
    directories: dict[str, Path] = {}
    for run in compared:
        if not run.ids:
            elsewhere.append(run.name)
            continue
        identifier = run.ids[-1]
        ids.append(identifier)
        # run_dir is the file itself where there is nothing else of the run
        for file in [run.run_dir] if run.run_dir.is_file() else run.run_dir.rglob(f"run-{identifier}.wandb"):
            directories[identifier] = file.parent
    return Selection(ids, [run.ids[-1] for run in left_out if run.ids], directories, elsewhere)


# --- what is drawn --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """A panel: curves over epochs, bars of what the runs ended with, or one such number against another."""

    kind: Literal["curves", "bars", "scatter"]
    title: str
    metrics: tuple[str, ...]  # of a scatter: x and y

    def panel(self, layout: wr.Layout) -> wr.LinePlot | wr.BarPlot | wr.ScatterPlot:
        """The panel of W&B."""
        match self.kind:
            case "curves":
                return wr.LinePlot(
                    title=self.title,
                    x=X_AXIS,
                    y=list(self.metrics),
                    groupby_aggfunc="mean",
                    groupby_rangefunc="minmax",
                    layout=layout,
                )
            case "bars":
                return wr.BarPlot(
                    title=self.title,
                    metrics=list(self.metrics),
                    groupby_aggfunc="mean",
                    groupby_rangefunc="minmax",
                    layout=layout,
                )
            case "scatter":
                x, y = self.metrics
                return wr.ScatterPlot(title=self.title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y), layout=layout)


#: Heading, what to look at, panels.
SECTIONS: tuple[tuple[str, str, tuple[Plot, ...]], ...] = (
    (
        "Accuracy",
        "Of the best checkpoint in bars; over the epochs in curves.",
        (
            Plot("bars", "Top-1, deploy form", ("test/deploy/top1",)),
            Plot("bars", "Top-1, train form", ("test/top1",)),
            Plot("curves", "Validation top-1, deploy form", ("val/deploy/top1",)),
            Plot("curves", "Validation top-1, train form", ("val/top1",)),
            Plot("curves", "Training loss", ("train/loss",)),
            Plot("curves", "Learning rate", ("optim/lr",)),
        ),
    ),
    (
        "Speed",
        "Every ablation deploys to the same convolutions, unless its run says otherwise: what differs is the train "
        "form. Compare only runs whose `bench.*` and `device` agree (the runs' table at the end shows where not).",
        (
            Plot("bars", "Images per second, deploy form", ("bench/deploy/images_per_s",)),
            Plot("bars", "Images per second, train form", ("bench/train_form/images_per_s",)),
            Plot("bars", "Deploy form over train form", ("bench/speedup",)),
            Plot("scatter", "Top-1 against images per second", ("bench/deploy/images_per_s", "test/deploy/top1")),
        ),
    ),
    (
        "Are both forms one function?",
        "The distance of their logits, relative, on the same images, and the share of images with the same answer.",
        (
            Plot("curves", "Relative L2 distance of the logits", ("reparam/rel_l2_diff",)),
            Plot("curves", "Largest difference of a logit", ("reparam/max_abs_logit_diff",)),
            Plot("curves", "Share of images with the same top-1", ("reparam/top1_agreement",)),
        ),
    ),
)
#: Of unfinished runs.
ONE_BY_ONE = (
    Plot("curves", "Training loss, run by run", ("train/loss",)),
    Plot("curves", "Validation top-1, deploy form, run by run", ("val/deploy/top1",)),
)
#: Of runs with int8=…; nothing is said of it where there is none.
INT8_SECTION = (
    "int8",
    "The deploy form after post-training quantization, beside the forms above: accuracy of the best checkpoint, and "
    "the distance of its logits from the deploy form's after the last epoch.",
    (
        Plot("bars", "Top-1, int8 form", ("test/int8/top1",)),
        Plot("scatter", "Top-1, int8 form against deploy form", ("test/deploy/top1", "test/int8/top1")),
        Plot("bars", "Relative L2 distance of int8's logits", ("int8/rel_l2_diff",)),
        Plot("bars", "Share of images with the same top-1 in int8", ("int8/top1_agreement",)),
    ),
)
SHARES = re.compile(r"health/share/(?P<stage>[^/]+)/[^/]+")
SHARES_SECTION = (
    "What each branch contributes",
    "The part of a stage's fused kernels that lies along each branch, mean over its blocks: a block's shares add up to "
    "1, and a negative one works against the others.",
)


def planned_metrics() -> set[str]:
    """Every metric that a report can show, but for int8's, and for the shares, whose branches are the runs'."""
    return {metric for _, _, plots in SECTIONS for plot in plots for metric in plot.metrics}


def _shares(metrics: Collection[str]) -> tuple[Plot, ...]:
    stages: dict[str, list[str]] = {}
    for metric in sorted(metrics):
        if match := SHARES.fullmatch(metric):
            stages.setdefault(match["stage"], []).append(metric)
    return tuple(Plot("curves", f"Shares in {stage}", tuple(names)) for stage, names in stages.items())


# --- the report -----------------------------------------------------------------------------------------------------


def build(
    *,
    entity: str,
    project: str,
    title: str,
    runs: Selection,
    metrics: Collection[str],
    text: str,
    grouping: Sequence[str] = GROUPING,
    description: str = "",
) -> wr.Report:
    """The report, without a network.

    Args:
        entity: whose project it is; empty for the account's own.
        title: a report of the same title is what `publish` updates.
        metrics: what at least one of the runs compared logged. A panel of anything else is left out, and the report
            says so.
        text: Markdown: what is compared, its tables, by what statistics, from which commands. `## ` begins a section.
        grouping: dotted keys of the logged config.

    Raises:
        ValueError: a title that W&B cannot make an address of.
    """
    if not title.strip() or len(title) > 128 or set(title) & set("/?#%\n"):
        raise ValueError(f"title={title!r}: W&B wants 1 to 128 characters, and an address is made of them: no / ? # %")
    sections = [*SECTIONS, INT8_SECTION, (*SHARES_SECTION, _shares(metrics))]
    blocks: list[Any] = [wr.TableOfContents()]
    for heading, body in _sections(text):
        blocks += [wr.H1(heading)] if heading else []
        blocks += [wr.MarkdownBlock(body)] if body else []
    blocks += [wr.H1("How to read the panels"), wr.MarkdownBlock(HOW_TO_READ + _not_shown(metrics, runs.elsewhere))]
    for heading, note, plots in sections:
        shown = _known(plots, metrics)
        if shown:
            blocks += [wr.H1(heading), wr.MarkdownBlock(note)]
            blocks += [_grid(COMPARED, runs.compared, shown, metrics, grouping)]
    blocks += [
        wr.H1("Where the runs differ"),
        wr.MarkdownBlock("Configuration and last numbers of the runs compared, where they are not the same in all."),
        wr.PanelGrid(
            runsets=[_runset(COMPARED, runs.compared, metrics)],
            panels=[wr.RunComparer(diff_only="split", layout=_place(0, width=ROW))],
        ),
    ]
    if runs.left_out:
        note = (
            "Unfinished, failed or repeated: in no number above. One line is one run; those not uploaded are not here."
        )
        shown = _known(ONE_BY_ONE, metrics)
        blocks += [wr.H1(LEFT_OUT), wr.MarkdownBlock(note), _grid(LEFT_OUT, runs.left_out, shown, metrics, ())]
    return wr.Report(entity=entity, project=project, title=title, description=description, blocks=blocks, width="fluid")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Heading and body: W&B's table of contents lists headings that are blocks, not those in Markdown."""
    heading, lines, fenced = "", list[str](), False
    for line in text.strip().splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            yield heading, "\n".join(lines).strip()
            heading, lines = line.removeprefix("## ").strip(), []
        else:
            lines.append(line)
    yield heading, "\n".join(lines).strip()


def _known(plots: Iterable[Plot], metrics: Collection[str]) -> list[Plot]:
    return [plot for plot in plots if set(plot.metrics) <= set(metrics)]


def _not_shown(metrics: Collection[str], elsewhere: Sequence[str]) -> str:
    missing = sorted(planned_metrics() - set(metrics))
    if not _shares(metrics):
        missing.append("health/share/*")
    text = ""
    if missing:
        text += f"\n\nNo run has logged {', '.join(f'`{name}`' for name in missing)}: no panels of these."
    if elsewhere:
        text += f"\n\nIn the tables alone, because not logged to W&B: {', '.join(elsewhere)}."
    return text


def _place(i: int, width: int = WIDTH) -> wr.Layout:
    columns = 24 // width
    return wr.Layout(x=width * (i % columns), y=HEIGHT * (i // columns), w=width, h=HEIGHT)


def _grid(
    name: str, ids: Sequence[str], plots: Sequence[Plot], metrics: Collection[str], grouping: Sequence[str]
) -> wr.PanelGrid:
    panels: list[Any] = [plot.panel(_place(i)) for i, plot in enumerate(plots)]
    return wr.PanelGrid(runsets=[_runset(name, ids, metrics, grouping)], panels=panels)


def _runset(name: str, ids: Sequence[str], metrics: Collection[str], grouping: Sequence[str] = ()) -> wr.Runset:
    columns = [f"config:{_stored(key)}" for key in (*GROUPING, "seed")]
    columns += [f"summary:{m}" for m in ("test/deploy/top1", "bench/deploy/images_per_s") if m in metrics]
    return wr.Runset(
        name=name,
        filters=expr.And(expr.Metric("ID").isin([*ids])),
        groupby=[f"config.{key}" for key in grouping],
        pinned_columns=columns,
    )


def _stored(key: str) -> str:
    """A nested config key as W&B stores it: `choices.value.ablation`."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])


# --- checking -------------------------------------------------------------------------------------------------------


def specification(
    report: wr.Report, runs: Selection, metrics: Collection[str], grouping: Sequence[str] = GROUPING
) -> dict[str, Any]:
    """The report as W&B will store it (but for the project of its run sets), made and checked without a network.

    Args:
        runs, metrics, grouping: as given to `build`.

    Raises:
        ValueError: a run set that filters or groups by something else than meant, or a metric that is not of
            ``metrics``. That is an error of the report, not of its user: W&B would show an empty panel.
    """
    offline = copy.deepcopy(report)
    for runset in _runsets(offline):
        runset.entity = runset.project = ""
    # What Report.save sends; there is no public way to it.
    spec: dict[str, Any] = offline._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    if not grids:
        raise ValueError("The report has no panels: build makes one that has")
    groups = [{"section": "config", "name": _stored(key)} for key in grouping]
    for grid in grids:
        alone = [panel["viewType"] for panel in grid["panelBankSectionConfig"]["panels"]] == ["Run Comparer"]
        for runset in grid["runSets"]:
            ids = [*({COMPARED: runs.compared, LEFT_OUT: runs.left_out}[runset["name"]])]
            leaf = {"key": {"section": "run", "name": "name"}, "op": "IN", "value": ids, "disabled": False}
            if runset["filters"].get("filters") != [leaf]:
                raise ValueError(f"{runset['name']} would be chosen by {runset['filters']}, not by the ids {ids}")
            meant = [] if alone or runset["name"] == LEFT_OUT else groups
            if runset["grouping"] != meant:
                raise ValueError(f"{runset['name']} would be grouped by {runset['grouping']}, not by {meant}")
    unknown = used_metrics(spec) - set(metrics) - {X_AXIS}
    if unknown:
        raise ValueError(f"No run has logged {', '.join(sorted(unknown))}, so panels of the report would be empty")
    return spec


def used_metrics(spec: Mapping[str, Any]) -> set[str]:
    """The metrics that panels and run tables of a specification show, and what curves have on their x axis."""
    found: set[str] = set()
    for block in spec["blocks"]:
        if block["type"] == "panel-grid":
            metadata = block["metadata"]
            for panel in metadata["panelBankSectionConfig"]["panels"]:
                config = panel["config"]
                found |= {*config.get("metrics", ())}
                found |= {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in config}
            for runset in metadata["runSets"]:
                columns = runset["runFeed"]["columnOrder"]
                found |= {c.removeprefix("summary:") for c in columns if c.startswith("summary:")}
    return found


def _runsets(report: wr.Report) -> Iterator[wr.Runset]:
    for block in report.blocks:
        if isinstance(block, wr.PanelGrid):
            yield from block.runsets


# --- sending --------------------------------------------------------------------------------------------------------


@contextmanager
def _answers() -> Iterator[None]:
    """What W&B refuses is a wrong input, such as another's project; it has said why."""
    try:
        yield
    except wandb.errors.UsageError as error:
        raise ValueError(f"W&B: {error} Then give this command again") from error
    except (wandb.errors.CommError, WandbApiFailedError) as error:
        said = " ".join(str(error).split()).rstrip(" .")
        raise ValueError(
            f"W&B does not answer, or refuses: {said}. Look at the network, at entity= and project=, "
            "and at the account (wandb login --relogin)"
        ) from error


def publish(report: wr.Report, runs: Selection, metrics: Collection[str], grouping: Sequence[str] = GROUPING) -> str:
    """Save the report to W&B and return its address; one of the same title in the project is updated.

    An updated report keeps its id, its comments and its authors; all its blocks are replaced.

    Args:
        report: as `build` made it; its run sets get their project, and it the account's entity if it has none.
        runs, metrics, grouping: as given to `build`.

    Raises:
        ValueError: what `specification` raises, no key, a server that refuses, runs that the project does not have, or
            several reports of the title. Nothing has been saved then.
    """
    specification(report, runs, metrics, grouping)
    with _answers():
        api = wandb.Api()
        report.entity = report.entity or str(api.default_entity)
        path = f"{report.entity}/{report.project}"
        _require_runs(api, report.entity, report.project, runs)
        same = [other for other in api.reports(path) if other.display_name == report.title]
        if len(same) > 1:
            urls = ", ".join(str(other.url) for other in same)
            raise ValueError(f"{path} has {len(same)} reports titled {report.title!r}: delete all but one of {urls}")
        target = report
        if same:
            target = wr.Report.from_url(str(same[0].url))
            target.blocks, target.description, target.width = report.blocks, report.description, report.width
        for runset in _runsets(target):
            runset.entity, runset.project = report.entity, report.project
        return str(target.save().url)


def _require_runs(api: wandb.Api, entity: str, project: str, runs: Selection) -> None:
    try:
        there = {run.id for run in api.runs(f"{entity}/{project}", filters={"name": {"$in": [*runs.compared]}})}
    except ValueError as error:
        if "find project" not in str(error):
            raise
        there = set()
    missing = [name for name in runs.compared if name not in there]
    if missing:
        directories = [shlex.quote(str(runs.directories[name])) for name in missing if name in runs.directories]
        raise ValueError(
            f"W&B's project {entity}/{project} does not have the runs {', '.join(missing)}. "
            f"Name another entity= and project=, or upload them:\n  wandb sync -e {entity} -p {project} "
            f"{' '.join(directories) or 'RUN_DIRECTORY/wandb/offline-run-*'}"
        )


# --- a comparison ---------------------------------------------------------------------------------------------------


def destination(places: Iterable[str], entity: str | None, project: str | None) -> tuple[str | None, str]:
    """Where the report goes: what is given, else where the runs were read from, else the account's project `repvgg`."""
    online = [place.removeprefix(ONLINE).split("/") for place in places if place.startswith(ONLINE)]
    if online:
        entity, project = entity or online[0][0], project or online[0][1]
    return entity, project or "repvgg"


def publish_comparison(comparison: Comparison, *, entity: str | None, project: str, title: str | None) -> str:
    """The page of a comparison as a report: its text with W&B's panels for its pictures. Returns the address.

    Raises:
        ValueError: as `build` and `publish`.
    """
    title = title or page.default_title(comparison)
    runs = select(comparison.runs, [run for run, _ in comparison.left])
    metrics = {name for run in comparison.runs if run.ids for name in run.metrics}
    grouping, mixed = _grouping(comparison)
    text = page.markdown(comparison, {}, title).partition("\n")[2]  # without its title
    if mixed:
        text += f"\n\nPanels do not separate what differs in {', '.join(mixed)} alone, as the tables do."
    report = build(
        entity=entity or "", project=project, title=title, runs=runs, metrics=metrics, text=text, grouping=grouping
    )
    return publish(report, runs, metrics, grouping)


def _grouping(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Ablation, model, and what else sets the groups apart and is one value of the logged config; and what is not."""
    keys = [f"choices.{name}" if name in CHOICES else name for name in comparison.columns]
    mixed = [key for key in keys if not all(_is_value(run.config, key) for run in comparison.runs)]
    return [*dict.fromkeys([*GROUPING, *(key for key in keys if key not in mixed)])], mixed


def _is_value(config: Mapping[str, Any], key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return isinstance(node, str | int | float)
