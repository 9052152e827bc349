"""What runs leave, read back: directories as training leaves them, files of the real W&B client, its API."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from repvgg.report import page, runs
from repvgg.report.compare import compare
from repvgg.report.offline import find_offline_runs
from repvgg.report.record import RunRecord
from repvgg.report.runs import Run, read_runs
from support.wandb_server import Run as Online
from support.wandb_server import WandbServer, wandb_server  # noqa: F401

Make = Callable[..., RunRecord]
CHOICES = {"model": "repvgg_b0", "ablation": "id", "data": "digits", "recipe": "quick"}

#: Arguments: directory of the run, its id, first and last epoch, seed, and how it ends: an exit code, or `kill`.
CLIENT = """
import os, sys, time, wandb
settings = wandb.Settings(
    console="off", x_disable_stats=True, x_disable_machine_info=True, disable_git=True,
    x_save_requirements=False, x_transaction_log_flush_interval=0.1,
)
choices = {"model": "repvgg_b0", "ablation": "id", "data": "digits", "recipe": "quick"}
for directory, name, first, last, seed, end in (words.split(",") for words in sys.argv[1:]):
    run = wandb.init(
        dir=directory, id=name, name=name, project="p", config={"choices": choices, "seed": int(seed)},
        settings=settings,
    )
    for epoch in range(int(first), int(last)):
        top1 = {"val/top1": epoch / 10, "val/deploy/top1": epoch / 10}
        run.log({**top1, "epoch": epoch, "trainer/global_step": 9 + epoch})
    if end == "kill":
        time.sleep(0.6)
        os._exit(9)
    run.summary.update({"test/top1": 0.5, "test/deploy/top1": 0.5, "health/share/stage1/identity": 0.25})
    run.finish(exit_code=int(end))
"""


def log_offline(environment: dict[str, str], *runs: str) -> None:
    for words in runs:
        Path(words.split(",")[0]).mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", CLIENT, *runs], env=environment, check=False, timeout=100)


def named(found: list[Run], name: str) -> Run:
    (run,) = [run for run in found if run.name == name]
    return run


def curve(run: Run) -> list[tuple[int, float]]:
    deploy = run.history[run.history["metric"] == "val/deploy/top1"]
    return list(zip(deploy["epoch"].tolist(), deploy["value"].tolist(), strict=True))


def test_wandbs_files_alone_say_what_they_know(tmp_path: Path, environment: dict[str, str]) -> None:
    root = tmp_path / "runs"
    log_offline(
        environment,
        *[f"{root}/whole,whole,0,3,1,0", f"{root}/bad,bad,0,2,2,1"],
        *[f"{root}/first,same,0,2,3,1", f"{root}/second,same,2,5,3,0"],  # resumed elsewhere under its id
        f"{root}/killed,killed,0,4,4,kill",
    )
    (whole,) = find_offline_runs(root / "whole")
    shutil.copytree(whole.parent, root / "copies" / "offline-run-20260101_000000-whole")
    found, notes = read_runs([str(root)])
    assert {run.ids: run.status for run in found} == {
        ("whole",): "finished",
        ("bad",): "failed",
        ("same",): "finished",
        ("killed",): "not finished",
    }
    by_id = {run.ids[0]: run for run in found}
    assert curve(by_id["whole"]) == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert curve(by_id["same"]) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert len(curve(by_id["killed"])) == 4
    assert by_id["whole"].metrics["test/deploy/top1"] == 0.5
    assert by_id["whole"].started is not None
    assert sum("counted once" in note for note in notes) == 2
    comparison = compare(found)
    assert [run.config["seed"] for run in comparison.runs] == [1, 3]
    assert {run.ids[0]: reason for run, reason in comparison.left} == {
        "bad": "exit code 1 in its W&B file",
        "killed": "killed, or still running: its W&B file has no record of an end",
    }


def test_a_run_killed_while_it_waited_for_wandb_is_what_its_record_says(
    make_run: Make, tmp_path: Path, environment: dict[str, str]
) -> None:
    log_offline(environment, f"{tmp_path}/a,one,0,2,1,kill")
    assert read_runs([f"{tmp_path}/a"])[0][0].status == "not finished"
    time.sleep(1)  # a record's time is of whole seconds
    shutil.copy(make_run("b", "id").run_dir / "result.json", tmp_path / "a")
    (run,), _ = read_runs([f"{tmp_path}/a"])
    assert (run.status, run.ids) == ("finished", ("one",))


def test_a_record_beside_an_open_wandb_file_is_of_an_earlier_start(
    make_run: Make, tmp_path: Path, environment: dict[str, str]
) -> None:
    directory = make_run("a", "id").run_dir
    log_offline(environment, f"{directory},one,0,2,1,0")
    assert read_runs([str(tmp_path)])[0][0].status == "finished"
    log_offline(environment, f"{directory},two,0,2,1,kill")
    (run,), _ = read_runs([str(tmp_path)])
    assert (run.status, run.ids) == ("not finished", ("one", "two"))


def test_a_torn_wandb_file_is_named_and_costs_nothing_else(make_run: Make, tmp_path: Path) -> None:
    folder = make_run("a").run_dir / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").write_bytes(b"")
    (run,), notes = read_runs([str(tmp_path)])
    assert (run.status, run.ids) == ("finished", ())
    assert any("run-x.wandb is not a W&B run file" in note for note in notes)


def test_directories_at_any_depth_and_what_is_missing_in_them(make_run: Make, tmp_path: Path) -> None:
    make_run("0_ablation=full,seed=1", seed=1, curve=())
    make_run("deep/er/1_ablation=id", "id", metrics={"val/top1": math.nan}, curve=())
    for name in ("torn", "begun"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    (tmp_path / "torn" / "result.json").write_text('{"status": "finis')
    (tmp_path / "torn" / "metrics.csv").write_text("")
    (tmp_path / "torn" / ".hydra" / "hydra.yaml").write_text("hydra: {job: {nu")
    (tmp_path / "torn" / "hparams.yaml").write_text("seed: [")
    found, notes = read_runs([str(tmp_path)])
    assert [(run.name, run.status) for run in found] == [
        ("0_ablation=full,seed=1", "finished"),
        ("deep/er/1_ablation=id", "finished"),
        ("torn", "unreadable"),
    ]
    assert notes == ["Not counted: 1 folders in which nothing began, such as of refused commands: begun."]
    twice, _ = read_runs([str(tmp_path), str(tmp_path / "deep")])
    assert len(twice) == 3


def test_what_hydra_and_the_csv_logger_wrote_of_a_killed_run(make_run: Make, tmp_path: Path) -> None:
    run_dir = make_run("a", curve=(0.1, 0.2, 0.3)).run_dir
    (run_dir / "result.json").unlink()
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra/hydra.yaml").write_text(
        "hydra: {job: {num: '???', name: train}, runtime: {choices: {ablation: id}}, overrides: {task: [seed=3]}}"
    )
    (run_dir / ".hydra/config.yaml").write_text("seed: 3\ncallbacks: {best: {dirpath: '${output_dir}/x'}}\n")
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("2,39,,0.")
    (run,), _ = read_runs([str(tmp_path)])
    assert (run.status, run.choice("ablation"), run.config["seed"]) == ("no result", "id", 3)
    assert run.overrides == ("seed=3",)
    assert run.config["callbacks"] == {"best": {"dirpath": "${output_dir}/x"}}
    assert curve(run) == [(0, 0.1), (1, 0.2), (2, 0.3)]
    (run_dir / "hparams.yaml").write_text("choices: {ablation: full}\nseed: 4\nnet: {width_a: 0.25}\n")
    (run,), _ = read_runs([str(tmp_path)])
    assert (run.choice("ablation"), run.config["net"]) == ("full", {"width_a": 0.25})


def test_of_what_two_starts_logged_the_later_ones_counts(make_run: Make, tmp_path: Path) -> None:
    run_dir = make_run("a", curve=(0.1, 0.2)).run_dir
    header = "epoch,step,train/loss,val/deploy/top1\n"
    (run_dir / "metrics.csv").rename(run_dir / "metrics.1.csv")
    (run_dir / "metrics.csv").write_text(f"{header}1,19,,0.25\n2,29,,0.3\n")
    (run,), _ = read_runs([str(tmp_path)])
    assert curve(run) == [(0, 0.1), (1, 0.25), (2, 0.3)]
    (run_dir / "metrics.csv").write_text(f"{header}0,9,,0.7\n")
    (run,), _ = read_runs([str(tmp_path)])
    assert curve(run) == [(0, 0.7), (1, 0.2)]
    (run_dir / "metrics.csv").unlink()  # a start that was killed before its first row
    (run,), _ = read_runs([str(tmp_path)])
    assert curve(run) == [(0, 0.1), (1, 0.2)]


def test_an_evaluation_is_told_from_a_training(make_run: Make, tmp_path: Path) -> None:
    make_run("train")
    make_run("evaluate", config={"weights": {"naming": "ours", "form": "train"}})
    found, _ = read_runs([str(tmp_path)])
    assert {run.name: run.evaluation for run in found} == {"train": False, "evaluate": True}


@pytest.mark.parametrize(
    ("place", "says"),
    [("nowhere", "there is no directory .*nowhere"), ("wandb:me", "write wandb:ENTITY/PROJECT or wandb:ENTITY/PROJ")],
)
def test_a_place_that_is_none_is_one_error(place: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_runs([place])


# --- W&B's API ------------------------------------------------------------------------------------------------------


def online(server: WandbServer, name: str, seed: int, **more: Any) -> None:
    rows = [
        {"_step": 2 * i, "epoch": i, "trainer/global_step": 10 * i, "val/top1": v, "val/deploy/top1": v}
        for i, v in enumerate((0.1, 0.2))
    ] + [{"_step": 5, "epoch": 1, "trainer/global_step": 12, "train/loss": 0.5}]
    summary = {"test/top1": 0.5, "test/deploy/top1": 0.5 + seed / 100, "media": {"_type": "table"}}
    config = {"choices": {"value": CHOICES | {"ablation": more.pop("ablation", "id")}}, "seed": {"value": seed}}
    server.runs[name] = dataclasses.replace(
        Online(name, "me", "repvgg", name=f"run {name}", group="g", job_type="train", state="finished"),
        **{"history": rows, "summary": summary, "logged_config": config, **more},
    )


def test_runs_of_a_project_or_a_group_come_through_the_api(
    wandb_server: WandbServer,  # noqa: F811
) -> None:
    wandb_server._upsert_project({"entityName": "me", "name": "repvgg"})
    online(wandb_server, "a", 1)
    online(wandb_server, "b", 2, state="crashed")
    online(wandb_server, "c", 3, group="other")
    online(wandb_server, "d", 1, ablation="full")
    online(wandb_server, "e", 1, job_type="eval")
    found, notes = read_runs(["wandb:me/repvgg/g"])
    assert sorted((run.ids[0], run.status) for run in found) == [
        *[("a", "finished"), ("b", "crashed"), ("d", "finished"), ("e", "finished")]
    ]
    assert notes == []
    assert curve(named(found, "run a")) == [(0, 0.1), (1, 0.2)]
    assert named(found, "run a").metrics == {"test/top1": 0.5, "test/deploy/top1": 0.51}
    comparison = compare(found)
    assert [(r.name, reason) for r, reason in comparison.left] == [("run b", "W&B calls it crashed")]
    assert len(comparison.runs) == 2
    assert any("evaluations of checkpoints and left out: run e" in note for note in comparison.notes)
    assert {run.ids[0] for run in read_runs(["wandb:me/repvgg"])[0]} == {*"abcde"}


def test_an_online_copy_of_an_offline_run_counts_once(
    wandb_server: WandbServer,  # noqa: F811
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    log_offline(environment, f"{tmp_path}/here,a,0,2,1,0")
    wandb_server._upsert_project({"entityName": "me", "name": "repvgg"})
    online(wandb_server, "a", 1)
    found, notes = read_runs([str(tmp_path), "wandb:me/repvgg"])
    assert [run.ids for run in found] == [("a",)]
    assert any("counted once" in note for note in notes)


@pytest.mark.parametrize(("minutes", "status"), [(-5, "finished"), (5, "not finished")])
def test_of_two_starts_of_one_run_the_later_one_says_how_it_ended(minutes: int, status: str) -> None:
    heard = datetime(2026, 1, 1, tzinfo=UTC)
    there = Run(Path("there"), "finished", ids=("a",), ended=heard, online=True, name="there")
    started = heard + timedelta(minutes=minutes)
    here = Run(Path("here"), "not finished", ids=("a",), started=started, overrides=("seed=1",), name="here")
    for order in ([there, here], [here, there]):
        (run,) = runs._merge_copies(order, [])
        assert (run.status, run.overrides) == (status, ("seed=1",))


def test_a_project_that_is_not_there_is_one_error(wandb_server: WandbServer) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"runs=wandb:me/none: W&B says: .*none"):
        read_runs(["wandb:me/none"])


# --- what is odd ----------------------------------------------------------------------------------------------------

GOOD = {"status": "finished", "objective": None, "error": None, "ended": None}
MEASURED = {"test/top1": 0.5, "test/deploy/top1": 0.5}
ODD = {
    "empty": b"",
    "half": b'{"status": "finis',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "no metrics": json.dumps({**GOOD, "config": {}}).encode(),
    "a metric that is text": json.dumps({**GOOD, "config": {}, "metrics": {"test/top1": "high"}}).encode(),
    "a config that is a list": json.dumps({**GOOD, "config": [1], "metrics": MEASURED}).encode(),
    "an end that is no time": json.dumps({**GOOD, "ended": "soon", "config": {}, "metrics": MEASURED}).encode(),
    **{
        f"{key} that is {value!r}": json.dumps(
            {**GOOD, "config": {"choices": CHOICES, "seed": 7, key: value}, "metrics": MEASURED}
        ).encode()
        for key, value in [
            *[("choices", "id"), ("choices", ["id"]), ("seed", "one"), ("seed", [1]), ("seed", 1.5), ("seed", True)],
            *[("trainer", "cpu"), ("bench", [1]), ("callbacks", "none"), ("git", "abc"), ("data", 3), ("net", "B0")],
        ]
    },
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_an_odd_record_is_listed_as_such_and_the_others_are_compared(
    content: bytes, make_run: Make, tmp_path: Path
) -> None:
    make_run("good", seed=1)
    odd = make_run("odd", seed=2).run_dir
    (odd / "result.json").write_bytes(content)
    found, notes = read_runs([str(tmp_path)])
    assert notes == []
    comparison = compare(found)
    assert [run.name for run in comparison.runs] == ["good"]
    ((run, why),) = comparison.left
    assert (run.name, run.status) == ("odd", "unreadable")
    assert "result.json is not the record of a run" in why
    text = page.markdown(comparison, {})
    assert "| `odd` | unreadable |" in text
    page.write_page(comparison, tmp_path / "page")


def test_a_record_that_cannot_be_opened_is_listed_too(make_run: Make, tmp_path: Path) -> None:
    make_run("good", seed=1)
    odd = make_run("odd", seed=2).run_dir
    (odd / "result.json").unlink()
    (odd / "result.json").symlink_to(odd / "result.json")  # in a circle: an OSError, also for whoever may read all
    found, _ = read_runs([str(tmp_path)])
    assert {run.name: run.status for run in found} == {"good": "finished", "odd": "unreadable"}


@pytest.mark.parametrize("name", [".hydra/hydra.yaml", ".hydra/config.yaml", "hparams.yaml", "metrics.csv"])
@pytest.mark.parametrize(
    "content", [b"", b"7", b"[1]", b"a: [", bytes(range(256)), b"hydra: 3", b"epoch,step,val/top1\nx,y,z\n"]
)
def test_odd_files_beside_a_record_cost_no_more_than_what_they_say(
    name: str, content: bytes, make_run: Make, tmp_path: Path
) -> None:
    directory = make_run("a", seed=1).run_dir
    (directory / ".hydra").mkdir()
    (directory / name).write_bytes(content)
    assert [run.name for run in compare(read_runs([str(tmp_path)])[0]).runs] == ["a"]
    (directory / "result.json").unlink()
    (run,) = read_runs([str(tmp_path)])[0] or [None]
    assert run is None or run.status in ("no result", "unreadable")


@pytest.mark.parametrize("top1", [math.nan, math.inf])
def test_a_top1_that_is_no_number_is_in_no_mean(top1: float, make_run: Make, tmp_path: Path) -> None:
    make_run("good", seed=1)
    make_run("odd", seed=2, metrics={"test/top1": top1, "test/deploy/top1": top1})
    comparison = compare(read_runs([str(tmp_path)])[0])
    assert [(run.name, why) for run, why in comparison.left] == [("odd", "finished without a top-1")]


def test_times_with_a_zone_and_without_are_in_one_order(make_run: Make, tmp_path: Path) -> None:
    for name, ended in (("a", "2026-01-01T00:00:00"), ("b", "2026-01-01T00:00:01+00:00")):
        directory = make_run(name, seed=1).run_dir
        record = json.loads((directory / "result.json").read_text()) | {"ended": ended}
        (directory / "result.json").write_text(json.dumps(record))
    assert [run.name for run in compare(read_runs([str(tmp_path)])[0]).runs] == ["b"]


def test_what_never_began_is_not_counted(make_run: Make, tmp_path: Path) -> None:
    make_run("good", seed=1)
    for name in ("refused", "killed"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "train.log").write_text("error: no such key\n")
    (tmp_path / "killed" / "run.json").write_text("{}")
    found, notes = read_runs([str(tmp_path)])
    assert sorted(run.name for run in found) == ["good", "killed"]
    assert notes == ["Not counted: 1 folders in which nothing began, such as of refused commands: refused."]


@pytest.mark.parametrize(
    ("status", "error", "config", "why"),
    [
        (
            "stopped",
            "trainer.max_time=00:00:01:00 in epoch 1 of 50",
            {},
            "trainer.max_time=00:00:01:00 in epoch 1 of 50",
        ),
        ("dry run", None, {}, "a dry run, trainer.fast_dev_run"),
        ("finished", None, {"trainer": {"fast_dev_run": True}}, "a dry run, trainer.fast_dev_run"),
        ("interrupted", "SIGTERM", {}, "SIGTERM"),
        ("something new", None, {}, "something new"),
    ],
)
def test_only_a_finished_run_is_in_a_mean(
    status: str, error: str | None, config: dict[str, Any], why: str, make_run: Make, tmp_path: Path
) -> None:
    make_run("good", seed=1)
    directory = make_run("other", seed=2, config=config).run_dir
    record = json.loads((directory / "result.json").read_text()) | {"status": status, "error": error}
    (directory / "result.json").write_text(json.dumps(record))
    comparison = compare(read_runs([str(tmp_path)])[0])
    assert [run.name for run in comparison.runs] == ["good"]
    assert [(run.name, reason) for run, reason in comparison.left] == [("other", why)]
