"""Ranks of one machine live and die together: no orphan, no hang, and a word about who was first."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning.strategies.launchers import subprocess_script

from repvgg.learn.interrupt import EXIT_CODES

log = logging.getLogger(__name__)

#: How long the others may take to end by themselves, once one rank is gone.
GRACE_S = 30.0
#: How often a rank looks after the others.
POLL_S = 0.5
#: Exit code of a rank that was left alone.
RANK_LOST = 76
_ORDERLY = {0, *EXIT_CODES.values()}


def live_and_die_together() -> None:
    """Call in every rank before the training.

    Lightning starts the other ranks of a machine as children of rank 0. When one of them fails, its observer kills
    rank 0 within 5 s, whatever that is doing, and without a record; when rank 0 is killed, its children stay. Here
    the others get time to end by themselves, which they do at once where the connection breaks (gloo), and not at all
    where they wait on a GPU.
    """
    if "LOCAL_RANK" in os.environ and os.environ["LOCAL_RANK"] != "0" and not _has_an_agent():
        _in_background(_leave_with_rank_0, os.getppid())
    subprocess_script._launch_process_observer = _observe


def _has_an_agent() -> bool:
    """Whether torchrun looks after the ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _observe(child_processes: list[subprocess.Popen[Any]]) -> None:
    _in_background(_end_with_any, child_processes)


def _in_background(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True, name="ranks").start()


def _end_with_any(ranks: list[subprocess.Popen[Any]]) -> None:
    failed = None
    while failed is None:
        time.sleep(POLL_S)
        if all(rank.poll() == 0 for rank in ranks):
            return
        failed = next((rank for rank in ranks if rank.poll() is not None and rank.returncode not in _ORDERLY), None)
    log.error("%s; this run ends", _how(failed, 1 + ranks.index(failed)))
    time.sleep(GRACE_S)
    log.error("still here %.0f s after: killing what is left of this run", GRACE_S)
    for rank in ranks:
        rank.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _how(rank: subprocess.Popen[Any], number: int) -> str:
    code = rank.returncode
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"local rank {number} (process {rank.pid}) {end}"


def _leave_with_rank_0(rank_0: int) -> None:
    while os.getppid() == rank_0:
        time.sleep(POLL_S)
    time.sleep(GRACE_S)
    log.error("local rank 0 (process %d) is gone: leaving", rank_0)
    os._exit(RANK_LOST)
