"""`python src/train.py` as a user types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repvgg.report.offline import find_offline_runs, read_offline_run
from support.commands import heavy

ROOT = Path(__file__).parents[2]
SMALL = [
    "model=repvgg_a0",
    "recipe=quick",
    "net.width_a=0.25",
    "net.width_b=0.25",
    "bench.warmup=1",
    "bench.batches=2",
    "bench.batch=8",
]
DIGITS = ["data=digits", "trainer=cpu", "logger=wandb_offline", *SMALL]

#: Every key of the table in the README's section on what is logged.
LOGGED = {
    *("train/loss", "train/top1", "optim/lr"),
    *("val/loss", "val/top1", "val/top5", "val/deploy/loss", "val/deploy/top1", "val/deploy/top5"),
    *("bench/train_form/images_per_s", "bench/deploy/images_per_s", "bench/speedup"),
    *("reparam/max_abs_logit_diff", "reparam/rel_l2_diff", "reparam/top1_agreement", "reparam/convert_s"),
    *("perf/images_per_s", "perf/data_wait_share", "perf/gpu_mem_peak_gib"),
}
SUMMARY = {"test/top1", "test/top5", "test/deploy/top1", "test/deploy/top5", "test/best_epoch"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "src/train.py", *arguments]


def train(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def record(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


@pytest.fixture(scope="module")
def data(digits: Path) -> list[str]:
    return [f"data.dir={digits}"]


@pytest.fixture(scope="module")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with seed 7."""
    directory = tmp_path_factory.mktemp("run")
    train(*DIGITS, *data, "trainer.max_epochs=2", "seed=7", f"hydra.run.dir={directory}")
    return directory


def test_offline_run_holds_every_promised_key(finished: Path) -> None:
    (path,) = find_offline_runs(finished)
    run = read_offline_run(path)
    assert run.finished
    assert set(run.history.columns) >= LOGGED
    assert run.summary.keys() >= SUMMARY
    assert run.name == "A0-full-digits-s7"
    assert run.job_type == "train"
    config = run.config
    assert config["choices"]["model"] == "repvgg_a0"
    assert config["choices"]["ablation"] == "full"
    assert config["seed"] == 7
    assert len(config["git"]["sha"]) >= 7
    assert config["net"]["depths"] == [2, 4, 14, 1]
    assert {"batch", "dtype", "device", "resolution"} <= config["bench"].keys()
    assert all(0 <= run.summary[key] <= 1 for key in ("test/top1", "val/deploy/top1", "perf/data_wait_share"))
    assert run.summary["test/deploy/top1"] == record(finished)["objective"]


def test_leaves_a_record_and_both_checkpoints(finished: Path) -> None:
    result = record(finished)
    assert result["status"] == "finished"
    assert result["metrics"]["params/deploy"] < result["metrics"]["params/train_form"]
    assert sorted(f.name for f in (finished / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert (finished / "metrics.csv").stat().st_size > 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(finished: Path, data: list[str], tmp_path: Path) -> None:
    train(*DIGITS, *data, "trainer.max_epochs=2", "seed=7", "logger=csv", f"hydra.run.dir={tmp_path}")
    a, b = record(finished)["metrics"], record(tmp_path)["metrics"]
    timed = ("bench/", "perf/", "reparam/convert_s")
    assert {k: v for k, v in a.items() if not k.startswith(timed)} == {
        k: v for k, v in b.items() if not k.startswith(timed)
    }


@pytest.mark.slow
def test_continues_from_a_checkpoint(finished: Path, data: list[str], tmp_path: Path) -> None:
    last = finished / "checkpoints" / "last.ckpt"
    train(*DIGITS, *data, "trainer.max_epochs=3", "logger=csv", f"ckpt_path={last}", f"hydra.run.dir={tmp_path}")
    epochs = {line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]}
    assert record(tmp_path)["status"] == "finished"
    assert epochs


@pytest.mark.slow
def test_two_processes_train_and_leave_one_run(data: list[str], tmp_path: Path) -> None:
    """The mission's commands with `data=digits trainer.accelerator=cpu trainer.devices=2`."""
    train(
        *[a for a in DIGITS if a != "trainer=cpu"],
        *data,
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.max_epochs=1",
        f"hydra.run.dir={tmp_path}",
    )
    (path,) = find_offline_runs(tmp_path)
    run = read_offline_run(path)
    assert run.finished
    assert run.config["world_size"] == 2
    assert run.summary["reparam/rel_l2_diff"] < 1e-4


@pytest.mark.slow
def test_multirun_of_two_processes_each(data: list[str], tmp_path: Path) -> None:
    done = train(
        *["-m", "ablation=plain,full", "data=digits", "logger=wandb_offline", *SMALL, *data],
        *["trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}"],
    )
    runs = [read_offline_run(path) for path in find_offline_runs(tmp_path)]
    assert {run.config["choices"]["ablation"] for run in runs} == {"plain", "full"}
    assert len({run.id for run in runs}) == 2
    assert len({run.group for run in runs}) == 1
    assert {file.name for file in tmp_path.glob("summary.*")} == {"summary.md", "summary.csv", "summary.png"}
    assert "plain" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=repvgg_b1", "trainer.devices=8"], ["train.beton", "python src/write_dataset.py", "data=digits"]),
        (["model=repvgg_b9"], ["repvgg_b1g4", "repvgg_d2se"]),
        (["ablation=1x2"], ["1x1", "plain"]),
        (["data=digits", "trainer.max_epoch=3"], ["Did you mean trainer.max_epochs?", "accumulate_grad_batches"]),
        (["data=digits", "recipy.lr=3"], ["Did you mean recipe.lr?", "Keys of recipe: epochs"]),
        (["data=digits", "trainer.devices=8"], ["8 GPUs", "trainer=cpu"]),
        (["data=digits", "trainer=cpu", "trainer.precision=bf17"], ["bf17", "bf16-mixed"]),
        heavy(
            ["data=digits", "trainer.accelerator=cpu", "trainer.devices=3", "logger=csv"],
            ["recipe.batch_size=256", "try recipe.batch_size=255 or 258"],
        ),
        heavy(["data=digits", "trainer=cpu", "net.depths=[1,2]"], ["depths=[1, 2]", "four numbers"]),
        heavy(
            ["data=digits", "trainer=cpu", "logger=csv", "recipe.warmup_epochs=7", "trainer.max_epochs=5"],
            ["does not fit into", "lower recipe.warmup_epochs or raise trainer.max_epochs"],
        ),
        heavy(
            ["data=digits", "trainer=cpu", "logger=csv", "recipe=fast", "compile=false", "recipe.batch_size=64"],
            ["PadCrop cannot change its size", "callbacks.resize=null"],
        ),
        (["data=digits", "recipe=finetune"], ["recipe=finetune needs init_from=PATH"]),
        (["data=digits", "ckpt_path=/none"], ["ckpt_path=/none: there is no file /none"]),
        heavy([*DIGITS, "recipe.batch_size=1"], ["recipe.batch_size leaves one image of one pixel"]),
        heavy([*DIGITS, "recipe.optimizer.momentum=-1"], ["recipe.optimizer: Invalid momentum value"]),
        heavy([*DIGITS, "+trainer.gpus=1"], ["Trainer takes no gpus. Did you mean trainer.devices?"]),
        heavy([*DIGITS, "trainer.strategy=foo"], ["trainer: You selected an invalid strategy"]),
        heavy([*DIGITS, "data.num_classes=12"], ["10 classes, data.num_classes=12"]),
    ],
    ids=lambda value: value[-1] if value and "=" in value[-1] else "",
)
def test_a_wrong_input_gets_one_clear_error(arguments: list[str], says: list[str], tmp_path: Path) -> None:
    missing = ["data.dir=" + str(tmp_path / "none")] if "data=digits" not in arguments else []
    done = train(*arguments, *missing, f"hydra.run.dir={tmp_path / 'run'}", check=False)
    assert done.returncode == 2
    for words in says:
        assert words in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_of_files_says_its_number_of_classes(digits: Path, tmp_path: Path) -> None:
    folder = ["data=folder", f"data.dir={digits}", "data.resolution=32", "trainer=cpu", "logger=csv", *SMALL]
    wrong = train(*folder, "data.num_classes=12", f"hydra.run.dir={tmp_path / 'wrong'}", check=False)
    assert wrong.returncode == 2
    assert "10 classes, data.num_classes=12: set data.num_classes=10" in wrong.stderr
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    train(*folder, *few, f"hydra.run.dir={tmp_path / 'right'}")
    assert record(tmp_path / "right")["config"]["data"]["num_classes"] == 10


@pytest.mark.slow
def test_sigterm_is_an_interruption(data: list[str], tmp_path: Path) -> None:
    assert stopped_by(signal.SIGTERM, data, tmp_path) == 143


def test_ctrl_c_leaves_a_record_and_no_half_written_file(data: list[str], tmp_path: Path) -> None:
    assert stopped_by(signal.SIGINT, data, tmp_path) == 130
    (path,) = find_offline_runs(tmp_path)
    assert read_offline_run(path).exit_code != 0
    assert not list(tmp_path.rglob("*.tmp"))


def stopped_by(signum: signal.Signals, data: list[str], directory: Path) -> int:
    """The exit code of a run that is stopped after its first epoch, whose record says so."""
    process = subprocess.Popen(
        command(*DIGITS, *data, "trainer.max_epochs=500", f"hydra.run.dir={directory}"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (directory / "checkpoints" / "best.ckpt").exists():
            assert time.monotonic() < deadline, "no epoch ended"
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signum)
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert record(directory)["status"] == "interrupted"
    assert "val/top1" in record(directory)["metrics"]
    return code


@pytest.mark.slow
def test_online_without_a_key_names_both_ways_out(data: list[str], tmp_path: Path) -> None:
    nothing = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    keyless = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | nothing
    arguments = [*[a for a in DIGITS if not a.startswith("logger=")], *data, f"hydra.run.dir={tmp_path / 'run'}"]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command(*arguments), cwd=ROOT, env=keyless, check=False, timeout=120, **quiet)
    assert done.returncode == 2
    assert "wandb login" in done.stderr
    assert "logger=wandb_offline" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_worth_reading() -> None:
    start = time.monotonic()
    done = train("--help")
    assert time.monotonic() - start < 30  # 0.5 s on a quiet machine; this only catches a heavy import gone wrong
    for words in ("ablation: ", "python src/train.py -m ablation=plain,id,1x1,full", "repvgg_d2se", "trainer.devices"):
        assert words in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['src/train.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'ffcv', 'pandas', 'matplotlib', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readme_command_works_from_another_folder(data: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "src/train.py"), *DIGITS, *data, "trainer.max_epochs=1", "logger=csv"],
        cwd=tmp_path,
        env={**os.environ, "PROJECT_ROOT": str(tmp_path / "project")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "project" / "outputs").rglob("result.json"))
    shutil.rmtree(tmp_path / "project")
