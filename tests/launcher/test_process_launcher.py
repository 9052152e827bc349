"""The launcher from outside: a small Hydra script of its own, real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

SCRIPT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
# a test runner in the background of a shell script hands down an ignored SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    hc = HydraConfig.get()
    out = Path(hc.runtime.output_dir)
    seen = {k: os.environ.get(k) for k in ("MULTIRUN_DIR", "LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    record = {"x": cfg.x, "text": cfg.text, "pid": os.getpid(), "env": seen, "out": str(out), "argv": sys.argv,
              "mode": str(hc.mode), "num": hc.job.num, "verbose": hc.verbose, "file": cfg.file, "time": time.time()}
    (out / "seen.json").write_text(json.dumps(record))
    print(f"job {cfg.x}: tty {sys.stdout.isatty()}", flush=True)
    if cfg.x == "bad":
        raise RuntimeError("no good")
    if cfg.x == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.x in ("sleep", "stubborn"):
        if cfg.x == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (out / "worker.pid").write_text(str(worker.pid))
        time.sleep(60)
    if cfg.x == "orphan":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (out / "worker.pid").write_text(str(worker.pid))
    if isinstance(cfg.x, (int, float)):
        (out / "result.json").write_text(json.dumps({"status": "finished", "objective": cfg.x * 2}))
    if cfg.x == "interrupted":
        (out / "result.json").write_text(json.dumps({"status": "interrupted", "objective": None, "error": "why"}))

if __name__ == "__main__":
    main()
"""

MAIN = """
defaults:
  - _self_
  - override hydra/launcher: process
x: 1
text: none
file: main
hydra:
  sweep: {dir: sweep, subdir: "${hydra:job.num}"}
"""

# a sweeper that keeps what it was given, to see the launcher's return values from a sweeper's side
SWEEPER = """
import json
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

class Keeper(BasicSweeper):
    def sweep(self, arguments):
        returns = super().sweep(arguments)
        kept = [[r.return_value, list(r.overrides), r.working_dir, r.cfg.x] for r in returns[0]]
        open("returns.json", "w").write(json.dumps(kept))
        return returns
"""

CALLBACK = """
from pathlib import Path
from hydra.experimental.callback import Callback

class Note(Callback):
    def on_multirun_end(self, config, **kwargs):
        with open(Path(config.hydra.sweep.dir) / "ends.txt", "a") as f:
            f.write(str(kwargs["config_name"]) + chr(10))
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/main.yaml").write_text(MAIN)
    (tmp_path / "conf/other.yaml").write_text(MAIN.replace("file: main", "file: other"))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "note.py").write_text(CALLBACK)
    return tmp_path


def start(app: Path, *arguments: str, **kwargs: Any) -> "subprocess.Popen[str]":
    leftovers = {"LOCAL_RANK": "1", "MASTER_PORT": "1234", "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "script.py", *arguments],
        cwd=app,
        env=os.environ | leftovers | {"PYTHONPATH": f"{SRC}{os.pathsep}{app}", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def sweep(app: Path, *arguments: str) -> tuple[int, str]:
    process = start(app, "-m", *arguments)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def seen(app: Path, job: int, sweep_dir: str = "sweep") -> dict[str, Any]:
    return json.loads((app / sweep_dir / str(job) / "seen.json").read_text())


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A zombie that nobody reaps is not alive."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_jobs_run_in_order_each_in_a_clean_process_of_its_own(app: Path) -> None:
    (app / "hydra_plugins").mkdir()
    (app / "hydra_plugins/keeper.py").write_text(SWEEPER)
    code, output = sweep(
        app, "x=3,1", "text='a,b=c d','$HOME [q]'", "hydra.sweeper._target_=hydra_plugins.keeper.Keeper"
    )
    assert code == 0, output
    jobs = [seen(app, i) for i in range(4)]
    assert [(j["x"], j["text"]) for j in jobs] == [(x, t) for x in (3, 1) for t in ("a,b=c d", "$HOME [q]")]
    assert len({j["pid"] for j in jobs}) == 4
    assert [j["time"] for j in jobs] == sorted(j["time"] for j in jobs)
    for number, job in enumerate(jobs):
        assert job["mode"] == "RunMode.RUN"
        assert job["num"] == number
        assert job["out"] == str(app / "sweep" / str(number))
        assert job["env"] == {
            "MULTIRUN_DIR": str(app / "sweep"),
            "LOCAL_RANK": None,
            "MASTER_PORT": None,
            "WORLD_SIZE": None,
        }
    assert (app / "sweep/multirun.yaml").exists()
    assert (app / "sweep/0/.hydra/config.yaml").exists()
    assert "job 3: tty False" in output
    # the value, overrides, directory and config of each job reach the sweeper
    returns = json.loads((app / "returns.json").read_text())
    assert [r[0] for r in returns] == [6.0, 6.0, 2.0, 2.0]
    assert returns[0][1:] == [["x=3", "text='a,b=c d'"], str(app / "sweep/0"), 3]


def test_options_and_hydra_overrides_reach_the_jobs_those_of_the_sweep_do_not(app: Path) -> None:
    code, output = sweep(
        app,
        "--config-name=other",
        "x=1,none",
        "hydra.verbose=true",
        "hydra.launcher.grace_s=1",
        "hydra.sweep.dir='o=1, t'",
        "hydra.sweep.subdir='j=${hydra:job.num},k'",
        "hydra.run.dir=elsewhere",
        "hydra.mode=MULTIRUN",
    )
    assert code == 0, output
    job = seen(app, "j=1,k", "o=1, t")  # type: ignore[arg-type]
    assert (job["file"], job["verbose"], job["x"]) == ("other", True, "none")
    assert job["out"] == str(app / "o=1, t/j=1,k")
    assert job["argv"][1] == "--config-name=other"
    assert not any("hydra.launcher" in a or "hydra.sweep" in a or "elsewhere" in a for a in job["argv"])
    assert not (app / "elsewhere").exists()


def test_a_failed_job_is_contained_and_named(app: Path) -> None:
    stale = app / "sweep/2/result.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"status": "finished", "objective": 0.9}')
    code, output = sweep(app, "x=bad,interrupted,killed,4", "+hydra.callbacks.note._target_=note.Note")
    assert code == 1
    assert seen(app, 3)["x"] == 4
    end = output[output.index("3 of 4 jobs failed:") :]
    assert f"#0 : x=bad: exit code 1; see {app}/sweep/0/script.log" in end
    assert f"#1 : x=interrupted: it recorded itself as interrupted (why); see {app}/sweep/1/script.log" in end
    assert f"#2 : x=killed: killed by SIGKILL; see {app}/sweep/2/script.log" in end
    assert "RuntimeError: no good" in output  # the job's own words
    assert "Traceback" not in end
    assert not stale.exists(), "the record of an earlier run would pass for this one's"
    assert stale.with_name("result.stale.json").exists()
    # Hydra itself skips the callbacks of a sweep that failed
    assert (app / "sweep/ends.txt").read_text() == "main\n"


def test_what_an_ended_job_leaves_behind_is_ended(app: Path) -> None:
    code, output = sweep(app, "x=orphan")
    assert code == 0, output
    assert not alive(int((app / "sweep/0/worker.pid").read_text()))


@pytest.mark.parametrize(
    ("signum", "x", "code"),
    [(signal.SIGTERM, "sleep", 143), (signal.SIGINT, "sleep", 130), (signal.SIGTERM, "stubborn", 143)],
)
def test_a_signal_stops_the_sweep_and_leaves_nothing_running(app: Path, signum: int, x: str, code: int) -> None:
    process = start(app, "-m", f"x={x},1", "hydra.launcher.grace_s=1", "+hydra.callbacks.note._target_=note.Note")
    worker = app / "sweep/0/worker.pid"
    until(lambda: worker.exists() and worker.read_text() != "")
    process.send_signal(signum)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert not alive(seen(app, 0)["pid"])
    assert not alive(int(worker.read_text()))
    assert not (app / "sweep/1").exists()
    assert "1 of 2 jobs not started" in output
    assert (app / "sweep/ends.txt").exists()


def test_a_terminal_stays_a_terminal(app: Path) -> None:
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "script.py", "-m", "x=1"],
        cwd=app,
        env=os.environ | {"PYTHONPATH": str(SRC)},
        stdout=follower,
        stderr=follower,
        stdin=follower,
    )
    assert process.wait(timeout=30) == 0
    os.close(follower)
    output = b""
    while b"job 1" not in output or not output.endswith(b"\n"):
        output += os.read(leader, 65536)
    os.close(leader)
    assert b"job 1: tty True" in output
