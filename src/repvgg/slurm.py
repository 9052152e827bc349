"""A Slurm job that goes back into the queue. Standard library only: a process that has just begun needs it too."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

#: How long Slurm may take to end a job that it has put back into its queue.
WAIT_FOR_SLURM_S = 600.0
_SCONTROL_TIMEOUT_S = 60.0
#: "Temporary failure, try again" of sysexits.h: the same command goes on where this one stopped.
TRY_AGAIN = 75
LATER_AGAIN = (signal.SIGUSR1, signal.SIGUSR2)


def under_slurm() -> bool:
    """Whether this process is part of a Slurm job that is not somebody's shell (job names bash and interactive)."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def slurm_job() -> str:
    """As scontrol knows this job. SLURM_JOB_ID of one task of an array can be the id of all of it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def is_first_rank() -> bool:
    """Of all ranks, whoever started them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def requeue() -> bool:
    """Put this Slurm job back into the queue, of an array this task alone; call it on all ranks, when all is saved.

    Returns:
        whether Slurm is now about to end this process, and to begin the job again; False when this is not a Slurm job
        or Slurm refused, which rank 0 logs.
    """
    if not under_slurm():
        return False
    if not is_first_rank():
        return True
    job = slurm_job()
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=_SCONTROL_TIMEOUT_S
        )
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is None:
        log.info("Slurm begins job %s again and it goes on from its checkpoint", job)
        return True
    log.error(
        "Slurm did not requeue job %s (%s). Nothing is lost: submit it again, and it goes on from its checkpoint",
        job,
        problem,
    )
    return False


def wait_for_slurm() -> NoReturn:
    """After :func:`requeue`: wait to be ended, and end if nobody does.

    A process that returned instead would tell submitit, or the batch script, that the job is done.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what ends it; submitit would ignore it until a SIGKILL follows
    time.sleep(WAIT_FOR_SLURM_S)
    os._exit(TRY_AGAIN)


def requeue_on_signal(arguments: Sequence[str]) -> None:
    """From now on, until the training takes the signals itself: USR1 and USR2 requeue a Slurm job; nothing is begun.

    They would end the process, and with it the job. A sweep (``-m`` among the arguments) leaves it to its jobs.
    """
    if under_slurm() and not {"-m", "--multirun"} & set(arguments):
        for signum in LATER_AGAIN:
            if signal.getsignal(signum) is signal.SIG_DFL:
                signal.signal(signum, _go_back)


def _go_back(signum: int, _frame: FrameType | None) -> None:
    for each in LATER_AGAIN:
        signal.signal(each, signal.SIG_IGN)
    os.write(2, f"{signal.Signals(signum).name}: the training has not begun, or is over\n".encode())
    if requeue():
        wait_for_slurm()
    os._exit(TRY_AGAIN)
