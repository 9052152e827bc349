"""Which run a command is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from repvgg.cli import ROOT, logged_config, prepare_environment
from repvgg.identity import (
    Identity,
    claim,
    evaluation_folder,
    fingerprint,
    read_identity,
    require_same,
    require_typed_id,
    run_folder,
    sweep_folder,
)

OVERRIDES = ["model=repvgg_a0", "ablation=id", "seed=3", "recipe.lr=0.05", "+experiment=table6"]
HARMLESS = ["logger=csv", "run.tags=[a]", "data.os_cache=false", "callbacks.interruption.every_minutes=5"]
CONFIG: dict[str, Any] = {"seed": 1, "recipe": {"lr": 0.1}, "run": {"name": "B0"}, "data": {"dir": "/here", "size": 32}}


@given(st.permutations(OVERRIDES), st.sets(st.sampled_from(HARMLESS)))
def test_neither_order_nor_what_changes_no_result_makes_another_run(typed: list[str], harmless: set[str]) -> None:
    assert fingerprint([*typed, *harmless]) == fingerprint(OVERRIDES)


@given(st.sampled_from(OVERRIDES), st.sampled_from(["trainer.max_epochs=2", "compile=true", "seed=4"]))
def test_whatever_changes_a_result_does(left_out: str, added: str) -> None:
    whole = fingerprint(OVERRIDES)
    assert fingerprint([o for o in OVERRIDES if o != left_out]) != whole
    assert fingerprint([*OVERRIDES, added]) != whole


def composed(*overrides: str) -> Any:
    prepare_environment()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


def test_folders_say_what_is_in_them() -> None:
    a = run_folder(_root_=composed("ablation=id", "seed=2", "data=digits"))
    assert a.startswith("B0-id-digits-s2-")
    assert a == run_folder(_root_=composed("seed=2", "data=digits", "ablation=id", "logger=csv"))
    assert run_folder(_root_=composed("run.id=mine")) == "mine"
    swept = OmegaConf.create({"hydra": {"overrides": {"task": ["ablation=plain,id", "seed=1,2", "net.depths=[1,2]"]}}})
    assert sweep_folder(_root_=swept).startswith("ablation-seed-")
    swept.hydra.overrides.task = ["+experiment=[table6,on_digits]", "recipe.lr=choice(0.1,0.2)"]
    assert sweep_folder(_root_=swept).startswith("table6_on_digits-lr-")
    swept.hydra.overrides.task = ["model=repvgg_a0"]
    assert sweep_folder(_root_=swept).startswith("sweep-")


def evaluation(**given: Any) -> str:
    config = {"run": {"id": None}, "hydra": {"overrides": {"task": [f"ckpt={given.get('ckpt')}"]}}, **given}
    return evaluation_folder(_root_=OmegaConf.create(config))


def test_an_evaluations_folder_is_named_after_what_it_evaluates() -> None:
    assert evaluation(ckpt="outputs/A0-full-s0-8c1f03/checkpoints/best.ckpt").startswith("eval-A0-full-s0-8c1f03-")
    assert evaluation(ckpt="outputs/A0-full-s0-8c1f03/checkpoints/last.ckpt").startswith("eval-A0-full-s0-8c1f03-last-")
    assert evaluation(ckpt="/x/RepVGG-A0 train.pth").startswith("eval-RepVGG-A0_train-")
    assert evaluation(ckpt="a/b.pth") != evaluation(ckpt="c/b.pth")
    assert evaluation(ckpt="b.pth", run={"id": "mine"}) == "eval-mine"
    assert len(evaluation(ckpt=f"{'x' * 240}.pth")) < 100


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", ".", "x" * 65])
def test_a_run_id_is_a_folders_name(name: str) -> None:
    with pytest.raises(Exception, match="choose up to 64 letters"):
        run_folder(_root_=OmegaConf.create({"run": {"id": name}}))


def test_a_typed_id_is_judged_before_hydra_makes_a_folder_of_it() -> None:
    require_typed_id(["run.id=mine", "run.id=null", "model=repvgg_a0"])
    with pytest.raises(ValueError, match=r"run.id=a/b: choose"):
        require_typed_id(["run.id=a/b"])
    with pytest.raises(ValueError, match=r"run.id=mine names one run, and -m starts several: name hydra.sweep.dir="):
        require_typed_id(["-m", "run.id=mine"])


def test_every_agents_run_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("seed=1")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert run_folder(_root_=config) == "B0-full-s1-abc"


def test_a_folder_goes_on_as_what_it_was_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = claim(tmp_path, CONFIG, ["seed=1"], begun=False)
    assert read_identity(tmp_path) is None  # not before the training begins
    first.write(tmp_path)
    assert read_identity(tmp_path) == first
    moved = {**CONFIG, "run": {"name": "other"}, "data": {"dir": "/there", "size": 32}}
    assert claim(tmp_path, moved, [], begun=True) == first
    changed = {**CONFIG, "recipe": {"lr": 0.2}}
    with pytest.raises(ValueError, match=r"begun with other values: recipe.lr=0.1 is 0.2 now. It was\n  seed=1\nGive"):
        claim(tmp_path, changed, [], begun=True)
    assert claim(tmp_path, changed, [], begun=False).config == changed  # nothing was trained there
    assert claim(tmp_path, {**CONFIG, "new": 1}, ["seed=1"], begun=True) == first
    assert "begun by another version of the configs: new" in caplog.text


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        ("+trainer.fast_dev_run=true", "", "trainer.fast_dev_run=True is not there now"),
        ("", "+trainer.fast_dev_run=true", "trainer.fast_dev_run=True was not there"),
        ("", "~recipe.optimizer.momentum", "recipe.optimizer.momentum=0.9 is not there now"),
        ("~callbacks.two_forms", "", "callbacks.two_forms._target_=repvgg.learn.two_forms.TwoFormValidation was not"),
        ("", "+callbacks.mine={_target_:my.Callback,every:2}", "callbacks.mine._target_=my.Callback was not there"),
        ("", "+recipe.optimizer={maximize:true}", "recipe.optimizer.maximize=True was not there"),
        ("callbacks.ema={_target_:my.EMA,decay:0.9}", "callbacks.ema=null", "callbacks.ema._target_=my.EMA is not"),
        ("", "+experiment=table6", "choices.experiment=table6 was not there"),
        ("+module.momentum=0.5", "", "module.momentum=0.5 is not there now"),
        ("", "module.lr=3.0", "module.lr=3.0 was not there"),
        ("", "~module.compile", "module.compile=None was not there"),
        ("init_from=a.pth", "init_from=b.pth", "init_from=a.pth is b.pth now"),
        ("", "ckpt_path=last.ckpt", "ckpt_path=None is last.ckpt now"),
        ("trainer.limit_train_batches=1", "trainer.limit_train_batches=1.0", "batches=1 is 1.0 now"),
    ],
)
def test_a_key_that_is_on_one_side_is_a_difference(then: str, now: str, says: str) -> None:
    """Whichever command has it, and also where the two were typed at different commits."""
    before, after = ([override] if override else [] for override in (then, now))
    earlier = Identity("id", "2026-01-01", before, logged(*before))
    for sha in ("unknown", "b" * 40):
        with pytest.raises(ValueError, match="was begun with other values: .*" + re.escape(says)):
            require_same(earlier, {**logged(*after), "git": {"sha": sha}}, after, Path())


@pytest.mark.parametrize(
    "harmless",
    [
        *("+run.notes=hello", "~callbacks.health", "~callbacks.perf", "+trainer.enable_progress_bar=false", "~logger"),
        *("+trainer.profiler=simple", "bench.batch=4", "quantizer.file=/there/train.beton", "recompute=true"),
        *(
            "trainer=cpu",
            "trainer=ddp",
            "data.check=full",
            "trainer.accumulate_grad_batches=1.0",
            "bench.every_n_epochs=5",
            "callbacks.perf=null",
        ),
    ],
)
def test_what_cannot_change_a_result_may_differ_when_a_run_goes_on(harmless: str) -> None:
    require_same(Identity("id", "2026-01-01", [], logged()), logged(harmless), [harmless], Path())


def test_a_key_that_no_one_typed_is_of_another_version_unless_the_commit_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = ["recipe=quick"]
    old = {**CONFIG, "recipe": {"lr": 0.1, "gone": 1}, "git": {"sha": "a" * 40}}
    first = claim(tmp_path, old, typed, begun=False)
    first.write(tmp_path)
    new = {**CONFIG, "recipe": {"lr": 0.1, "came": 0}}
    assert claim(tmp_path, {**new, "git": {"sha": "b" * 40}}, typed, begun=True) == first
    assert "begun by another version of the configs: recipe.came, recipe.gone" in caplog.text
    with pytest.raises(ValueError, match=r"recipe.gone=1 is not there now; recipe.came=0 was not there"):
        claim(tmp_path, {**new, "git": {"sha": "a" * 40 + "-dirty"}}, typed, begun=True)


def logged(*overrides: str) -> dict[str, Any]:
    """What a command logs."""
    config = composed(*overrides)
    choices = {group: name for group, name in config.hydra.runtime.choices.items() if "/" not in group}
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain.output_dir = "/runs/x"
    return logged_config(plain, choices)


def test_an_id_is_typed_or_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    drawn = {claim(tmp_path / str(i), CONFIG, [], begun=False).id for i in range(3)}
    assert len(drawn) == 3
    assert claim(tmp_path / "typed", CONFIG, [], begun=False, id="mine").id == "mine"
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert claim(tmp_path / "agent", CONFIG, [], begun=False).id == "agents"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is not the file of a run .* move the folder away"):
        read_identity(tmp_path)
    (tmp_path / "run.json").write_text('{"id": "a"}')
    with pytest.raises(ValueError, match=r"not the file of a run"):
        read_identity(tmp_path)


HOLD = """
import sys, time
from repvgg.identity import claim
claim(sys.argv[1], {}, [], begun=False)
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    holder = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is being trained by process {holder.pid} on .*: wait for it, stop it"):
            claim(tmp_path / "run", {}, [], begun=False)
    finally:
        holder.kill()
        holder.communicate()
    assert isinstance(claim(tmp_path / "run", {}, [], begun=False), Identity)  # however it ended
