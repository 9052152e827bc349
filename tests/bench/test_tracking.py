"""A benchmark as a W&B run, with the real client offline, read back from its file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repvgg.bench.commands import require_wandb
from repvgg.report.offline import find_offline_runs, read_offline_run

#: W&B's client belongs to a process; this one has others' tests.
LOG = """
import sys
from pathlib import Path
from repvgg.bench.lines import Line, Setting
from repvgg.bench.page import Page
from repvgg.bench.rounds import Result
from repvgg.bench.tracking import tracked

out = Path(sys.argv[1])
results = [Result(Line("repvgg_a0", side, Setting("deploy")), 4, [[0.5, 0.5], [0.25]], 7) for side in ("ours", "timm")]
page = Page("inference", "Inference", {"command": "typed"}, "here", "", results, [])
with tracked(out, "inference", {"command": "typed", "protocol": {"rounds": 2}}) as log:
    if sys.argv[2] == "stop":
        raise KeyboardInterrupt
    log(page, page.write(out))
"""


def logged(out: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = [sys.executable, "-c", LOG, str(out), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_conditions_table_and_picture_are_in_a_run_of_their_own_kind(tmp_path: Path, monkeypatch) -> None:
    done = logged(tmp_path / "new", "end", monkeypatch)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = find_offline_runs(tmp_path / "new")
    run = read_offline_run(file)
    assert (run.job_type, run.name, run.project) == ("bench", "bench-inference", "repvgg")
    assert (run.finished, run.exit_code) == (True, 0)
    assert run.config["protocol"] == {"rounds": 2}
    assert set(run.config["git"]) == {"sha"}
    assert run.summary["bench/repvgg_a0/timm/deploy/images_per_s"] == 12  # 4 / 0.5 and 4 / 0.25
    media = [path.suffix for path in file.parent.rglob("*") if "media" in path.parts and path.is_file()]
    assert sorted(media) == [".json", ".png"]


@pytest.mark.slow
def test_a_benchmark_that_is_stopped_is_not_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = logged(tmp_path, "stop", monkeypatch)
    assert "KeyboardInterrupt" in done.stderr
    (file,) = find_offline_runs(tmp_path)
    assert read_offline_run(file).exit_code == 130


def test_a_run_needs_a_place_and_a_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="--wandb keeps its files beside the others: add --out DIR"):
        require_wandb(True, None)
    require_wandb(True, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    require_wandb(False, None)
    with pytest.raises(ValueError, match="WANDB_MODE=disabled: --wandb takes online or offline"):
        require_wandb(True, tmp_path)
