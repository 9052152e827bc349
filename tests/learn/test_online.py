"""`RunLogger` in online mode, against the stand-in: what arrives, what resuming does, what it says without a server."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import wandb

from repvgg.learn.logging import RunLogger
from repvgg.report.offline import find_offline_runs, read_offline_run
from support.wandb_server import WandbServer, client


def logger(directory: Path, **options: str) -> RunLogger:
    return RunLogger(mode="online", project="repvgg", save_dir=str(directory), **options)


def test_everything_a_run_logs_arrives(wandb_server: WandbServer, tmp_path: Path) -> None:
    run = logger(tmp_path, name="B0-id-s1", group="table6", tags=["a"], job_type="eval")
    run.log_hyperparams({"net": {"depths": [1, 2]}, "recipe": {"rand_augment": None}, "seed": 1})
    run.log_metrics({"val/top1": 0.25, "health/shares": wandb.Histogram([0.1, 0.9])}, step=10)
    run.log_table("health/layers", ["layer", "share"], [["stage1.0", 0.5], ["stage1.1", None]])
    run.log_image("curve", [np.zeros((4, 6, 3), np.uint8)])
    run.finish({"test/top1": 0.75, "val/top1": 0.25}, exit_code=0)

    held = wandb_server.run()
    assert (held.project, held.name, held.group, held.job_type) == ("repvgg", "B0-id-s1", "table6", "eval")
    assert (held.tags, held.state) == (["a"], "finished")
    assert held.config == {"net": {"depths": [1, 2]}, "recipe": {"rand_augment": None}, "seed": 1}
    first = held.history[0]
    assert (first["val/top1"], first["trainer/global_step"]) == (0.25, 10)
    assert first["health/shares"]["_type"] == "histogram"
    assert held.summary["test/top1"] == 0.75
    (table,) = held.column("health/layers")
    assert json.loads(held.files[table["path"]])["data"] == [["stage1.0", 0.5], ["stage1.1", None]]
    ((picture,),) = (value["filenames"] for value in held.column("curve"))
    assert held.files[picture].startswith(b"\x89PNG")


def test_the_next_run_of_a_process_is_a_run_of_its_own(wandb_server: WandbServer, tmp_path: Path) -> None:
    for number in (1, 2):
        run = logger(tmp_path, name=f"run {number}")
        run.log_hyperparams({"seed": number})
        run.finish({}, exit_code=number - 1)
    states = {(held.name, held.state, held.config["seed"]) for held in wandb_server.runs.values()}
    assert states == {("run 1", "finished", 1), ("run 2", "failed", 2)}


def test_the_same_id_appends(wandb_server: WandbServer, tmp_path: Path) -> None:
    for steps in ([1, 2, 3], [4, 5]):
        run = logger(tmp_path, id="mine")
        run.log_hyperparams({"epochs": max(steps)})
        for step in steps:
            run.log_metrics({"loss": 1 / step}, step=step)
        run.finish({f"after/{max(steps)}": 1.0}, exit_code=0)
    held = wandb_server.run()
    assert (held.id, held.begun) == ("mine", 2)
    assert [row["_step"] for row in held.history] == [0, 1, 2, 3, 4]
    assert held.column("trainer/global_step") == [1, 2, 3, 4, 5]
    assert held.summary.keys() >= {"after/3", "after/5"}
    assert held.config == {"epochs": 5}


def test_sync_joins_the_offline_parts_of_a_run(wandb_server: WandbServer, tmp_path: Path) -> None:
    for part in (1, 2):
        run = RunLogger(mode="offline", project="repvgg", save_dir=str(tmp_path / str(part)), id="mine")
        run.log_hyperparams({"part": part})
        run.log_metrics({"loss": 1 / part}, step=part)
        run.finish({}, exit_code=0)
        assert not wandb_server.runs
    directories = [str(file.parent) for file in find_offline_runs(tmp_path)]
    for directory in directories:
        subprocess.run(client("sync", directory), check=True, timeout=60, capture_output=True)
    held = wandb_server.run()
    assert held.id == "mine"
    assert held.column("loss") == [1, 0.5]
    assert held.config == {"part": 2}


def test_no_server_is_an_error_that_says_what_to_do(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb_server.stop()
    with pytest.raises(ValueError, match=r"W&B: (?s:.*)connection refused\. Or .* logger=wandb_offline"):
        logger(tmp_path).log_hyperparams({})


@pytest.mark.slow
def test_a_server_that_goes_away_costs_no_run(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    run = logger(tmp_path)
    run.log_hyperparams({"seed": 1})
    wandb_server.stop()
    run.log_metrics({"val/top1": 0.5}, step=1)
    run.log_table("health/layers", ["layer"], [["stage1"]])
    run.finish({"test/top1": 0.75}, exit_code=0)
    assert "W&B has not got the table health/layers" in caplog.text
    (file,) = find_offline_runs(tmp_path)
    kept = read_offline_run(file)
    assert kept.history["val/top1"].tolist() == [0.5]
    assert kept.config["seed"] == 1
