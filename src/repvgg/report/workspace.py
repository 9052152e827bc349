"""The comparison as a W&B report: `build` describes it without a network, `publish` sends it.

`wandb-workspaces` 0.4 says nothing where a filter, a group or a metric addresses nothing: the panel is empty. So
`specification` compares what would be sent with what was meant, before anything is sent. Found in its source:

- `"config.data.name = 'x'"` as a filter is an empty one; only `Config('…')`, `Metric('…')` address anything.
- A filter's values are put between quotes as they are and parsed again, where `=` becomes `==` and `<` becomes `<=`.
- Groups and panels put `.value` behind the first part of a config key (`choices.value.ablation`), filters do not,
  though W&B's page does. So the filters here are on runs' own attributes alone.
- Where a run set has an entity and a project, serialising it asks the server. So run sets get theirs in `publish`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import wandb
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

with warnings.catch_warnings():
    # wandb-workspaces 0.4 with pydantic 2
    warnings.filterwarnings("ignore", "Pydantic V1 style `@validator` validators are deprecated", DeprecationWarning)
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

if TYPE_CHECKING:
    from repvgg.report.runs import Run

#: Config keys, nested: one line or bar of a panel is all runs that have these in common.
GROUPING = ("choices.ablation", "choices.model")
#: Names of the two run sets.
FINISHED, UNFINISHED = "Finished runs, by ablation and model", "Unfinished and failed runs"
X_AXIS = "epoch"
#: Of a panel grid, in its own units; it is 24 wide.
WIDTH, HEIGHT, ROW = 8, 8, 3
#: What the client passes into its own small language without escaping, or changes.
UNSAFE = frozenset("'\\=<>")

HOW_TO_READ = (
    "Accuracies are fractions of 1, measured on the validation images; speed is in images per second. *Deploy* is the "
    "network after every block has become one convolution, *train form* the network as it was trained. Panels show "
    "finished runs grouped by ablation and model: lines are means over a group's runs, bands reach from its smallest "
    "to its largest, and bars are means. The table was computed when this report was written and does not change with "
    "new runs; the panels do."
)


@dataclass(frozen=True)
class Selection:
    """The runs of a W&B project that a report shows: these ids, or else all runs of these groups.

    Ids show exactly the runs of the table. Groups also show runs that join later.

    Attributes:
        directories: W&B's files of ids; an error about a run that is not in the project yet then names the command.
        elsewhere: runs of the table that W&B was not told of; the report says so.

    Raises:
        ValueError: neither ids nor groups, or a name that W&B's client cannot put into a filter.
    """

    ids: Sequence[str] = ()
    groups: Sequence[str] = ()
    directories: Mapping[str, Path] = field(default_factory=dict)
    elsewhere: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(
                "A W&B report needs runs that were logged to W&B: train with logger=wandb, or with "
                "logger=wandb_offline and then `wandb sync`"
            )
        for name in self.names:
            if not name or UNSAFE & set(name) or not name.isprintable():
                raise ValueError(
                    f"W&B's client cannot filter by {name!r}, only by printable names without any of "
                    f"{' '.join(sorted(UNSAFE))}. Select the runs by their ids"
                )

    @property
    def names(self) -> Sequence[str]:
        """Ids or groups, whichever selects."""
        return self.ids or self.groups

    def condition(self) -> expr.FilterExpr:
        """As a filter. `IN` also for a single name: W&B's page is known to understand it (wandb-workspaces#34)."""
        return expr.Metric("ID" if self.ids else "Group").isin([*self.names])

    def query(self) -> dict[str, Any]:
        """As a filter of `wandb.Api().runs`."""
        return {"name" if self.ids else "group": {"$in": [*self.names]}}


def select(runs: Iterable[Run]) -> Selection:
    """These runs by W&B's ids: the last one of a run that was resumed under a new id, which holds its end."""
    ids: list[str] = []
    elsewhere: list[str] = []
    directories: dict[str, Path] = {}
    for run in runs:
        if not run.ids:
            elsewhere.append(run.name)
            continue
        identifier = run.ids[-1]
        ids.append(identifier)
        # run_dir is the file itself where there is nothing else of the run
        for file in [run.run_dir] if run.run_dir.is_file() else run.run_dir.rglob(f"run-{identifier}.wandb"):
            directories[identifier] = file.parent
    return Selection(ids=ids, directories=directories, elsewhere=elsewhere)


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
SHARES = re.compile(r"health/share/(?P<stage>[^/]+)/[^/]+")
SHARES_SECTION = (
    "What each branch contributes",
    "The part of a stage's fused kernels that lies along each branch, mean over its blocks: a block's shares add up to "
    "1, and a negative one works against the others.",
)


def planned_metrics() -> set[str]:
    """Every metric that a report can show, but for the shares, whose branches are the runs'."""
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
    reading: str,
    table: str,
    commands: str,
    description: str = "",
) -> wr.Report:
    """The report, without a network.

    Args:
        entity: whose project it is; empty for the account's own.
        title: a report of the same title is what `publish` updates.
        metrics: what at least one of the runs logged. A panel of anything else is left out, and the report says so.
        reading: Markdown: what is compared, the differences to which ablation, on what hardware, by what statistics.
        table: Markdown, with what W&B cannot compute.
        commands: what gives these runs and this report, line by line.

    Raises:
        ValueError: a title that W&B cannot make an address of.
    """
    if not title.strip() or len(title) > 128 or set(title) & set("/?#%\n"):
        raise ValueError(f"title={title!r}: W&B wants 1 to 128 characters, and an address is made of them: no / ? # %")
    sections = [*SECTIONS, (*SHARES_SECTION, _shares(metrics))]
    missing = planned_metrics() - set(metrics)
    each = [plot for plot in ONE_BY_ONE if set(plot.metrics) <= set(metrics)]
    blocks: list[Any] = [
        wr.TableOfContents(),
        wr.H1("What is compared"),
        wr.MarkdownBlock(f"{reading.strip()}\n\n{HOW_TO_READ}{_not_shown(missing, runs.elsewhere)}"),
        wr.H1("Table"),
        wr.MarkdownBlock(table.strip()),
    ]
    for heading, note, plots in sections:
        shown = [plot for plot in plots if set(plot.metrics) <= set(metrics)]
        if shown:
            panels = [plot.panel(_place(i)) for i, plot in enumerate(shown)]
            blocks += [wr.H1(heading), wr.MarkdownBlock(note), _grid(_finished(runs, metrics), panels)]
    blocks += [
        wr.H1("Where the runs differ"),
        wr.MarkdownBlock("Configuration and last numbers of every finished run; only what is not the same in all."),
        _grid(_finished(runs, metrics, grouped=False), [wr.RunComparer(diff_only="split", layout=_place(0, width=24))]),
        wr.H1(UNFINISHED),
        wr.MarkdownBlock("Runs of the same selection that are still running, failed or were stopped: none, if empty."),
        _grid(_unfinished(runs), [plot.panel(_place(i, width=12)) for i, plot in enumerate(each)]),
        wr.H1("Commands"),
        # Not wr.CodeBlock, which has no shell among its languages and puts all lines into one.
        wr.MarkdownBlock(f"```bash\n{commands.strip()}\n```"),
    ]
    return wr.Report(entity=entity, project=project, title=title, description=description, blocks=blocks, width="fluid")


def _not_shown(missing: Collection[str], elsewhere: Sequence[str]) -> str:
    text = ""
    if missing:
        text += f"\n\nNo run has logged {', '.join(f'`{name}`' for name in sorted(missing))}: no panels of these."
    if elsewhere:
        text += f"\n\nIn the table alone, because not logged to W&B: {', '.join(elsewhere)}."
    return text


def _place(i: int, width: int = WIDTH) -> wr.Layout:
    columns = 24 // width
    return wr.Layout(x=width * (i % columns), y=HEIGHT * (i // columns), w=width, h=HEIGHT)


def _grid(runs: wr.Runset, panels: Sequence[Any]) -> wr.PanelGrid:
    return wr.PanelGrid(runsets=[runs], panels=[*panels])


def _finished(runs: Selection, metrics: Collection[str], grouped: bool = True) -> wr.Runset:
    columns = [f"config:{_stored(key)}" for key in (*GROUPING, "seed")]
    columns += [f"summary:{name}" for name in ("test/deploy/top1", "bench/deploy/images_per_s") if name in metrics]
    return wr.Runset(
        name=FINISHED,
        filters=expr.And(runs.condition(), expr.Metric("State").isin(["finished"])),
        groupby=[f"config.{key}" for key in GROUPING] if grouped else [],
        pinned_columns=columns,
    )


def _unfinished(runs: Selection) -> wr.Runset:
    return wr.Runset(name=UNFINISHED, filters=expr.And(runs.condition(), expr.Metric("State").notin(["finished"])))


def _stored(key: str) -> str:
    """A nested config key as W&B stores it: `choices.value.ablation`."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])


# --- checking -------------------------------------------------------------------------------------------------------


def specification(report: wr.Report, runs: Selection, metrics: Collection[str]) -> dict[str, Any]:
    """The report as W&B will store it (but for the project of its run sets), made and checked without a network.

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
    meant = {FINISHED: _leaves(runs, "IN"), UNFINISHED: _leaves(runs, "NIN")}
    groups: tuple[list[dict[str, str]], ...] = ([], [{"section": "config", "name": _stored(key)} for key in GROUPING])
    for runset in (runset for grid in grids for runset in grid["runSets"]):
        sent = [{k: v for k, v in leaf.items() if k != "connector"} for leaf in runset["filters"].get("filters") or []]
        connectors = {leaf["connector"] for leaf in runset["filters"].get("filters") or [] if "connector" in leaf}
        if sent != meant.get(runset["name"]) or connectors != {"AND"}:
            raise ValueError(f"Run set {runset['name']!r} is not filtered by {runs.query()}: {runset['filters']}")
        if runset["grouping"] not in groups:
            raise ValueError(f"Run set {runset['name']!r} is not grouped by {groups[1]}: {runset['grouping']}")
    unknown = used_metrics(spec) - set(metrics) - {X_AXIS}
    if unknown:
        raise ValueError(f"No run has logged {', '.join(sorted(unknown))}, so panels of the report would be empty")
    return spec


def _leaves(runs: Selection, state: str) -> list[dict[str, Any]]:
    def leaf(name: str, op: str, value: list[str]) -> dict[str, Any]:
        return {"key": {"section": "run", "name": name}, "op": op, "value": value, "disabled": False}

    return [leaf("name" if runs.ids else "group", "IN", [*runs.names]), leaf("state", state, ["finished"])]


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


def publish(report: wr.Report, runs: Selection, metrics: Collection[str]) -> str:
    """Save the report to W&B and return its address; one of the same title in the project is updated.

    An updated report keeps its id, its comments and its authors; all its blocks are replaced.

    Args:
        report: as `build` made it; its run sets get their project, and it the account's entity if it has none.
        runs, metrics: as given to `build`.

    Raises:
        ValueError: what `specification` raises, no key, a server that refuses, runs that the project does not have, or
            several reports of the title. Nothing has been saved then.
    """
    specification(report, runs, metrics)
    with _answers():
        api = wandb.Api()
        report.entity = report.entity or str(api.default_entity)
        path = f"{report.entity}/{report.project}"
        _require_runs(api, path, runs)
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


def _require_runs(api: wandb.Api, path: str, runs: Selection) -> None:
    try:
        there = {run.id if runs.ids else run.group for run in api.runs(path, filters=runs.query())}
    except ValueError:  # there is no such project
        there = set()
    missing = [name for name in runs.names if name not in there]
    if missing:
        kind = "runs" if runs.ids else "runs of the groups"
        entity, project = path.split("/")
        directories = [str(runs.directories[name]) for name in missing if name in runs.directories]
        raise ValueError(
            f"W&B's project {path} does not have the {kind} {', '.join(missing)}. Name another entity= and project=, "
            f"or upload offline runs: wandb sync -e {entity} -p {project} "
            f"{' '.join(directories) or 'RUN_DIRECTORY/wandb/offline-run-*'}"
        )
