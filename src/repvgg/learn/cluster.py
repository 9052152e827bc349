"""More than one process or machine: Slurm, torchrun, plain hosts; and a connection that is lost."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repvgg.learn.checkpoint import Interrupted
from repvgg.learn.ranks import RANK_LOST
from repvgg.slurm import TRY_AGAIN, requeue, under_slurm, wait_for_slurm

# --- who started this process, and which rank it is ------------------------------------------------------------------


def cluster_environment(devices: int | str | list[int], num_nodes: int) -> ClusterEnvironment:
    """How the ranks of this run find each other; sets Lightning's idea of this process's rank to the right one.

    One of torchrun's workers, one of srun's tasks, or a process that starts the other ranks of its machine itself:
    also inside of an `sbatch` script that does without srun, where Lightning would wait for tasks that nobody started.

    Raises:
        ValueError: Slurm started another number of tasks than the run has ranks, or with several machines nobody says
            which of them this is.
    """
    if TorchElasticEnvironment.detect():
        environment: ClusterEnvironment = TorchElasticEnvironment()
        _require_workers(devices, num_nodes)
        rank_zero_only.rank = environment.global_rank()  # type: ignore[attr-defined]
        return environment
    if _is_slurm_task():
        _require_tasks(devices, num_nodes)
        # Lightning refuses --ntasks without it; the number of tasks has been checked.
        os.environ["SLURM_NTASKS_PER_NODE"] = str(int(os.environ["SLURM_NTASKS"]) // num_nodes)
        if num_nodes == 1:  # names of nodes need not be names of hosts
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environment = SLURMEnvironment(auto_requeue=False)
        _require_address(environment.main_address)
        rank_zero_only.rank = environment.global_rank()  # type: ignore[attr-defined]
        return environment
    _require_addresses(num_nodes)
    node, local = (int(os.environ.get(name, "0")) for name in ("NODE_RANK", "LOCAL_RANK"))
    # On every machine but the first it would be that of the machine.
    rank_zero_only.rank = node * (number_of(devices) or 1) + local  # type: ignore[attr-defined]
    return LightningEnvironment()


def number_of(devices: int | str | list[int]) -> int | None:
    """How many ranks `trainer.devices` asks for on a machine; None where Lightning finds out."""
    if isinstance(devices, int | str) and str(devices).isdigit():
        return int(devices)
    if isinstance(devices, int | str):  # -1, "auto"
        return torch.cuda.device_count() or None
    return len(devices)


def _is_slurm_task() -> bool:
    """Whether srun started this process as a rank. A batch script's commands are in no step, a shell is one alone."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_NTASKS" not in os.environ:
        return False
    return under_slurm() or int(os.environ["SLURM_NTASKS"]) > 1


def _require_tasks(devices: int | str | list[int], num_nodes: int) -> None:
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    wanted = number_of(devices)
    if nodes != num_nodes or (wanted is not None and tasks != wanted * nodes):
        per_node = tasks // nodes if tasks % nodes == 0 else tasks / nodes
        raise ValueError(
            f"Slurm started {tasks} tasks on {nodes} nodes, and trainer.devices={devices} "
            f"trainer.num_nodes={num_nodes} is one task per device: give srun --nodes={num_nodes} "
            f"--ntasks-per-node={wanted}, or trainer.devices={per_node:g} trainer.num_nodes={nodes}"
        )


def _require_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"the first node of this job, {host}, has no address here ({error.strerror}): give MASTER_ADDR=ADDRESS in "
            "the environment of the job"
        ) from error


def _require_workers(devices: int | str | list[int], num_nodes: int) -> None:
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    wanted = number_of(devices)
    if wanted is not None and (here != wanted or everywhere != wanted * num_nodes):
        raise ValueError(
            f"torchrun started {here} processes here and {everywhere} in all, and trainer.devices={devices} "
            f"trainer.num_nodes={num_nodes} is one process per device: give torchrun --nnodes={num_nodes} "
            f"--nproc-per-node={wanted}, or trainer.devices={here} trainer.num_nodes={everywhere // here}"
        )


def _require_addresses(num_nodes: int) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if num_nodes > 1 and missing:
        raise ValueError(
            f"trainer.num_nodes={num_nodes}: which machine is this, and where is the first? Start with srun, with "
            f"torchrun, or on every machine with {', '.join(f'{name}=…' for name in missing)} in the environment"
        )
    node = int(os.environ.get("NODE_RANK", "0"))
    if num_nodes > 1 and not 0 <= node < num_nodes:
        raise ValueError(f"NODE_RANK={node}: choose 0 to {num_nodes - 1}, since trainer.num_nodes={num_nodes}")


def strategy(given: Any, devices: int | str | list[int], num_nodes: int, timeout_s: float, **options: Any) -> Any:
    """DDP that waits `timeout_s` seconds at most for another rank, wherever Lightning would choose DDP.

    Args:
        given: `trainer.strategy`; anything but ``auto`` and ``ddp`` is left as it is.
        options: further ones of ``DDPStrategy``.

    Raises:
        ValueError: the time is not positive.
    """
    if timeout_s <= 0:
        raise ValueError(f"ddp_timeout_s={timeout_s} must be a positive number of seconds")
    several = num_nodes > 1 or (number_of(devices) or 1) > 1
    if given == "ddp" or (given == "auto" and several):
        return DDPStrategy(timeout=timedelta(seconds=timeout_s), **options)
    return given


@contextmanager
def requeueing() -> Iterator[None]:
    """After a signal that means "later again", a Slurm job goes back into the queue, and the block does not return."""
    try:
        yield
    except Interrupted as stop:
        if stop.code == TRY_AGAIN and requeue():
            wait_for_slurm()
        raise


# --- a connection that is lost ---------------------------------------------------------------------------------------

#: What gloo, NCCL and the store say in plain RuntimeErrors, or in errors that are subclasses of it.
_LOST = re.compile(
    r"gloo/transport|Timed out waiting \d+ms for|Connection (closed|reset|refused)|[Bb]roken pipe"
    r"|No route to host|Network is unreachable|NCCL|ProcessGroup.* (timeout|timed out)|Socket Timeout"
)


class RankLostError(RuntimeError):
    """This rank waited in vain for another one, or was told that it is gone."""

    exit_code = RANK_LOST


@contextmanager
def naming_lost_ranks(rank: int, world_size: int, directory: str) -> Iterator[None]:
    """Turn what a broken connection raises into one clear error.

    Raises:
        RankLostError: with what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size == 1 or not is_connection_lost(error):
            raise
        raise RankLostError(
            f"rank {rank} of {world_size} (on {socket.gethostname()}) has lost the others: {_first_line(error)}. "
            "One of them ended, or the network between them broke; the first to fail says why in its own output. "
            f"Nothing is lost before the last checkpoint in {directory}: the same command goes on from there"
        ) from error


def is_connection_lost(error: BaseException) -> bool:
    """Whether another rank, or the way to it, is what failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def _first_line(error: BaseException) -> str:
    """Without the place in gloo's source, which every message begins with, and its advice to look elsewhere."""
    line = str(error).strip().partition("\n")[0].partition(" This is typically caused")[0]
    return re.sub(r"^\[.*?\.(cc|cpp|h):\d+\]\s*", "", line).rstrip(".")
