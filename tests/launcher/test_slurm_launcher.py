"""What `hydra/launcher=submitit_slurm` asks Slurm for, and what it says where there is none. See also tests/cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import wait_until

ROOT = Path(__file__).parents[2]
SWEEP = [sys.executable, "src/train.py", "-m", "hydra/launcher=submitit_slurm", "data=digits"]
#: Keeps what every script asks for; squeue knows no job.
SBATCH = """#!/bin/sh
number=$(ls {folder}/script.* 2>/dev/null | wc -l)
for last; do :; done
cp "$last" {folder}/script.$number
echo "Submitted batch job $((number + 100))"
"""
SQUEUE = "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"


def sweep(*arguments: str, path: str, timeout: float = 100, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SWEEP, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with sbatch, srun and squeue that start nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, content in {"sbatch": SBATCH.format(folder=folder), "squeue": SQUEUE, "srun": "#!/bin/sh\n"}.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


def asked(folder: Path) -> list[dict[str, str]]:
    """Options of every script, in order."""
    scripts = [file.read_text().splitlines() for file in sorted(folder.glob("script.*"))]
    lines = [[line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")] for script in scripts]
    return [dict((line + "=").rstrip("=").split("=", 1) for line in script if "=" in line) for script in lines]


def test_without_slurm_one_line(tmp_path: Path) -> None:
    done = sweep("seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", path="/nowhere")
    assert done.returncode == 1
    assert "there is no sbatch here" in done.stderr
    assert "hydra/launcher=process" in done.stderr
    assert "Traceback" not in done.stderr
    assert "deprecated" not in done.stderr


def test_without_the_plugin_one_line(tmp_path: Path, commands: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['submitit'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = sweep("seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", path=str(commands), PYTHONPATH=path)
    assert done.returncode == 1
    assert "pip install -e '.[slurm]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.devices=-1"], "hydra.launcher.tasks_per_node=-1: Slurm has to know a number"),
        (["hydra.launcher.timeout_min=5"], "signal_delay_s=300 is not less than hydra.launcher.timeout_min=5"),
    ],
)
def test_what_slurm_cannot_know_is_an_error(arguments: list[str], message: str, tmp_path: Path, commands: Path) -> None:
    done = sweep("seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", *arguments, path=f"{commands}:/usr/bin:/bin")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not asked(commands)


def test_ctrl_c_ends_the_waiting_and_says_how_to_end_the_jobs(tmp_path: Path, commands: Path) -> None:
    (commands / "squeue").write_text("#!/bin/sh\necho 100_0; echo 100_1\n")
    waiting = subprocess.Popen(
        [*SWEEP, "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{commands}:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: asked(commands), "the jobs to be submitted", 60)
        time.sleep(1)  # from here on it waits
        waiting.send_signal(signal.SIGINT)
        said, _ = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 130
    assert "the jobs go on. To end them: scancel 100" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_jobs_that_need_the_same_are_one_array(tmp_path: Path, commands: Path) -> None:
    done = sweep(
        *("trainer.devices=1,8", "seed=1,2", "trainer.num_nodes=2", "hydra.launcher.partition=fast"),
        f"hydra.sweep.dir={tmp_path}/sweep",
        path=f"{commands}:/usr/bin:/bin",
    )
    one, eight = asked(commands)
    assert (one["ntasks-per-node"], one["gpus-per-node"], one["nodes"]) == ("1", "1", "2")
    assert (eight["ntasks-per-node"], eight["gpus-per-node"], eight["nodes"]) == ("8", "8", "2")
    assert one["array"] == eight["array"] == "0-1%2"
    assert one["signal"] == "USR2@300"
    assert one["partition"] == "fast"
    # Slurm knows none of them any more, and none has left a result.
    assert "4 of 4 jobs failed" in done.stderr
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
