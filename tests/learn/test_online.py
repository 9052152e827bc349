"""`RunLogger` in online mode, against the stand-in: what arrives, what resuming does, what it says without a server."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repvgg import wandb_file
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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second or so for an answer."""
    for name in ("INIT", "HTTP", "FINISH"):
        monkeypatch.setenv(f"WANDB_{name}_TIMEOUT", "1")


def log_steps(run: RunLogger, steps: range) -> None:
    for step in steps:
        run.log_metrics({"train/loss": float(step)}, step=step)


def test_without_a_server_a_run_is_kept_here_and_sent_by_the_next_start(
    wandb_server: WandbServer, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    wandb_server.stop()
    run = logger(tmp_path, id="mine")
    run.log_hyperparams({"start": 1})
    assert "W&B does not answer, and the run is kept on this machine: " in caplog.text
    log_steps(run, range(4))
    run.log_metrics({"val/top1": 0.5, "shares": wandb.Histogram([0.1, 0.9])}, step=4)
    run.log_table("layers", ["layer"], [["stage1"]])
    run.finish({"val/top1": 0.5}, exit_code=75)
    (file,) = find_offline_runs(tmp_path)
    assert f"Once it answers, wandb sync {file.parent}\n" in caplog.text
    assert read_offline_run(file).id == "mine"

    wandb_server.come_back()
    wandb.teardown()  # the next start is another process
    run = logger(tmp_path, id="mine")
    run.log_hyperparams({"start": 2})
    log_steps(run, range(3, 6))
    run.finish({"test/top1": 0.75}, exit_code=0)
    held = wandb_server.run()
    assert (held.id, held.begun, held.state, held.config) == ("mine", 1, "finished", {"start": 2})
    assert held.column("train/loss") == [0, 1, 2, 3, 3, 4, 5]
    assert [row["_step"] for row in held.history] == list(range(len(held.history)))
    assert held.column("_timestamp") == sorted(held.column("_timestamp"))
    assert (held.summary["train/loss"], held.summary["val/top1"], held.summary["test/top1"]) == (5, 0.5, 0.75)
    (shares,) = held.column("shares")
    assert shares["_type"] == "histogram"
    (table,) = held.column("layers")
    assert json.loads(held.files[table["path"]])["data"] == [["stage1"]]

    run = logger(tmp_path, id="mine")  # nothing is sent a second time
    run.log_hyperparams({"start": 3})
    run.finish({}, exit_code=0)
    assert held.column("train/loss") == [0, 1, 2, 3, 3, 4, 5]
    for file in find_offline_runs(tmp_path):
        subprocess.run(client("sync", str(file.parent)), check=True, timeout=60, capture_output=True)
    assert held.column("train/loss") == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "user is not logged in"), (403, "permission denied"), (200, "entity not found")]
)
def test_a_refusal_is_an_error_at_once(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30")
    wandb_server.refusal = (status, message)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"W&B: (?s:.*){message}(?s:.*)\. Or .* logger=wandb_offline"):
        logger(tmp_path).log_hyperparams({})
    assert time.monotonic() - begun < 20


def test_other_ranks_have_no_run(wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run = logger(tmp_path, id="mine")
    run.log_hyperparams({"seed": 1})
    run.log_table("layers", ["layer"], [["stage1"]])
    run.finish({}, exit_code=1, preempted=True)
    assert not wandb_server.calls
    assert not list(tmp_path.rglob("*.wandb"))


def test_the_parts_of_an_offline_run_are_named_together(
    wandb_server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "repvgg")
    for part in range(2):
        run = RunLogger(mode="offline", project="repvgg", save_dir=str(tmp_path), id="mine")
        run.log_hyperparams({})
        run.finish({}, exit_code=0)
        named = "wandb sync " + " ".join(str(file.parent) for file in find_offline_runs(tmp_path))
        assert (named in caplog.text) == bool(part)
        time.sleep(1.1)  # W&B names its directories by the second


def test_no_key_is_an_error_at_once(wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"W&B: No API key configured\. .* logger=wandb_offline"):
        logger(tmp_path).log_hyperparams({})
    assert not wandb_server.calls


def test_a_start_that_waits_in_vain_waits_no_longer_than_asked(
    wandb_server: WandbServer, tmp_path: Path, impatient: None
) -> None:
    """A server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        begun = time.monotonic()
        run = logger(tmp_path)
        run.log_hyperparams({})
        assert time.monotonic() - begun < 25
        assert run.experiment.offline
        run.finish({}, exit_code=0)
        wandb.teardown()


@pytest.mark.slow
def test_a_server_that_goes_away_gets_the_missing_rows_later(
    wandb_server: WandbServer, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = logger(tmp_path, id="mine")
    run.log_hyperparams({"seed": 1})
    log_steps(run, range(3))
    deadline = time.monotonic() + 60
    while len(wandb_server.run().history) < 3 and time.monotonic() < deadline:  # the client sends every 15 s
        time.sleep(0.2)
    wandb_server.stop()
    log_steps(run, range(3, 6))
    run.log_table("health/layers", ["layer"], [["stage1"]])
    run.finish({"test/top1": 0.75}, exit_code=0)
    assert "W&B has not got the table health/layers" in caplog.text
    (file,) = find_offline_runs(tmp_path)
    kept = read_offline_run(file)
    assert kept.history["train/loss"].dropna().tolist() == [0, 1, 2, 3, 4, 5]
    assert (kept.config["seed"], kept.summary["test/top1"]) == (1, 0.75)
    assert wandb_server.run().column("train/loss") == [0, 1, 2]

    wandb_server.come_back()
    assert f"Once it answers, python -m repvgg.learn.deliver {tmp_path}\n" in caplog.text
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "repvgg.learn.deliver", str(tmp_path)], check=True, timeout=100)
        held = wandb_server.run()
        assert held.column("train/loss") == [0, 1, 2, 3, 4, 5]
        assert (held.summary["test/top1"], held.state, held.config) == (0.75, "finished", {"seed": 1})


@pytest.mark.slow
def test_a_killed_process_loses_a_second_of_rows_at_most_and_leaves_no_other(
    wandb_server: WandbServer, tmp_path: Path
) -> None:
    """Online: what it had not sent yet is sent by the next start."""
    code = f"""
import os, time
from repvgg import wandb_file
from repvgg.learn.logging import RunLogger
run = RunLogger(mode="online", project="repvgg", save_dir={str(tmp_path)!r}, id="mine")
run.log_hyperparams({{}})
step = 0
while True:
    run.log_metrics({{"train/loss": float(step)}}, step=step)
    os.write(1, b"%d %f\\n" % (step, time.monotonic()))
    step += 1
    time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line.split()[0]) == 70:
                break
        helpers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        last = [line.split() for line in process.stdout.read().splitlines() if line.count(".") == 1][-1:]
    (file,) = find_offline_runs(tmp_path)
    kept = read_offline_run(file)
    rows = len(kept.history)
    assert not kept.finished
    assert kept.history["train/loss"].tolist() == list(range(rows))
    assert rows >= int(last[0][0] if last else 70) - 60  # 3 s, where a core is busy; the client alone: 15 s
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{helper}").exists() for helper in helpers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert helpers
    assert not any(Path(f"/proc/{helper}").exists() for helper in helpers)

    run = logger(tmp_path, id="mine")
    run.log_hyperparams({})
    log_steps(run, range(50, 52))
    run.finish({}, exit_code=0)
    assert wandb_server.run().column("train/loss") == [*range(rows), 50, 51]


@pytest.mark.parametrize(("preempted", "state"), [(True, "preempted"), (False, "failed")])
def test_a_preempted_run_is_called_so(wandb_server: WandbServer, tmp_path: Path, preempted: bool, state: str) -> None:
    run = logger(tmp_path)
    run.log_hyperparams({})
    run.finish({}, exit_code=75, preempted=preempted)
    assert wandb_server.run().state == state


def test_an_offline_run_can_be_marked_preempted_too(wandb_server: WandbServer, tmp_path: Path) -> None:
    run = RunLogger(mode="offline", project="repvgg", save_dir=str(tmp_path), id="mine")
    run.log_hyperparams({})
    run.finish({}, exit_code=75, preempted=True)
    (file,) = find_offline_runs(tmp_path)
    assert "preempting" in [record.WhichOneof("record_type") for record in wandb_file.records(file)]
    subprocess.run(client("sync", str(file.parent)), check=True, timeout=60, capture_output=True)
    assert wandb_server.run().state == "preempted"
