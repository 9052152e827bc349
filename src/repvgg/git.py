"""Which commit runs. Standard library only; every room uses it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def git_sha() -> str:
    """Of this package's checkout, with ``-dirty`` where files were changed since; ``unknown`` outside of one."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "unknown"
