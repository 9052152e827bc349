"""Real data, written once per session: digits as FFCV files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from support.wandb_server import wandb_server  # noqa: F401  # a fixture for all rooms

ROOT = Path(__file__).parents[1]
# No test depends on how fast the machine is.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
# Real processes started by tests find the package and the tests' own helpers.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: two threads each would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the embedded data set's train.beton and val.beton."""
    import subprocess

    directory = tmp_path_factory.mktemp("digits")
    code = f"from repvgg.data.write import ensure_digits; ensure_digits({str(directory)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    return directory
