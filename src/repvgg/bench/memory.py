"""What a line needs above its network at rest: the peak of a fresh process, or of torch's allocator on a GPU.

On a processor, a process of its own builds the line, notes its resident memory, has the kernel forget the peak so far,
runs the line, and reads the new peak (Linux: VmRSS and VmHWM of /proc/self/status). At rest are the weights and the
images, for a training step also the momenta, and of torch's runtimes whatever a first call leaves, since compiling and
kernels that are made at first use are no need of the line. ONNX Runtime and OpenVINO keep the memory of their first
call, so of them it counts.

What the C library holds back for later is no need either: in that process, large blocks go back to the system at once.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from repvgg.bench.programs import Work
from repvgg.bench.rounds import Program

#: Calls of which the peak is taken.
CALLS = 2
#: Of glibc's malloc.h.
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4


class NotMeasuredError(RuntimeError):
    """The memory of a line is not known; the message says why."""


def peak(work: Work) -> int:
    """Bytes above what is there at rest.

    Raises:
        NotMeasuredError: the process died, or this system does not say.
    """
    if work.conditions.device == "cuda":
        return _on_gpu(work)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, sender))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's, which ends that one
    process.start()
    signal.signal(signal.SIGINT, before)
    sender.close()
    try:
        answer = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        raise NotMeasuredError(f"its process ended with exit code {process.exitcode}, perhaps out of memory") from None
    finally:
        process.terminate()  # after Ctrl-C
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise NotMeasuredError(answer)
    return int(answer)


def _on_gpu(work: Work) -> int:
    program = _at_rest(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(CALLS):
        program.call()
    return torch.cuda.max_memory_allocated() - before


def _at_rest(work: Work) -> Program:
    """The program, with nothing in memory that it could do without between two calls."""
    program = work.prepare()
    if work.rests_after_first:
        program.call()
    program.rest()
    gc.collect()
    return program


def _measure(work: Work, sender: Connection) -> None:
    """In the fresh process: send the bytes, or what went wrong."""
    try:
        _return_freed_blocks()
        torch.set_num_threads(work.conditions.threads)
        program = _at_rest(work)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS from here
        for _ in range(CALLS):
            program.call()
        sender.send(max(0, _status("VmHWM") - before))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _return_freed_blocks() -> None:
    """Tell glibc to map every block of 64 KiB or more by itself; unmapped, its memory is the system's again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or mallopt(M_MMAP_THRESHOLD, 1 << 16) != 1 or mallopt(M_MMAP_MAX, 1 << 30) != 1:
        raise OSError("memory on a processor is measured with glibc's mallopt, which this system lacks")


def _status(name: str) -> int:
    """Bytes that /proc/self/status says."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
