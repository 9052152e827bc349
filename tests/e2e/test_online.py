"""`train.py … logger=wandb` against the stand-in: two processes log one run, and one process continues it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.test_train import LOGGED, SMALL, SUMMARY
from support.wandb_server import Run, WandbServer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One epoch on two ranks, then a second epoch of the same run in another process."""
    directory = tmp_path_factory.mktemp("online")
    with WandbServer() as server:
        train = [
            *[sys.executable, "src/train.py", *SMALL, "data=digits", f"data.dir={digits}", "trainer=cpu"],
            *["logger=wandb", "seed=7", "ablation=id", "run.group=g", "run.id=mine"],
        ]
        options = {
            "cwd": ROOT,
            "env": {**os.environ, **server.environment(directory / "client")},
            "timeout": 200,
            "stdin": subprocess.DEVNULL,
        }
        first = ["trainer.devices=2", "trainer.max_epochs=1", f"hydra.run.dir={directory}/first"]
        subprocess.run([*train, *first], check=True, **options)
        assert len(server.runs) == 1
        assert server.run().begun == 1
        then = ["trainer.max_epochs=2", f"hydra.run.dir={directory}/then"]
        checkpoint = f"ckpt_path={directory}/first/checkpoints/last.ckpt"
        subprocess.run([*train, *then, checkpoint], check=True, **options)
        assert not server.errors
        yield server.run()


def test_both_processes_wrote_to_one_run(run: Run) -> None:
    assert (run.id, run.begun, run.state) == ("mine", 2, "finished")
    assert (run.project, run.name, run.group, run.job_type) == ("repvgg", "A0-id-digits-s7", "g", "train")


def test_history_and_summary_have_every_promised_key(run: Run) -> None:
    assert {key for row in run.history for key in row} >= LOGGED
    assert run.summary.keys() >= SUMMARY | LOGGED
    assert run.summary["val/deploy/top1"] == run.column("val/deploy/top1")[-1]
    assert run.summary["test/best_epoch"] in (0, 1)


def test_resuming_appends(run: Run) -> None:
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert [row["epoch"] for row in run.history if "val/top1" in row] == [0, 1]
    steps = [row["trainer/global_step"] for row in run.history if "train/loss_step" in row]
    assert steps == sorted(set(steps))


def test_the_config_is_nested_and_whole(run: Run) -> None:
    assert run.config["choices"]["ablation"] == "id"
    assert run.config["net"]["depths"] == [2, 4, 14, 1]
    assert run.config["bench"]["batch"] == 8
    assert run.config["recipe"]["optimizer"]["momentum"] == 0.9
    assert (run.config["seed"], run.config["world_size"]) == (7, 1)  # the second process's
    assert len(run.config["git"]["sha"]) >= 7
    assert not [key for key in run.config if "." in key]


def test_tables_and_histograms_arrive(run: Run) -> None:
    tables = [value for row in run.history for value in row.values() if _type(value) == "table-file"]
    assert len(tables) == 2
    assert all(table["path"] in run.files for table in tables)
    assert any(_type(value) == "histogram" for row in run.history for value in row.values())


def _type(value: object) -> object:
    return value.get("_type") if isinstance(value, dict) else None
