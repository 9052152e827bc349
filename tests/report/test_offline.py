"""Against files that the real client writes in offline mode, in processes of its own: its settings are process-wide."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg.report.offline import find_offline_runs, read_offline_run
from repvgg.wandb_file import BLOCK

RUN = """
import sys, time, wandb
settings = wandb.Settings(
    console="off", x_disable_stats=True, x_disable_machine_info=True, disable_git=True,
    x_save_requirements=False, x_transaction_log_flush_interval=0.2,
)
config = {"choices": {"model": "repvgg_b0"}, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 1}
run = wandb.init(
    project="repvgg", group="table6", job_type="train", name="B0-id-s1", id=sys.argv[1],
    config=config, settings=settings,
)
run.define_metric("best", summary="max")
run.config.update({"optim": {"lr": 0.2, "betas": [0.9, 0.99]}}, allow_val_change=True)
# long enough for records that cross the blocks of the file
for i in range(int(sys.argv[2])):
    run.log({"val/top1": i / 10, "best": -i, "nested": {"value": i}, "nan": float("nan"), "text": "x" * 400})
run.summary["test/top1"] = 0.75
if sys.argv[3] == "hang":
    time.sleep(1.0)
    print("ready", flush=True)
    time.sleep(60)
run.finish(exit_code=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("wandb"), "abc", 200, "3")


def client(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    folders = {f"WANDB_{name}DIR": str(folder / name.lower()) for name in ("DATA_", "CACHE_", "CONFIG_")}
    environment = os.environ | quiet | folders | {"WANDB_DIR": str(folder)}
    (folder / "run.py").write_text(RUN)
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def record(folder: Path, run_id: str, rows: int, end: str) -> Path:
    with client(folder, run_id, str(rows), end) as process:
        process.wait(timeout=60)
    (file,) = find_offline_runs(folder)
    return file


def test_a_finished_run_comes_back_whole(finished: Path) -> None:
    assert finished.stat().st_size > 3 * BLOCK
    for path in (finished, finished.parent):
        run = read_offline_run(path)
        assert (run.id, run.name, run.group, run.job_type, run.project) == (
            "abc",
            "B0-id-s1",
            "table6",
            "train",
            "repvgg",
        )
        assert run.config == {
            "choices": {"model": "repvgg_b0"},
            "optim": {"lr": 0.2, "betas": [0.9, 0.99]},
            "seed": 1,
        }
        assert (run.finished, run.exit_code) == (True, 3)
        assert run.history["_step"].tolist() == list(range(200))
        assert run.history["val/top1"].tolist() == [i / 10 for i in range(200)]
        assert run.history["nested.value"].tolist() == list(range(200))
        assert run.history["nan"].isna().all()
        assert run.summary["val/top1"] == 19.9
        assert run.summary["test/top1"] == 0.75
        assert run.summary["nested"] == {"value": 199}
        assert run.summary["best"] == {"max": 0}
        assert math.isnan(run.summary["nan"])


def test_a_killed_run_is_not_finished_and_keeps_what_was_written(tmp_path: Path) -> None:
    with client(tmp_path, "dead", "5", "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    (file,) = find_offline_runs(tmp_path)
    run = read_offline_run(file)
    assert (run.id, run.finished, run.exit_code) == ("dead", False, None)
    assert run.history["val/top1"].tolist() == [0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("cut", [1, 8, 500, 40_000])
def test_a_torn_end_is_left_out(finished: Path, tmp_path: Path, cut: int) -> None:
    torn = tmp_path / "run-abc.wandb"
    torn.write_bytes(finished.read_bytes()[:-cut])
    run = read_offline_run(torn)
    assert not run.finished
    assert run.name == "B0-id-s1"
    rows = len(run.history)
    assert run.history["_step"].tolist() == list(range(rows))
    assert rows == 200 if cut < 500 else rows <= 200
    # a block that was set aside but not written
    torn.write_bytes(finished.read_bytes()[:-cut] + bytes(cut))
    assert len(read_offline_run(torn).history) == rows


def test_a_file_cut_right_after_its_header_is_a_run_without_anything(finished: Path, tmp_path: Path) -> None:
    torn = tmp_path / "run-xyz.wandb"
    torn.write_bytes(finished.read_bytes()[:7])
    run = read_offline_run(torn)
    assert (run.id, run.config, len(run.history), run.finished) == ("xyz", {}, 0, False)


def test_damage_in_the_middle_is_an_error(finished: Path, tmp_path: Path) -> None:
    content = bytearray(finished.read_bytes())
    content[BLOCK + 100] ^= 1
    damaged = tmp_path / "run-abc.wandb"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"run-abc\.wandb is damaged at byte \d+ of \d+"):
        read_offline_run(damaged)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "run-abc.wandb"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"run-abc\.wandb is not a W&B run file: it begins with"):
        read_offline_run(other)


def test_a_directory_must_hold_one_run(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 files run-\*\.wandb; .* find_offline_runs"):
        read_offline_run(tmp_path)
    for name in ("offline-run-2-b", "offline-run-1-c"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        shutil.copy(finished, tmp_path / "deep" / name / "run-abc.wandb")
    assert [p.parent.name for p in find_offline_runs(tmp_path)] == ["offline-run-1-c", "offline-run-2-b"]
