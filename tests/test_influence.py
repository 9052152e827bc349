"""The table of what can change a result, and that all who ask go by it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from repvgg.cli import ROOT, logged_config, options, prepare_environment, require_read
from repvgg.identity import Identity, fingerprint, require_same
from repvgg.influence import ROWS, UNREAD, Kind, flat, is_under, kind_of, may_differ, names_a_folder, splits_groups
from repvgg.learn.run import environment
from repvgg.report.compare import compare
from repvgg.report.runs import Run


def logged_configs() -> Iterator[dict[str, Any]]:
    """What train.py logs, with every option of the groups that have nodes of their own."""
    prepare_environment()
    groups = ("data", "trainer", "callbacks", "recipe")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for override in [f"{group}={name}" for group in groups for name in options(group)] + ["int8=torch"]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", [override, "output_dir=/runs/x"], return_hydra_config=True)
        choices = {group: name for group, name in cfg.hydra.runtime.choices.items() if "/" not in group}
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        assert isinstance(plain, DictConfig)
        config = logged_config(plain, choices)
        assert not {"module", "datamodule"} & config.keys()
        config["bench"]["device"] = "cpu"
        yield {
            **config,
            **environment(trainer),
            "logger": {"csv": None},
            **{key: None for key in plain if key not in config},
        }


def test_every_row_names_a_key_and_says_why() -> None:
    configs = list(logged_configs())
    keys = {key for config in configs for key, _ in flat(config)}
    arguments = {
        f"trainer.{name}" for name in inspect.signature(get_class(configs[0]["trainer"]["_target_"])).parameters
    }
    for row in ROWS:
        assert row.why
        assert any(is_under(key, row.key) for key in keys) or row.key in arguments, f"no config has {row.key}"
    for command, unread in UNREAD.items():
        for key, why in unread.items():
            assert why
            assert any(is_under(name, key) for name in keys), f"{command} does not read {key}, which is nowhere"
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert {row.kind for row in ROWS} == set(Kind)


def test_of_two_rows_the_longer_counts_and_without_one_a_key_can_change_a_result() -> None:
    assert (kind_of("bench.batch"), kind_of("bench.every_n_epochs")) == (Kind.MACHINE, Kind.PLACE)
    assert kind_of("callbacks.checkpoints.directory") is Kind.PLACE
    for key in (
        "callbacks.checkpoints.monitor",
        "recipe.lr",
        "runs",
        "data.number",
        "trainer.fast_dev_run",
        "init_from",
    ):
        assert kind_of(key) is None
        assert names_a_folder(key)
        assert not may_differ(key)
        assert splits_groups(key, own_files=True)


@pytest.mark.parametrize("key", [*(row.key for row in ROWS), "recipe.lr", "module.lr", "callbacks.checkpoints.monitor"])
def test_the_folder_a_continued_run_and_the_report_go_by_the_table(key: str) -> None:
    assert (fingerprint([f"{key}=1"]) != fingerprint([])) == names_a_folder(key)

    def config(value: int) -> dict[str, Any]:
        nested: dict[str, Any] = {"seed": 0, "choices": dict.fromkeys(("model", "ablation", "data", "recipe"), "x")}
        node = nested
        *parents, leaf = key.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
        return nested

    earlier = Identity("id", "2026-01-01", [], config(1))
    with nullcontext() if may_differ(key) else pytest.raises(ValueError, match=f"{key}=1 is 2 now"):
        require_same(earlier, config(2), [], Path())
    if not key.startswith("choices."):
        found = [Run(Path(str(i)), "finished", config(i), {"test/top1": 0.5}, name=str(i)) for i in (1, 2)]
        assert (len(compare(found).groups) == 2) == splits_groups(key, own_files=False)


@pytest.mark.parametrize("command", UNREAD)
def test_what_a_command_does_not_read_is_refused_with_the_reason(command: str) -> None:
    require_read(["data=digits", "net.width_a=0.5", "int8=torch", "data.dir=/here"], command)
    with pytest.raises(
        ValueError, match=rf"^recipe.lr=3: {command}.py does not read recipe \(how a network is trained\)"
    ):
        require_read(["data=digits", "recipe.lr=3"], command)
    for override in ("~callbacks.health", "+callbacks.mine={}", "recompute=true", "data.train_transform.size=3"):
        with pytest.raises(ValueError, match="does not read"):
            require_read([override], command)
