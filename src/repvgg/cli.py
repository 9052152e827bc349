"""What the entry points share: one clear error for a wrong input, names, and the config that is logged.

Imports nothing heavy: a mistyped command must answer at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

#: Groups whose values do not stand under their own name, so that a W&B sweep over them keeps the config whole.
NODE_OF_GROUP = {"model": "net", "ablation": "block"}
ROOT = Path(__file__).resolve().parents[2]
#: Exit code of a command that was not started, because its input is wrong.
WRONG_INPUT = 2


def prepare_environment() -> None:
    """What the configs read; call it before Hydra's main."""
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))


@contextmanager
def clear_errors() -> Iterator[None]:
    """While a run is being set up, a ValueError is a wrong input: print it alone and exit with 2.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        # Hydra wraps what a constructor raises.
        while type(cause).__name__ == "InstantiationException" and cause.__cause__ is not None:
            cause = cause.__cause__
        wrong_input = isinstance(cause, ValueError) or type(cause).__name__ in (
            "InstantiationException",
            "MisconfigurationException",
        )
        if not wrong_input or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(WRONG_INPUT)


@contextmanager
def key_suggestions(config_name: str, arguments: list[str]) -> Iterator[None]:
    """After Hydra has refused an override because of an unknown key, say which keys there are.

    Hydra itself lists the options of a group, but not the keys of a node.
    """
    try:
        yield
    except SystemExit as stopped:
        if stopped.code == 1:
            overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
            suggestion = _suggest_key(config_name, overrides)
            if suggestion:
                print(suggestion, file=sys.stderr)
        raise


def _suggest_key(config_name: str, overrides: list[str]) -> str | None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            compose(config_name, overrides=overrides, return_hydra_config=True)
        except ConfigCompositionException as error:
            if not isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
                return None
            key = str(error.__cause__.full_key)
        else:
            return None
        groups = [o for o in overrides if not o.lstrip("+~").startswith(key)]
        try:
            node: Any = compose(config_name, overrides=[o for o in groups if "." not in o.split("=")[0]])
        except ConfigCompositionException:
            return None
    parent, _, leaf = key.rpartition(".")
    known = list(OmegaConf.select(node, parent) if parent else node)
    close = difflib.get_close_matches(leaf, known, n=1)
    meant = f"Did you mean {'.'.join(filter(None, [parent, close[0]]))}? " if close else ""
    if key in NODE_OF_GROUP:
        meant = f"{key} is chosen with {key}=…, its values are set with {NODE_OF_GROUP[key]}.…=…. "
    return f"error: there is no {key}. {meant}Keys of {parent or 'the config'}: {', '.join(map(str, known))}"


def run_name(choices: Mapping[str, str], seed: int) -> str:
    """Short and readable: B0-id-s1 (and B0-id-digits-s1 where the data is not ImageNet)."""
    model = choices["model"].removeprefix("repvgg_")
    data = [] if choices["data"] == "imagenet" else [choices["data"]]
    return "-".join([model[0].upper() + model[1:], choices["ablation"], *data, f"s{seed}"])


def multirun_name() -> str | None:
    """The last two folders of the multirun that started this process, which its runs are grouped by."""
    directory = os.environ.get("MULTIRUN_DIR")
    return "/".join(Path(directory).parts[-2:]) if directory else None


def logged_config(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """The config as it is logged: nested, resolved, plain types, with the groups' options under ``choices``.

    Nodes that only repeat others as interpolations are left out.
    """
    config = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in REPEATING]), resolve=True
    )
    assert isinstance(config, dict)
    return {**{str(k): v for k, v in config.items()}, "choices": dict(choices)}


REPEATING = ("module", "datamodule", "callbacks", "logger")
