"""`python src/plan.py` as a user types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repvgg.cli import ROOT
from support.commands import heavy
from support.paper import ABLATION_TRAIN_PARAMS, VARIANTS

#: ImageNet without its files.
NOWHERE = "data.dir=/nowhere"


def command(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "src" / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )


def test_a_plan_of_b1_on_8_gpus_that_are_not_here(tmp_path: Path) -> None:
    done = command("plan.py", "model=repvgg_b1", "trainer.devices=8", NOWHERE, "out=plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  steps +600,480$", done.stdout, re.MULTILINE)
    assert "hours, images/s and cores: pass plan.images_per_s_per_gpu=N" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    paper, memory = VARIANTS["b1"], plan["memory_bytes"]
    assert plan["network"]["params_train_form"] == memory["parameters"] / 4 == paper.train_params
    assert plan["network"]["params_deploy"] == paper.deploy_params
    assert plan["bucket_bytes"] == memory["gradients"] == memory["optimizer"] == memory["parameters"]
    assert plan["ring_bytes"] == 5 * 32 * 3 * 224 * 224
    assert plan["peak_bytes"] == memory["peak"] + plan["bucket_bytes"] + plan["ring_bytes"]
    assert plan["scales"][0]["hours"] is None
    assert (plan["train"]["images"], plan["scales"][0]["schedule"]["left_out"]) == (1_281_167, 143)


@pytest.mark.slow
def test_from_8_to_1024_devices() -> None:
    done = command(
        *("plan.py", "model=repvgg_a0", "trainer=ddp", "trainer.devices=8", NOWHERE, "plan.devices=[8,16,64,1024]"),
        *("plan.batch_per_device=32", "plan.images_per_s_per_gpu=100", "plan.bandwidth_gb_s=50", "recipe.epochs=1"),
    )
    assert done.returncode == 0, done.stderr
    assert "not given" not in done.stdout
    header, *rows = done.stdout.split("Numbers of devices\n")[1].splitlines()[:5]
    names = re.split(r" {2,}", header)
    table = [dict(zip(names, row.split(), strict=True)) for row in rows]
    assert [row["devices"] for row in table] == ["8", "16", "64", "1,024"]
    assert [row["nodes"] for row in table] == ["1", "2", "8", "128"]
    assert [row["steps/epoch"] for row in table] == [f"{1_281_167 // (32 * n):,}" for n in (8, 16, 64, 1024)]
    assert [row["lr"] for row in table] == ["0.1", "0.2", "0.8", "12.8"]
    assert {row["images/s per node"] for row in table} == {"800"}
    gradients = 4 * VARIANTS["a0"].train_params
    assert float(table[3]["all-reduce [ms]"]) == pytest.approx(2 * 1023 / 1024 * gradients / 50e9 * 1e3, abs=0.01)
    assert float(table[0]["hours"]) == pytest.approx(1_281_024 / 800 / 3600, abs=0.01)


@pytest.mark.slow
def test_a_sweep_has_a_line_for_every_run_and_leaves_nothing(tmp_path: Path) -> None:
    done = command(
        *("plan.py", "-m", "+experiment=table6", "trainer.devices=8", NOWHERE, "plan.images_per_s_per_gpu=500"),
        *("hydra.sweep.dir=swept", "hydra/launcher=submitit_slurm"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("B0-")]
    assert {row[0]: row[4] for row in rows} == {
        f"B0-{ablation}": f"{count / 1e6:.2f}" for ablation, count in ABLATION_TRAIN_PARAMS.items()
    }
    assert len({row[5] for row in rows}) == 1
    assert "All 4 one after another:" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        heavy(["trainer.devices=1024"], "recipe.batch_size=256 is the number of images per optimiser step"),
        heavy(["trainer.devices=8", "plan.devices=[1024]"], "plan.batch_per_device=N gives every device N"),
        (["trainer.devices=-1"], "trainer.devices=-1: a plan must know how many"),
        heavy(["trainer.devices=8", "plan.devices=[12]"], "plan.devices has 12, and a node has trainer.devices=8"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: memory and exchange are counted for auto and ddp"),
        (["trainer.precision=8"], "trainer.precision=8: choose 32-true, 16-mixed"),
        heavy(["plan.short_side=100"], "plan.short_side=100: measured are 384, 320, 256"),
        (["plan.bandwidth_gb_s=-1"], "plan.bandwidth_gb_s=-1 must be a number above 0"),
        (["data=folder"], "data.num_classes=N"),
        heavy(["data=folder", "data.num_classes=3"], "plan.train_images=N"),
        (["out=/nowhere/plan.json"], "out=/nowhere/plan.json: there is no directory /nowhere"),
        (["-m", "hydra/sweeper=optuna"], "hydra/sweeper=optuna chooses each run after the one before"),
    ],
)
def test_a_wrong_input_is_one_error(arguments: list[str], says: str) -> None:
    done = command("plan.py", NOWHERE, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_mistyped_key_is_answered_with_the_keys_there_are() -> None:
    done = command("plan.py", "plan.bandwith=3")
    assert done.returncode == 2
    assert "Did you mean plan.bandwidth_gb_s?" in done.stderr


def trainings_of_the_readme() -> list[list[str]]:
    """The overrides of its commands, one run each."""
    lines = re.findall(r"^python src/train\.py (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    return [overrides for overrides in commands if overrides and not overrides[0].startswith("-")]


def test_the_overrides_of_a_training_are_those_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(ROOT))
    commands = trainings_of_the_readme()
    assert commands
    for overrides in commands:
        overrides = [o for o in overrides if "two_3x3" not in o]  # a file that its reader is to write
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            trained, planned = (compose(root, [*overrides, "output_dir=/nowhere"]) for root in ("train", "plan"))
        shared = OmegaConf.masked_copy(planned, [str(key) for key in trained])
        assert OmegaConf.to_container(shared) == OmegaConf.to_container(trained), overrides


@pytest.mark.slow
def test_a_training_takes_the_steps_of_its_plan(tmp_path: Path) -> None:
    overrides = [
        *("data=digits", f"data.dir={tmp_path / 'digits'}", "trainer=cpu", "recipe=quick", "logger=csv"),
        *("net.width_a=0.125", "net.width_b=0.125", "recipe.epochs=2", "trainer.accumulate_grad_batches=3"),
        *("recipe.batch_size=96", "bench.batches=1", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    trained = command("train.py", *overrides)
    assert trained.returncode == 0, trained.stderr
    done = command("plan.py", *overrides, f"out={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == plan["scales"][0]["schedule"]["steps"] == 2 * (1437 // 96)
    weights = [value for name, value in last["state_dict"].items() if name.startswith("net.")]
    held = sum(value.numel() * value.element_size() for value in weights)
    assert held == plan["memory_bytes"]["parameters"] + plan["memory_bytes"]["buffers"]
    momenta = [state["momentum_buffer"] for state in last["optimizer_states"][0]["state"].values()]
    assert 4 * sum(momentum.numel() for momentum in momenta) == plan["memory_bytes"]["optimizer"]
    assert plan["train"]["bytes"] == (tmp_path / "digits" / "train.beton").stat().st_size
