"""A real Slurm: its tasks, its arrays, its queue."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.commands import ROOT, TRAIN, assert_same_training, begun, only_run, record, small, start, wait_until
from support.slurm import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def batch(overrides: list[str], *srun: str) -> str:
    """A line of a batch script."""
    return f"exec {shlex.join([*srun, *TRAIN, *overrides])}"


def test_srun_starts_the_ranks(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    slurm.run("srun", "--ntasks=2", "--nodes=1", *TRAIN, *small(digits, tmp_path, "trainer.devices=2"), cwd=ROOT)
    run = only_run(tmp_path)
    assert record(run)["status"] == "finished"
    assert record(run)["config"]["world_size"] == 2
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1


def test_two_nodes(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    overrides = small(digits, tmp_path, "trainer.num_nodes=2")
    two = ("srun", "--nodes=2", "--ntasks-per-node=1", *TRAIN, *overrides)
    said = slurm.run(*two, cwd=ROOT, check=False)
    assert "error: the first node of this job, one, has no address here" in said  # it is a name for Slurm alone
    slurm.run(*two, cwd=ROOT, MASTER_ADDR="127.0.0.1")
    assert record(only_run(tmp_path))["config"]["world_size"] == 2


def test_another_number_of_tasks_than_ranks_is_an_error(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    said = slurm.run("srun", "--ntasks=1", *TRAIN, *small(digits, tmp_path, "trainer.devices=2"), cwd=ROOT, check=False)
    assert "error: Slurm started 1 tasks on 1 nodes, and trainer.devices=2" in said
    assert "--ntasks-per-node=2" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("outputs/*/checkpoints"))


def test_a_batch_script_without_srun(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    """Lightning alone would wait for tasks that nobody starts."""
    overrides = small(digits, tmp_path, "trainer.devices=2")
    job = slurm.submit(batch(overrides), "--ntasks-per-node=2", output=tmp_path / "out", cwd=ROOT)
    slurm.wait(job, "COMPLETED", "FAILED")
    assert slurm.state_of(job) == "COMPLETED", (tmp_path / "out").read_text()[-2000:]
    assert record(only_run(tmp_path))["config"]["world_size"] == 2


def test_a_cancelled_job_has_saved_and_is_not_requeued(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    overrides = small(digits, tmp_path, "trainer.devices=2", epochs=6)
    line = batch(overrides, "srun")
    job = slurm.submit(line, "--ntasks-per-node=2", output=tmp_path / "out", cwd=ROOT)
    wait_until(lambda: begun(tmp_path), "the first epoch", 120)
    slurm.run("scancel", job)
    ended = slurm.wait(job, "CANCELLED", "COMPLETED", "PENDING", "REQUEUED")
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    run = only_run(tmp_path)
    wait_until((run / "result.json").exists, "the record", 30)
    assert record(run)["status"] == "interrupted"
    assert "SIGTERM" in record(run)["error"]

    again = slurm.submit(line, "--ntasks-per-node=2", output=tmp_path / "out", cwd=ROOT)
    slurm.wait(again, "COMPLETED")
    assert "goes on in epoch" in (tmp_path / "out").read_text()
    assert record(run)["status"] == "finished"


def test_a_job_that_is_too_long_for_its_time_goes_back_into_the_queue(
    slurm: Slurm, digits: Path, tmp_path: Path
) -> None:
    overrides = small(digits, tmp_path, epochs=10_000)  # more than any machine trains in that time
    # Slurm signals up to a minute early, here 30 s after the job's begin or later: a process has its handlers by then.
    job = slurm.submit(
        batch(overrides, "srun"),
        "--time=2",
        "--signal=USR1@30",
        "--open-mode=append",
        output=tmp_path / "out",
        cwd=ROOT,
    )
    wait_until(lambda: slurm.jobs()[job]["Restarts"] != "0", "the job to be requeued", 200)
    assert "SIGUSR1: stopping after this batch" in (tmp_path / "out").read_text()
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")


@pytest.mark.parametrize("when", ["before the training", "in the training"])
def test_a_signalled_job_goes_back_into_the_queue(slurm: Slurm, digits: Path, tmp_path: Path, when: str) -> None:
    job = slurm.submit(
        batch(small(digits, tmp_path, epochs=20), "srun"), "--open-mode=append", output=tmp_path / "out", cwd=ROOT
    )
    run = [tmp_path / "outputs", tmp_path / "outputs" / "*" / "checkpoints" / "last.ckpt"][when == "in the training"]
    wait_until(lambda: list(tmp_path.glob(str(run.relative_to(tmp_path)))), when, 120)
    slurm.run("scancel", "--signal=USR2", job)
    wait_until(lambda: slurm.jobs()[job]["Restarts"] == "1", "the job to be requeued", 60)
    said = (tmp_path / "out").read_text()
    assert "Slurm begins job" in said or when == "before the training"  # when nothing logs yet
    wait_until(lambda: slurm.state_of(job) in ("RUNNING", "COMPLETED"), "it to begin again", 60)
    if when == "in the training":
        wait_until(lambda: "goes on in epoch" in (tmp_path / "out").read_text(), "it to go on", 90)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", "COMPLETED")


def test_a_sweep_is_an_array_of_which_a_signalled_task_alone_is_requeued(
    slurm: Slurm, digits: Path, tmp_path: Path
) -> None:
    overrides = small(digits, tmp_path, "trainer.devices=2", epochs=5)
    sweep = start(
        [
            *(*TRAIN, "-m", "hydra/launcher=submitit_slurm", "ablation=plain,id", "hydra.launcher.cpus_per_task=1"),
            *("hydra.sweep.subdir=${hydra:job.num}", f"hydra.sweep.dir={tmp_path}/sweep", *overrides),
        ],
        tmp_path / "sweep.log",
        **{name: value for name, value in slurm.environment.items() if name == "SLURM_CONF"},
    )
    try:
        first = tmp_path / "sweep" / "0"
        wait_until((first / "checkpoints" / "last.ckpt").exists, "the first epoch", 120)
        tasks = {name: job for name, job in slurm.jobs().items() if job["JobState"] == "RUNNING"}
        array, hit = next(iter(tasks)).partition("_")[0], ""
        assert sorted(tasks) == [f"{array}_0", f"{array}_1"]
        hit = f"{array}_0"
        # --full: the batch script and srun get it too.
        slurm.run("scancel", "--signal=USR1", "--full", hit)
        assert sweep.wait(180) == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    finally:
        sweep.kill()
        sweep.wait()
    after = slurm.jobs()
    assert (after[hit]["Restarts"], after[f"{array}_1"]["Restarts"]) == ("1", "0")
    output = "".join(file.read_text() for file in (tmp_path / "sweep" / ".submitit" / hit).glob("*_0_log.out"))
    assert len(re.findall("goes on in epoch", output)) == 1
    assert (tmp_path / "sweep" / "summary.md").exists()
    for job in ("0", "1"):
        assert record(tmp_path / "sweep" / job)["status"] == "finished"
        assert record(tmp_path / "sweep" / job)["config"]["run"]["group"].endswith("/sweep")

    # As if there had been no signal.
    alone = start([*TRAIN, *overrides, "ablation=plain"], tmp_path / "alone.log")
    assert alone.wait(120) == 0
    assert_same_training(first, only_run(tmp_path))


def test_a_job_that_fails_costs_no_other(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    overrides = small(digits, tmp_path, "hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={tmp_path}/sweep")
    said = slurm.run(
        *(*TRAIN, "-m", "hydra/launcher=submitit_slurm", "hydra.sweep.subdir=${hydra:job.num}"),
        *("recipe.batch_size=64,2000", *overrides),
        cwd=ROOT,
        check=False,
    )
    assert "1 of 2 jobs failed" in said
    assert "it ended without a result; see " in said
    assert record(tmp_path / "sweep" / "0")["status"] == "finished"
    assert (tmp_path / "sweep" / "summary.md").exists()
