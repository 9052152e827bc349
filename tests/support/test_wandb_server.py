"""The stand-in carries the real clients through what this repository asks of them."""

import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import wandb

from support.graphql import execute
from support.wandb_server import WandbServer, client

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pydantic's, of wandb-workspaces 0.4
    import wandb_workspaces.reports.v2 as wr

QUIET = wandb.Settings(quiet=True, console="off", x_disable_stats=True, disable_git=True, x_save_requirements=False)


def test_graphql_takes_what_is_asked_for() -> None:
    root = {
        "item": lambda a: {"id": a["id"], "parts": [{"n": 1}, {"n": 2}], "kind": "thing"} if a["id"] else None,
        "list": {"first": lambda a: a.get("count"), "options": lambda a: a["given"]},
    }
    document = """
        # a comment, then a fragment that is used before it is known
        query Get($id: Int!, $count: Int = 7, $no: Boolean!, $other: String) {
            item(id: $id) { ...Item missing }
            same: item(id: 0) { id }
            list {
                first(count: $count, other: $other)
                options(given: {text: "a } b", numbers: [1, -2.5e1], flag: true, kind: LARGE})
                left @include(if: $no)
                ... on List { kept: first(count: 3) @skip(if: $no) }
            }
        }
        fragment Item on Thing { number: id parts { n } }
    """
    assert execute(document, {"id": 3, "no": False}, root) == {
        "item": {"number": 3, "parts": [{"n": 1}, {"n": 2}], "missing": None},
        "same": None,
        "list": {
            "first": 7,
            "options": {"text": "a } b", "numbers": [1, -25.0], "flag": True, "kind": "LARGE"},
            "kept": 3,
        },
    }
    with pytest.raises(ValueError, match="expected ':'"):
        execute("{ item(id 3) { id } }", {}, root)


def test_holds_a_run_and_gives_it_back(wandb_server: WandbServer, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"12")
    with wandb.init(
        project="p", name="B0-id-s1", group="g", job_type="train", config={"net": {"a": 1}}, settings=QUIET
    ) as run:
        for step in range(3):
            run.log({"val/top1": step / 4, "epoch": step})
        run.log(
            {
                "table": wandb.Table(columns=["layer", "share"], data=[["stage1", 0.5]]),
                "picture": wandb.Image(np.zeros((4, 6), np.uint8)),
            }
        )
        run.log_artifact(file, name="model", type="model")
        run.summary["test/top1"] = 0.75
    held = wandb_server.run()
    assert (held.name, held.group, held.job_type, held.state) == ("B0-id-s1", "g", "train", "finished")
    assert held.config == {"net": {"a": 1}}
    assert held.column("val/top1") == [0, 0.25, 0.5]
    assert held.summary["test/top1"] == 0.75
    (picture,) = held.column("picture")
    assert (picture["width"], picture["height"]) == (6, 4)
    assert held.files[picture["path"]].startswith(b"\x89PNG")
    artifacts = {artifact.name: artifact for artifact in wandb_server.artifacts.values()}
    assert artifacts["model"].files["weights"] == b"12"
    assert all(artifact.committed for artifact in artifacts.values())

    api = wandb.Api()
    (read,) = api.runs("me/p", filters={"group": "g"})
    assert len(api.runs("me/p", filters={"group": "another"})) == 0
    assert (read.id, read.config, read.summary["test/top1"]) == (held.id, held.config, 0.75)
    assert [row["epoch"] for row in read.history(keys=["epoch"], pandas=False)] == [0, 1, 2]
    assert len(list(read.scan_history())) == 4
    assert picture["path"] in [file.name for file in read.files()]


def test_saves_finds_changes_and_deletes_a_report(wandb_server: WandbServer) -> None:
    wandb.Api().create_project("p", "me")
    grid = wr.PanelGrid(runsets=[wr.Runset(entity="me", project="p")], panels=[wr.LinePlot(x="epoch", y=["val/top1"])])
    report = wr.Report(entity="me", project="p", title="Table 6", blocks=[wr.H1("Table 6"), grid])
    report.save()
    ((identifier, view),) = wandb_server.views.items()
    assert view["displayName"] == "Table 6"
    assert '"val/top1"' in view["spec"]
    (found,) = wandb.Api().reports("me/p")
    assert found.display_name == "Table 6"
    again = wr.Report.from_url(found.url)
    again.title = "Table 6, again"
    again.save()
    assert wandb_server.views[identifier]["displayName"] == "Table 6, again"
    assert again.delete()
    assert not wandb_server.views


@pytest.mark.slow
def test_an_agent_runs_a_sweep(wandb_server: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(
        "import sys, wandb\n"
        "with wandb.init(settings=wandb.Settings(quiet=True, console='off', x_disable_stats=True)) as run:\n"
        "    run.summary['arguments'] = sys.argv[1:]\n"
    )
    (tmp_path / "sweep.yaml").write_text(
        "program: tiny.py\n"
        "method: random\n"
        "run_cap: 2\n"
        "metric: {name: loss, goal: minimize}\n"
        "parameters: {a: {values: [1, 2]}, b.c: {value: x}}\n"
        "command: ['${interpreter}', '${program}', '${args_no_hyphens}']\n"
    )
    options = {"cwd": tmp_path, "timeout": 60, "capture_output": True}
    subprocess.run(client("sweep", "--project", "p", "sweep.yaml"), check=True, **options)
    (sweep,) = wandb_server.sweeps
    subprocess.run(client("agent", f"me/p/{sweep}"), check=True, **options)
    runs = list(wandb_server.runs.values())
    assert len(runs) == 2
    for run, given in zip(runs, wandb_server.sweeps[sweep].given, strict=True):
        assert (run.sweep, run.state, run.config) == (sweep, "finished", given)
        assert run.summary["arguments"] == [f"a={given['a']}", "b.c=x"]
        assert given["a"] in (1, 2)
