"""Encoding in worker processes that cannot be waited for in vain.

A worker that dies ends the writing with its exit code. Workers end with the process that started them, however that
ends.
"""

import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from repvgg.data.encode import Bad, Encoded, WriteOptions, encode_chunk
from repvgg.data.sources import ImageSource

AHEAD = 3
"""Chunks in flight per worker: bounds the memory in which results wait for an earlier one."""
STALL_S = 300.0
POLL_S = 1.0

Outcomes = list[Encoded | Bad]
Chunks = Sequence[list[int]]


class WorkerError(RuntimeError):
    """A worker process died, or none has finished anything for STALL_S."""


class _Context(SpawnContext):
    """Fresh processes, because this one has threads; remembered, for their exit codes."""

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []
        super().__init__()

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """What the pool calls for each worker."""
        self.started.append(SpawnProcess(*args, **kwargs))
        return self.started[-1]


def encode_all(
    source: ImageSource, chunks: Chunks, options: WriteOptions, *, seed: int, num_workers: int
) -> Generator[Outcomes, None, None]:
    """The outcomes of each chunk, in order; 0 workers: in this process. Close the iterator when leaving it early.

    Raise WorkerError.
    """
    if num_workers == 0:
        yield from (encode_chunk(source, chunk, options, seed) for chunk in chunks)
        return
    context = _Context()
    # In a file: what is sent to a process as it starts, and is too long for a pipe, is waited for in vain if that
    # process dies before it reads (the parent holds the pipe's other end too).
    job = tempfile.NamedTemporaryFile(prefix="encode-", suffix=".pickle")  # noqa: SIM115 - closed below
    pickle.dump((source, options, seed), job)
    job.flush()
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(job.name,))
    finished = False
    try:
        waiting: deque[Future[Outcomes]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) >= AHEAD * num_workers:
                yield _result(waiting.popleft(), context)
        while waiting:
            yield _result(waiting.popleft(), context)
        finished = True
    except BrokenProcessPool:
        raise _died(context) from None
    finally:
        if not finished:  # their work is not wanted any more, and one of them may be stuck
            _kill(context.started, pool)
        pool.shutdown(cancel_futures=True)
        job.close()


def _kill(workers: Sequence[SpawnProcess], pool: ProcessPoolExecutor) -> None:
    begun = [process for process in workers if process.pid is not None]
    for process in begun:
        process.kill()
    for process in begun:
        process.join()
    # One may have died while it sent: the pool's thread waits for the rest of its message, and for the end of the
    # pipe, whose other end this process itself holds too.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]


def _result(future: Future[Outcomes], context: _Context) -> Outcomes:
    end = time.monotonic() + STALL_S
    while time.monotonic() < end:
        # Looked at before waiting, so that the pool has had POLL_S to notice by itself. It does not when a worker is
        # killed while it sends: the pool then waits for the rest of the message.
        lost = any(process.exitcode for process in context.started)
        try:
            return future.result(timeout=POLL_S)
        except TimeoutError:
            if lost:
                raise _died(context) from None
    raise WorkerError(f"nothing has been read or encoded for {STALL_S:g} s: does the disk answer?")


def _died(context: _Context) -> WorkerError:
    end = time.monotonic() + POLL_S
    # All of them end now, unless one is stuck; the pool's own thread may learn a code first, and be about to note it.
    while any(process.exitcode is None for process in context.started) and time.monotonic() < end:
        time.sleep(0.01)
    codes = {process.exitcode for process in context.started} - {None, 0}
    if len(codes) > 1:
        codes.discard(-signal.SIGTERM)  # how the pool ends the others
    return WorkerError(
        f"a worker process died with code {', '.join(map(str, sorted(codes, key=str)))} (negative: a signal; -9 is "
        "often a lack of memory: fewer num_workers need less); its output, if any, is above"
    )


_job: tuple[ImageSource, WriteOptions, int] | None = None


def _start(job: str) -> None:
    global _job  # noqa: PLW0603 - read once per worker: the index of a large source has tens of megabytes
    _job = pickle.loads(Path(job).read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: list[int]) -> Outcomes:
    assert _job is not None
    source, options, seed = _job
    return encode_chunk(source, chunk, options, seed)
