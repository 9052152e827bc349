import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from repvgg.report import page, workspace
from repvgg.report.compare import compare
from repvgg.report.runs import Run, read_runs
from repvgg.report.workspace import (
    Selection,
    build,
    destination,
    publish,
    publish_comparison,
    select,
    specification,
    used_metrics,
)
from support.wandb_server import ENTITY, WandbServer
from support.wandb_server import Run as ServerRun

SHARES = {f"health/share/stage{stage}/{branch}" for stage in (1, 2) for branch in ("conv3x3", "identity")}
METRICS = workspace.planned_metrics() | SHARES
TABLE = "| ablation | top-1 [%] |\n|---|--:|\n| full | 75.14 ± 0.10 |"
TEXT = f"What is compared.\n\n## Top-1\n\n{TABLE}\n\n## Commands\n\n```bash\n## as typed\npython src/train.py\n```\n"
IDS = Selection(["run1", "run2"], ["run3"])


def report(runs: Selection = IDS, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "entity": ENTITY,
        "project": "repvgg",
        "title": "Table 6",
        "description": "Branches",
        "runs": runs,
        "metrics": METRICS,
        "text": TEXT,
    }
    return build(**given | changes)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr("wandb.Api", refuse)


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]


def panels(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = [panel for grid in grids(spec) for panel in grid["panelBankSectionConfig"]["panels"]]
    return {panel["config"].get("chartTitle", panel["viewType"]): panel for panel in found}


def texts(spec: dict[str, Any]) -> str:
    return "\n".join(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")


# --- offline --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_run_sets_are_chosen_by_id_and_grouped_by_nested_choices() -> None:
    spec = specification(report(), IDS, METRICS)
    *compared, left_out = [runset for grid in grids(spec) for runset in grid["runSets"]]

    def filters(ids: list[str]) -> dict[str, Any]:
        leaf = {"key": {"section": "run", "name": "name"}, "op": "IN", "value": ids, "disabled": False}
        return {"filterFormat": "filterV2", "filters": [leaf]}

    assert [runset["filters"] for runset in compared] == [filters(["run1", "run2"])] * 5
    assert left_out["filters"] == filters(["run3"])
    grouping = [{"section": "config", "name": f"choices.value.{choice}"} for choice in ("ablation", "model")]
    assert [runset["grouping"] for runset in compared] == [grouping] * 4 + [[]]
    assert left_out["grouping"] == []


@pytest.mark.usefixtures("no_network")
def test_groups_may_be_set_apart_by_more() -> None:
    grouping = ("choices.ablation", "recipe.lr", "seed")
    made = report(grouping=grouping)
    spec = specification(made, IDS, METRICS, grouping)
    names = [key["name"] for key in grids(spec)[0]["runSets"][0]["grouping"]]
    assert names == ["choices.value.ablation", "recipe.value.lr", "seed.value"]
    with pytest.raises(ValueError, match="would be grouped by"):
        specification(made, IDS, METRICS)


@pytest.mark.usefixtures("no_network")
def test_panels_have_the_metrics_under_the_names_that_w_and_b_reads() -> None:
    spec = specification(report(), IDS, METRICS)
    found = panels(spec)
    curve = found["Validation top-1, deploy form"]
    assert (curve["viewType"], curve["config"]["xAxis"]) == ("Run History Line Plot", "epoch")
    assert curve["config"]["metrics"] == ["val/deploy/top1"]
    assert (curve["config"]["groupAgg"], curve["config"]["groupArea"]) == ("mean", "minmax")
    bars = found["Images per second, deploy form"]
    assert (bars["viewType"], bars["config"]["metrics"]) == ("Bar Chart", ["bench/deploy/images_per_s"])
    scatter = found["Top-1 against images per second"]["config"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:bench/deploy/images_per_s", "summary:test/deploy/top1")
    assert found["Shares in stage2"]["config"]["metrics"] == [
        "health/share/stage2/conv3x3",
        "health/share/stage2/identity",
    ]
    assert "Run Comparer" in {panel["viewType"] for panel in found.values()}
    assert used_metrics(spec) == METRICS | {"epoch"}
    columns = grids(spec)[0]["runSets"][0]["runFeed"]["columnOrder"]
    assert columns[:3] == ["config:choices.value.ablation", "config:choices.value.model", "config:seed.value"]


@pytest.mark.usefixtures("no_network")
def test_panels_do_not_overlap() -> None:
    for grid in grids(specification(report(), IDS, METRICS)):
        cells = []
        for panel in grid["panelBankSectionConfig"]["panels"]:
            box = panel["layout"]
            assert box["x"] + box["w"] <= 24
            cells += [(box["x"] + i, box["y"] + j) for i in range(box["w"]) for j in range(box["h"])]
        assert len(cells) == len(set(cells))


@pytest.mark.usefixtures("no_network")
def test_sections_of_the_text_are_sections_of_the_report() -> None:
    blocks = specification(report(), IDS, METRICS)["blocks"]
    assert blocks[1]["type"] == "table-of-contents"
    shown = [block.get("content") or block["children"][0]["text"] for block in blocks[2:7]]
    code = "```bash\n## as typed\npython src/train.py\n```"
    assert shown == ["What is compared.", "Top-1", TABLE, "Commands", code]
    assert [block["type"] for block in blocks[2:7]] == ["markdown-block", "heading"] * 2 + ["markdown-block"]


@pytest.mark.usefixtures("no_network")
def test_what_no_run_logged_has_no_panel_and_is_named() -> None:
    runs = Selection(["run1"], elsewhere=["multirun/3"])
    metrics = METRICS - SHARES - {"bench/deploy/images_per_s"}
    spec = specification(report(runs, metrics=metrics), runs, metrics)
    assert not {"Images per second, deploy form", "Top-1 against images per second"} & panels(spec).keys()
    assert not [title for title in panels(spec) if title.startswith("Shares")]
    assert {runset["name"] for grid in grids(spec) for runset in grid["runSets"]} == {"Runs compared"}
    assert "No run has logged `bench/deploy/images_per_s`, `health/share/*`: no panels" in texts(spec)
    assert "not logged to W&B: multirun/3" in texts(spec)
    assert used_metrics(spec) == metrics | {"epoch"}
    assert "No run has logged" not in texts(specification(report(), IDS, METRICS))


@pytest.mark.usefixtures("no_network")
def test_int8_has_panels_where_it_was_measured_and_no_words_where_not() -> None:
    measured = METRICS | {"test/int8/top1", "int8/rel_l2_diff", "int8/top1_agreement"}
    spec = specification(report(metrics=measured), IDS, measured)
    assert {title for title in panels(spec) if "int8" in title} == {plot.title for plot in workspace.INT8_SECTION[2]}
    assert used_metrics(spec) == measured | {"epoch"}
    assert "int8" not in texts(specification(report(), IDS, METRICS))


@pytest.mark.usefixtures("no_network")
def test_a_metric_that_was_renamed_is_an_error() -> None:
    with pytest.raises(ValueError, match="No run has logged val/deploy/top1"):
        specification(report(), IDS, METRICS - {"val/deploy/top1"} | {"val/deployed/top1"})


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "filters",
    [
        "",
        "config.data.name = 'digits'",  # W&B's client makes nothing of it
        "Metric('ID') in ['run1']",
        "Metric('Name') in ['run1', 'run2']",
        "Metric('ID') in ['run1', 'run2'] or Metric('State') in ['finished']",
    ],
)
def test_a_filter_that_is_not_what_was_meant_is_an_error(filters: str) -> None:
    made = report()
    next(workspace._runsets(made)).filters = filters
    with pytest.raises(ValueError, match=r"not by the ids \['run1', 'run2'\]"):
        specification(made, IDS, METRICS)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("group", ["choices.ablation", "config.ablation", "config.choices.ablation.value"])
def test_a_grouping_that_is_not_what_was_meant_is_an_error(group: str) -> None:
    made = report()
    next(workspace._runsets(made)).groupby = [group]
    with pytest.raises(ValueError, match="would be grouped by"):
        specification(made, IDS, METRICS)


@given(
    st.lists(st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="'\\=<>"), min_size=1), min_size=1)
)
@example(["multirun/2026-11-22", '(a) and "b"', "x, y] z"])
def test_every_id_that_is_let_in_comes_out_as_it_was(ids: list[str]) -> None:
    runs = Selection(ids)
    spec = specification(build(entity="me", project="p", title="t", runs=runs, metrics=(), text=""), runs, ())
    assert grids(spec)[0]["runSets"][0]["filters"]["filters"][0]["value"] == ids


@pytest.mark.parametrize("name", ["0_ablation=id", "it's", "a\\n", "a<b", "a\nb", ""])
def test_an_id_that_the_client_would_change_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot filter by"):
        Selection([name])


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="logger=wandb_offline"):
        select([Run(Path("a"), "finished", name="a")])


@pytest.mark.parametrize(
    ("places", "given", "found"),
    [
        (["multirun"], (None, None), (None, "repvgg")),
        (["multirun", "wandb:team/nets/table6"], (None, None), ("team", "nets")),
        (["wandb:team/nets"], ("me", "other"), ("me", "other")),
    ],
)
def test_a_report_goes_where_the_runs_are(
    places: list[str], given: tuple[str | None, str | None], found: tuple[str | None, str]
) -> None:
    assert destination(places, *given) == found


@pytest.mark.parametrize("title", ["", "a/b", "what?", "x" * 129])
def test_a_title_that_makes_no_address_is_an_error(title: str) -> None:
    with pytest.raises(ValueError, match="title="):
        report(title=title)


def test_runs_are_selected_by_the_id_of_their_end(tmp_path: Path) -> None:
    file = tmp_path / "0" / "wandb" / "offline-run-20260101_000000-new" / "run-new.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    runs = [
        Run(tmp_path / "0", "finished", name="0", ids=("old", "new")),
        Run(Path("B0-id-s1"), "running", name="B0-id-s1", ids=("online",)),
        Run(tmp_path / "1", "finished", name="1"),
    ]
    left_out = [Run(tmp_path / "2", "failed", name="2", ids=("gone",)), Run(tmp_path / "3", "failed", name="3")]
    assert select(runs, left_out) == Selection(["new", "online"], ["gone"], {"new": file.parent}, ["1"])


# --- through the real client ----------------------------------------------------------------------------------------


@pytest.fixture
def with_runs(wandb_server: WandbServer) -> WandbServer:
    wandb_server._project(ENTITY, "repvgg", create=True)
    for name in ("run1", "run2"):
        wandb_server.runs[name] = ServerRun(name, ENTITY, "repvgg", group="table6", state="finished")
    return wandb_server


def of_view(view: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(view["spec"])
    return spec


def test_saved_then_updated_not_doubled(with_runs: WandbServer) -> None:
    first = report()
    url = publish(first, IDS, METRICS)
    assert url.startswith(f"{with_runs.url}/{ENTITY}/repvgg/reports/Table-6--")
    (view,) = with_runs.views.values()
    assert (view["displayName"], view["description"], view["type"]) == ("Table 6", "Branches", "runs")
    sent = of_view(view)
    projects = [runset.pop("project") for grid in grids(sent) for runset in grid["runSets"]]
    assert {(project["name"], project["entityName"]) for project in projects} == {("repvgg", ENTITY)}
    assert sent == specification(first, IDS, METRICS)

    # comments live in the specification, too
    commented = of_view(view) | {"discussionThreads": [{"id": "a comment"}]}
    view["spec"] = json.dumps(commented)
    assert publish(report(text="| new |\n|---|", description="Again"), IDS, METRICS) == url
    (view,) = with_runs.views.values()
    assert view["description"] == "Again"
    assert "| new |" in texts(of_view(view))
    assert TABLE not in texts(of_view(view))
    assert of_view(view)["discussionThreads"] == [{"id": "a comment"}]

    loaded = workspace.wr.Report.from_url(url)
    assert specification(loaded, IDS, METRICS)["blocks"] == [
        without_project(block) for block in of_view(view)["blocks"]
    ]
    assert publish(report(title="Table 7"), IDS, METRICS) != url
    assert len(with_runs.views) == 2


def without_project(block: dict[str, Any]) -> dict[str, Any]:
    for runset in block.get("metadata", {}).get("runSets", ()):
        runset.pop("project")
    return block


def test_two_reports_of_the_title_are_named(with_runs: WandbServer) -> None:
    for _ in range(2):
        report().save()
    with pytest.raises(ValueError, match=r"has 2 reports titled 'Table 6': delete all but one of http.*, http"):
        publish(report(), IDS, METRICS)
    assert with_runs.calls["upsertView"] == 2


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        (Selection(["run1", "gone"]), "(?s)does not have the runs gone. .*wandb sync -e me -p repvgg RUN_DIRECTORY"),
        (Selection(["gone"], directories={"gone": Path("/d/wandb/offline-run-gone")}), "/d/wandb/offline-run-gone"),
    ],
)
def test_runs_that_were_not_uploaded_are_named(with_runs: WandbServer, runs: Selection, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        publish(report(runs), runs, METRICS)
    assert not with_runs.views


def test_a_project_that_does_not_exist_is_not_made(with_runs: WandbServer) -> None:
    with pytest.raises(ValueError, match="W&B's project me/typo does not have"):
        publish(report(project="typo"), IDS, METRICS)
    assert (ENTITY, "typo") not in with_runs.projects


def test_what_w_and_b_refuses_is_said(with_runs: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: dict[str, Any]) -> None:
        raise PermissionError("no permission to write reports")

    monkeypatch.setattr(with_runs, "_upsert_view", refuse)
    with pytest.raises(ValueError, match=r"refuses: .*no permission to write reports.*wandb login --relogin"):
        publish(report(), IDS, METRICS)
    with_runs.errors.clear()


def test_nothing_is_asked_before_the_specification_is_right(with_runs: WandbServer) -> None:
    with pytest.raises(ValueError, match="No run has logged"):
        publish(report(), IDS, METRICS - {"test/top1"})
    assert not with_runs.calls


def test_without_a_key_the_next_step_is_said(
    with_runs: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="wandb login"):
        publish(report(), IDS, METRICS)
    assert not with_runs.views


def test_groups_of_the_tables_are_groups_of_the_panels(with_runs: WandbServer) -> None:
    def run(name: str, lr: float, clip: float | None) -> Run:
        choices = {"model": "repvgg_b0", "ablation": "full", "recipe": "quick", "data": "digits"}
        config = {"choices": choices, "seed": 1, "recipe": {"lr": lr}, "trainer": {"gradient_clip_val": clip}}
        metrics = {"test/top1": 0.9, "test/deploy/top1": 0.9}
        return Run(Path(name), "finished", config, metrics, name=name, ids=(name,))

    comparison = compare([run("run1", 0.1, None), run("run2", 0.2, None), run("run3", 0.2, 1.0)])
    with_runs.runs["run3"] = ServerRun("run3", ENTITY, "repvgg", state="finished")
    publish_comparison(comparison, entity=None, project="repvgg", title=None)
    (view,) = with_runs.views.values()
    assert view["displayName"] == page.default_title(comparison)
    names = [key["name"] for key in grids(of_view(view))[0]["runSets"][0]["grouping"]]
    assert names == ["choices.value.ablation", "choices.value.model", "recipe.value.lr"]
    assert "Panels do not separate what differs in trainer.gradient_clip_val alone" in texts(of_view(view))


# --- of a real run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_offline_run_is_uploaded_as_told_and_fills_every_panel(
    wandb_server: WandbServer, digits: Path, tmp_path: Path
) -> None:
    def call(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    small = ["model=repvgg_a0", "net.width_a=0.25", "net.width_b=0.25", "bench.warmup=1", "bench.batches=2"]
    small += ["data=digits", "trainer=cpu", "recipe=quick", "logger=wandb_offline", "bench.batch=8"]
    call("src/train.py", *small, "trainer.max_epochs=1", f"data.dir={digits}", f"hydra.run.dir={tmp_path / 'run'}")
    comparison = compare(read_runs([str(tmp_path)])[0])
    with pytest.raises(ValueError, match=f"does not have the runs {comparison.runs[0].ids[0]}") as error:
        publish_comparison(comparison, entity=ENTITY, project="repvgg", title=None)
    call("-m", "wandb", *shlex.split(str(error.value).partition("upload them:\n  wandb ")[2]))
    uploaded = wandb_server.run()
    logged = uploaded.summary.keys() | {key for row in uploaded.history for key in row}
    assert workspace.planned_metrics() <= logged
    assert uploaded.config["choices"].keys() >= {"ablation", "model"}
    assert "seed" in uploaded.config

    printed = call("src/report.py", f"runs={tmp_path}", "target=wandb", "title=Branches").strip()
    ((identifier, view),) = wandb_server.views.items()
    assert printed == f"{wandb_server.url}/{ENTITY}/repvgg/reports/Branches--{identifier}"
    spec = of_view(view)
    assert used_metrics(spec) <= logged
    assert "No run has logged" not in texts(spec)
    assert {f"Shares in stage{stage}" for stage in range(1, 5)} <= panels(spec).keys()
    assert page.tables(comparison)["accuracy"].strip() in texts(spec)
    assert publish_comparison(comparison, entity=None, project="repvgg", title="Branches") == printed
