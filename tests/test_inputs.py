"""The table of keys and values, on configs as plain mappings."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from repvgg.cli import ROOT, prepare_environment
from repvgg.inputs import TABLES, Open, Rule, nearest, wrong_values

GROUPS = ("model", "ablation", "data", "trainer", "logger", "callbacks", "recipe")


@cache
def composed(root: str, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Resolved and unresolved."""
    prepare_environment()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(root, [*overrides, *(["output_dir=/nowhere"] if "recipe" in TABLES[root] else [])])
    resolved, unresolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (True, False))
    assert isinstance(resolved, dict)
    assert isinstance(unresolved, dict)
    return resolved, unresolved


def said(root: str, key: str, value: Any) -> list[str]:
    """What is wrong with a config in which one value is set, or added."""
    configs = copy.deepcopy(composed(root))
    *nodes, leaf = key.split(".")
    for config in configs:
        node = config
        for name in nodes:
            node = node.setdefault(name, {})
        node[leaf] = value
    return list(wrong_values(root, *configs, GROUPS))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "recipe.lr"),
        ("optimizer.lr", "recipe.lr"),
        ("module.lr", "recipe.lr"),
        ("data.batch_size", "recipe.batch_size"),
        ("batch_size", "recipe.batch_size"),
        ("epochs", "recipe.epochs"),
        ("lr_scheduler", "recipe.warmup_epochs"),
        ("modle", "model"),
        ("momentum", "recipe.optimizer.momentum"),
        ("callbacks.helth", "callbacks.health"),
        ("recipe.wieght_decay", "recipe.weight_decay"),
    ],
)
def test_a_key_that_nothing_reads_leads_to_the_one_that_is_meant(typed: str, meant: str) -> None:
    (line,) = said("train", typed, {"every_n_epochs": 1} if "callbacks" in typed else 1)
    assert line.startswith(f"nothing reads {typed}. Did you mean {meant}? Keys of ")


@pytest.mark.parametrize(
    ("root", "typed", "must"),
    [
        *(("train", f"seed={value}", "a whole number from 0 to 4294967295") for value in ("null", "1.5", "abc", "-1")),
        ("train", "seed=4294967296", "a whole number from 0 to 4294967295"),
        ("train", "recipe.lr=big", "a number above 0"),
        ("train", "recipe.lr=0", "a number above 0"),
        ("train", "recipe.lr=.inf", "a number above 0"),
        ("train", "recipe.batch_size=63.0", "a whole number of at least 1"),
        ("train", "recipe.batch_size=true", "a whole number of at least 1"),
        ("train", "recipe.label_smoothing=1.5", "a number from 0 to 1"),
        ("train", "recipe.epochs=abc", "a whole number of at least 1"),
        *(("train", f"trainer.max_epochs={value}", "a whole number of at least 1") for value in ("abc", "1.5", "null")),
        ("train", "trainer.accumulate_grad_batches=0", "a whole number of at least 1"),
        ("train", "trainer.precision=7", "32-true, 16-mixed"),
        ("train", "trainer.devices=two", "a number of devices"),
        ("train", "compile=3", "true or false"),
        ("train", "batchnorm=group", "rank0, mean or sync"),
        ("train", "net.in_channels=1", "3: images have three channels"),
        ("train", "net.depths=[1,2.5]", "a list"),
        ("train", "data.std=[1,2]", "a list of 3 values"),
        ("train", "trainer.logger=false", "left to logger=OPTION"),
        ("train", "recipe.optimizer.lr=1", "left to recipe.lr"),
        ("train", "callbacks.guard.max_skips=0", "a whole number of at least 1"),
        ("evaluate", "forms=deply", "both, train, deploy or null"),
        ("evaluate", "batch_size=0", "a whole number of at least 1"),
        ("evaluate", "net.in_channels=1", "3: images have three channels"),
        ("export", "images=0", "a whole number of at least 1"),
        ("export", "net.in_channels=1", "3: images have three channels"),
        ("convert", "fold_dtype=float16", "float64 or float32"),
        ("plan", "plan.devices=[0]", "a whole number of at least 1"),
        ("report", "target=pdf", "page or wandb"),
        ("write_dataset", "on_bad=ignore", "stop or skip"),
        ("write_dataset", "write.jpeg_quality=101", "a whole number from 1 to 100"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_can(root: str, typed: str, must: str) -> None:
    key, _, value = typed.partition("=")
    (line,) = said(root, key, yaml.safe_load(value))
    assert line.startswith(f"{key}=")
    assert must in line


@pytest.mark.parametrize(
    ("root", "key", "value"),
    [
        ("train", "trainer.devices", -1),
        ("train", "trainer.devices", [0, 1]),
        ("train", "trainer.devices", "0,1"),
        ("train", "trainer.precision", 16),
        ("train", "trainer.gradient_clip_val", 0.5),
        ("train", "trainer.deterministic", True),
        ("train", "trainer.fast_dev_run", True),
        ("train", "int8", "torch"),
        ("train", "run.name", 12),
        ("train", "callbacks.two_forms", None),
        ("train", "logger.mine", {"_target_": "mine.Logger"}),
        ("train", "module.net", "${net}"),
        ("plan", "plan.published.mine", {"train_images": 9}),
        ("report", "runs", ["a", "b"]),
    ],
)
def test_what_can_be_is_taken(root: str, key: str, value: Any) -> None:
    assert said(root, key, value) == []


def test_a_key_that_is_taken_away_is_missing() -> None:
    for key, line in {
        "logger": "logger is missing: choose logger=OPTION",
        "recipe.lr": "recipe.lr is missing: it must be a number above 0",
        "data.mean": "data.mean is missing: it must be a list of 3 values, each a number",
    }.items():
        resolved, unresolved = copy.deepcopy(composed("train"))
        *nodes, leaf = key.split(".")
        for config in (resolved, unresolved):
            for name in nodes:
                config = config[name]
            del config[leaf]
        assert list(wrong_values("train", resolved, unresolved, GROUPS)) == [line]
        assert list(wrong_values("train", None, unresolved, GROUPS)) == [line]  # what refers to it is not resolved


def test_a_value_is_wrong_where_it_stands_and_not_where_another_refers_to_it() -> None:
    resolved, unresolved = copy.deepcopy(composed("train"))
    for config in (resolved, unresolved):
        config["recipe"]["epochs"] = "abc"
    resolved["trainer"]["max_epochs"] = "abc"
    (line,) = wrong_values("train", resolved, unresolved)
    assert line.startswith("recipe.epochs=abc")


def test_a_key_that_another_refers_to_is_read() -> None:
    resolved, unresolved = copy.deepcopy(composed("train"))
    for config in (resolved, unresolved):
        config["data"]["fold"] = 3
    unresolved["data"]["dir"] = "/data/fold${data.fold}"
    assert not list(wrong_values("train", resolved, unresolved))
    unresolved["data"]["dir"] = "/data/fold${.fold}"
    assert not list(wrong_values("train", resolved, unresolved))
    unresolved["data"]["dir"] = "/data"
    assert list(wrong_values("train", resolved, unresolved))


# --- the table --------------------------------------------------------------------------------------------------------


def tabled(table: Any, node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Target and keyword of every rule about a node that is instantiated."""
    for name, rule in (table.known if isinstance(table, Open) else table).items():
        if isinstance(rule, Rule):
            if "_target_" in node and name != "_target_" and not rule.words.startswith("left"):
                yield str(node["_target_"]), name
        elif isinstance(node.get(name), Mapping):
            yield from tabled(rule, node[name], f"{key}.{name}")


@pytest.mark.parametrize("root", TABLES)
def test_a_table_names_keywords_that_there_are(root: str) -> None:
    _, config = composed(root, *(["recipe=fast"] if "recipe" in TABLES[root] else []))
    found = list(tabled(TABLES[root], config, ""))
    assert found or root == "report"
    for target, keyword in set(found):
        assert keyword in inspect.signature(get_object(target)).parameters, f"{target} takes no {keyword}"


def test_the_nearest_key_is_one_that_there_is() -> None:
    known = ["model", "recipe.lr", "recipe.epochs", "bench.batch", "net.width_a"]
    assert nearest("lr", known) == ["recipe.lr"]
    assert nearest("net.width_c", known) == ["net.width_a"]
    assert nearest("learning_rate", known) == ["recipe.lr"]
    assert nearest("trainer.epochs", known) == ["recipe.epochs"]
    assert nearest("num_workers", known) == []
    assert nearest("zzz", known) == []
