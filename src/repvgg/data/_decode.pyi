from typing import Any

from numpy.typing import NDArray

def decode(jobs: NDArray[Any], cursor: NDArray[Any], out: NDArray[Any], status: NDArray[Any], size: int) -> None: ...
