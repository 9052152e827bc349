"""Who started the ranks, and what is said when they do not fit; without a cluster."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repvgg.learn.cluster import (
    RankLostError,
    cluster_environment,
    is_connection_lost,
    naming_lost_ranks,
    number_of,
    requeueing,
    strategy,
)
from repvgg.learn.interrupt import interrupted
from repvgg.slurm import requeue, slurm_job, under_slurm

STEP = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
PLACE = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "MASTER_ADDR": "127.0.0.1"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank, no cluster; and what is set is set back."""
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    for name in (*STEP, *PLACE, *ELASTIC, "SLURM_NTASKS_PER_NODE", "NODE_RANK", "MASTER_PORT", "GROUP_RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back whoever sets it
        monkeypatch.delenv(name)


def variables(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("devices", "number"), [(2, 2), ("3", 3), ([0, 2], 2), ("auto", None), (-1, None)])
def test_number_of_devices_here(devices: int | str | list[int], number: int | None) -> None:
    if number is None:
        import torch

        number = torch.cuda.device_count() or None
    assert number_of(devices) == number


def test_a_process_alone_starts_its_ranks_itself() -> None:
    assert isinstance(cluster_environment(2, 1), LightningEnvironment)


def test_the_first_process_of_the_second_machine_is_not_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "NODE_RANK": "1"})
    cluster_environment(2, 2)
    assert rank_zero_only.rank == 2


def test_several_machines_need_addresses() -> None:
    with pytest.raises(ValueError, match=r"num_nodes=2.*MASTER_ADDR=…, MASTER_PORT=…, NODE_RANK=…"):
        cluster_environment(1, 2)


def test_a_machine_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "NODE_RANK": "2"})
    with pytest.raises(ValueError, match="NODE_RANK=2: choose 0 to 1"):
        cluster_environment(1, 2)


def test_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, {**STEP, **PLACE})
    environment = cluster_environment(2, 2)
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert rank_zero_only.rank == 3


@pytest.mark.parametrize(("devices", "nodes"), [(1, 2), (2, 1), (4, 1)])
def test_another_number_of_tasks(monkeypatch: pytest.MonkeyPatch, devices: int, nodes: int) -> None:
    variables(monkeypatch, {**STEP, **PLACE})
    with pytest.raises(ValueError, match=f"--ntasks-per-node={devices}, or trainer.devices=2 trainer.num_nodes=2"):
        cluster_environment(devices, nodes)


def test_a_batch_script_and_a_shell_of_a_job_start_their_ranks_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, {**STEP, **PLACE})
    monkeypatch.delenv("SLURM_STEP_ID")
    assert isinstance(cluster_environment(2, 1), LightningEnvironment)
    variables(monkeypatch, {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"})
    assert isinstance(cluster_environment(2, 1), LightningEnvironment)


def test_a_worker_of_torchrun_also_under_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, {**STEP, **PLACE, **ELASTIC, "MASTER_PORT": "1", "GROUP_RANK": "1"})
    assert isinstance(cluster_environment(2, 2), TorchElasticEnvironment)
    assert rank_zero_only.rank == 3
    with pytest.raises(ValueError, match=r"--nproc-per-node=4, or trainer\.devices=2 trainer.num_nodes=2"):
        cluster_environment(4, 1)


def test_the_time_limit_reaches_ddp_and_one_device_stays_alone() -> None:
    made = strategy("auto", 2, 1, 30)
    assert isinstance(made, DDPStrategy)
    assert made._timeout == timedelta(seconds=30)
    assert isinstance(strategy("auto", 1, 2, 30), DDPStrategy)
    assert strategy("auto", 1, 1, 30) == "auto"
    assert strategy("ddp_spawn", 2, 1, 30) == "ddp_spawn"
    with pytest.raises(ValueError, match="ddp_timeout_s=0"):
        strategy("auto", 2, 1, 0)


# --- requeueing: scontrol is a script that keeps what it was given ---


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "asked"


def test_of_an_array_only_the_task(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm_job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue()
    assert scontrol.read_text() == "requeue 7_2\n"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_rank_0_alone_asks(scontrol: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(name, "1")
    assert requeue()
    assert not scontrol.exists()


def test_outside_of_slurm_and_in_a_shell_nothing_is_requeued(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert not under_slurm()
    assert not requeue()
    assert not scontrol.exists()


def test_a_refusal_is_told(scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (scontrol.parent / "scontrol").write_text("#!/bin/sh\necho 'Only batch jobs are accepted' >&2; exit 1\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not requeue()
    assert "did not requeue job 7 (Only batch jobs are accepted)" in caplog.text
    with pytest.raises(SystemExit) as stop, requeueing():
        raise interrupted(signal.SIGUSR1)
    assert stop.value.code == 75


# --- a rank that is lost ---


@pytest.mark.slow
def test_a_real_lost_rank_is_named(tmp_path: Path) -> None:
    """Two processes over gloo, of which the second leaves."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "from repvgg.learn.cluster import naming_lost_ranks\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=rank, world_size=2)\n"
        "dist.all_reduce(torch.ones(1))\n"
        "if rank == 1: os._exit(0)\n"
        "with naming_lost_ranks(rank, 2, 'HERE'): dist.all_reduce(torch.ones(1))\n"
    )
    second = subprocess.Popen([sys.executable, str(script), "1"])
    first = subprocess.run([sys.executable, str(script), "0"], capture_output=True, text=True, timeout=60, check=False)
    assert second.wait(30) == 0
    last = first.stderr.strip().splitlines()[-1]
    assert re.search(r"RankLostError: rank 0 of 2 .* has lost the others: .*in HERE: the same command goes on", last)
    assert "gloo/transport" not in last


def test_other_errors_stay_what_they_are() -> None:
    assert is_connection_lost(dist.DistBackendError("NCCL error"))
    assert not is_connection_lost(RuntimeError("shape mismatch"))
    assert not is_connection_lost(OSError("Connection reset by peer"))
    with pytest.raises(RuntimeError, match="shape") as kept, naming_lost_ranks(0, 2, ""):
        raise RuntimeError("shape mismatch")
    assert not isinstance(kept.value, RankLostError)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), naming_lost_ranks(0, 1, ""):
        raise RuntimeError("Connection closed by peer")
