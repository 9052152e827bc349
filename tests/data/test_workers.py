"""Worker processes that die in the middle of a message."""

import threading
from concurrent.futures import ProcessPoolExecutor

import pytest

from repvgg.data.workers import _Context, _kill
from support.half_sender import die_while_sending


def test_a_worker_that_dies_while_it_sends_is_not_waited_for() -> None:
    context = _Context()
    pool = ProcessPoolExecutor(1, context, initializer=die_while_sending)
    result = pool.submit(bytes, 1_000_000)
    context.started[0].join(timeout=30)
    assert context.started[0].exitcode == -9
    with pytest.raises(TimeoutError):  # the pool waits for the other half
        result.result(timeout=1)
    _kill(context.started, pool)
    ending = threading.Thread(target=pool.shutdown, daemon=True)
    ending.start()
    ending.join(timeout=20)
    assert not ending.is_alive()
