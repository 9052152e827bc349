"""For worker processes: one that is killed while it sends."""

import os
import signal
from multiprocessing.connection import Connection
from typing import Any


def die_while_sending() -> None:
    """The next long message of this process ends in its middle, and with it the process."""
    write = Connection._send  # type: ignore[attr-defined]

    def half(self: Connection, data: Any, *rest: Any) -> None:
        if len(data) < 100_000:
            return write(self, data, *rest)
        write(self, data[: len(data) // 2], *rest)
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half  # type: ignore[attr-defined]
