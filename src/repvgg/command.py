"""What every command with a config does around Hydra's main: answer a wrong input in one line, and leave no folder.

Hydra composes the config, then calls `CheckInputs`, then makes the run's folder. All jobs of a sweep are composed and
checked before the first of them begins.
"""

from __future__ import annotations

import inspect
import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import filter_overrides
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from repvgg.cli import NODE_OF_GROUP, ROOT, WRONG_INPUT, clear_errors, folder_to_be, options
from repvgg.identity import key_of
from repvgg.influence import flat
from repvgg.inputs import meant_keys, nearest, nothing_reads, wrong_values

Check = Callable[[DictConfig], object]
#: While it is set, Hydra raises what it cannot compose. It would print it, with the hint to add a + to the key.
FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass
class _Command:
    name: str = ""
    check: Check | None = None
    composing: bool = False


_command = _Command()


@contextmanager
def answering(name: str, arguments: Sequence[str], check: Check | None = None) -> Iterator[None]:
    """Run Hydra's main within this: what is wrong with the command is then one line, exit code 2, and no folder.

    Args:
        name: of the table in `repvgg.inputs`, and of the config in conf/.
        arguments: of the command line.
        check: raises ValueError for more that is wrong with a config, in no time; called in Hydra's main's place, and
            to be called there again, since a Slurm job begins there.
    """
    _command.name, _command.check, _command.composing = name, check, FULL_ERROR not in os.environ
    os.environ.setdefault(FULL_ERROR, "1")
    try:
        yield
    except Exception as error:
        if not _command.composing:
            raise
        print(f"error: {_said(error, name, arguments)}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    finally:
        _has_composed()


def _has_composed() -> None:
    if _command.composing:
        del os.environ[FULL_ERROR]
        _command.composing = False


class CheckInputs(Callback):
    """`hydra.callbacks.inputs`: check a run's config, or those of all jobs of a sweep, before there is a folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra when a single run's config is composed."""
        _has_composed()
        with clear_errors():
            _check(config, "hydra.run.dir", _command.check)
            folder_to_be(Path(str(config.hydra.run.dir)).absolute())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra when a sweep begins."""
        _has_composed()
        with clear_errors():
            # A cluster's jobs may see files that are not here.
            check = None if "slurm" in str(config.hydra.launcher._target_).lower() else _command.check
            loader = GlobalHydra.instance().config_loader()
            typed = _parsed(config)
            fixed = [override.key_or_group for override in typed if not override.is_sweep_override()]
            with read_write(config.hydra.overrides), open_dict(config.hydra.overrides):  # for ${job_folder:}
                config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={fixed}")
            for number, overrides in enumerate(_jobs(config, typed)):
                try:
                    job = loader.load_sweep_config(config, overrides)
                    _check(job, "hydra.sweep.dir", check)
                    if any(_key_is_added(override) for override in overrides):
                        require_keywords(job)
                except (ValueError, HydraException) as error:
                    said = str(error) if isinstance(error, ValueError) else _said(error, _command.name, overrides)
                    job_of = f"\nin the sweep's job {number}: {' '.join(filter_overrides(overrides))}" if number else ""
                    raise ValueError(f"{said}{job_of}") from error


def _key_is_added(override: str) -> bool:
    return override.startswith("+") or "_target_" in override


def _check(config: DictConfig, directory: str, check: Check | None) -> None:
    """Raise ValueError for what is wrong with a config, Hydra's own node included, as it is before a job."""
    if not _command.name:
        return
    config = config.copy()
    outer = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    broken: OmegaConfBaseException | None = None
    try:
        try:
            output_dir = Path(str(OmegaConf.select(config, directory))).absolute()
        except OmegaConfBaseException as error:
            broken, output_dir = error, Path("unknown")
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(output_dir)
        HydraConfig.instance().set_config(config)
        cfg = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        require_right_values(_command.name, cfg, config.hydra.runtime.choices)
        if broken is not None:
            raise ValueError(_in_one_line(broken))
        if check is not None:
            check(cfg)
    finally:
        HydraConfig.instance().cfg = outer


def require_right_values(name: str, cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Raise ValueError, a line for every key, where the table of a command does not hold for its config."""
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(unresolved, dict)
    groups = [str(group) for group in choices if "/" not in str(group)]
    config: Any = None
    broken: list[str] = []
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        broken = [_in_one_line(error, unresolved)]
    if wrong := list(wrong_values(name, config, {str(k): v for k, v in unresolved.items()}, groups)) or broken:
        raise ValueError("\n".join(wrong))


def _in_one_line(error: OmegaConfBaseException, unresolved: Any = None) -> str:
    """With the key whose own value it is, not of the first that refers to it."""
    said = str(error).splitlines()[0]
    missing = re.search(r"Interpolation key '([\w.]+)' not found", said)
    own = [k for k, v in flat(unresolved or {}) if missing is not None and f"${{{missing[1]}}}" in str(v)]
    return f"{own[0] if own else error.full_key}: {said}"


def _parsed(config: DictConfig) -> list[Override]:
    """What a sweep's sweeper reads: its own parameters, then what was typed."""
    params = OmegaConf.to_container(config.hydra.sweeper, resolve=True).get("params") or {}  # type: ignore[union-attr]
    typed = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return list(parser.parse_overrides(typed))


def _jobs(config: DictConfig, typed: Sequence[Override]) -> list[list[str]]:
    """The overrides of every job of a grid; of a search, whose jobs are not known, each value and bound once."""
    axes = {override.get_key_element(): _values(override) for override in typed}
    if str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
        jobs = list(itertools.product(*axes.values()))
    else:
        first = [values[0] for values in axes.values()]
        others = [(i, value) for i, values in enumerate(axes.values()) for value in values[1:]]
        jobs = [tuple(first), *((*first[:i], value, *first[i + 1 :]) for i, value in others)]
    return [[f"{key}={value}" for key, value in zip(axes, job, strict=True)] for job in jobs]


def _values(override: Override) -> list[str]:
    if isinstance(value := override.value(), IntervalSweep):
        return [str(value.start), str(value.end)]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


# --- the keywords of what is instantiated -----------------------------------------------------------------------------


def require_keywords(cfg: DictConfig, *nodes: str) -> None:
    """Raise ValueError for a key in a node with a `_target_` that the target does not take. It imports the targets.

    Args:
        nodes: of the config that are looked at; none for all.
    """
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    for key, node in _targets({name: config[name] for name in nodes or config if name != "hydra"}):
        name = str(node["_target_"])
        try:
            target = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{key}._target_={name}: {error}") from error
        try:
            taken = inspect.signature(target).parameters
        except ValueError:  # of a class written in C
            continue
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            continue
        unknown = [each for each in node if each not in taken and not (each.startswith("_") and each.endswith("_"))]
        if unknown:
            meant = nearest(f"{key}.{unknown[0]}", [f"{key}.{each}" for each in taken])
            suggestion = f"Did you mean {' or '.join(meant)}? " if meant else ""
            raise ValueError(
                f"{', '.join(f'{key}.{each}' for each in unknown)}: {name} takes no {', '.join(unknown)}. {suggestion}"
                f"It takes {', '.join(taken)}. To leave out what a config has: "
                f"{' '.join(f'~{key}.{each}' for each in unknown)}"
            )


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, list):
        for i, each in enumerate(node):
            yield from _targets(each, f"{key}[{i}]")
    elif isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, each in node.items():
            yield from _targets(each, f"{key}.{name}" if key else str(name))


# --- what Hydra could not compose -------------------------------------------------------------------------------------


def _said(error: Exception, name: str, arguments: Sequence[str]) -> str:
    """Hydra's error in our words where a key is unknown or a group's option is null; else in its own."""
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if isinstance(error, OverrideParseException):
        return str(error)
    for override in OverridesParser.create().parse_overrides(overrides):
        group = override.key_or_group
        if options(group) and not override.is_sweep_override() and not isinstance(override.value(), str | list):
            return f"{override.input_line}: choose {', '.join(options(group))}"
    return _unknown_key(name, overrides) or str(error).strip()


def _unknown_key(name: str, overrides: Sequence[str]) -> str | None:
    """The error of the first override whose key is in no node of the config that the groups make."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        chosen = [o for o in overrides if options(key_of(o)) or key_of(o).startswith("hydra")]
        try:
            cfg = compose(name, overrides=chosen, return_hydra_config=True)
        except HydraException:  # it is the option that does not exist
            return None
    keys = [str(key) for key in cfg if key != "hydra"]
    config: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys), resolve=False)
    known = [key for key, _ in flat(config)]
    groups = [str(group) for group in cfg.hydra.runtime.choices if "/" not in str(group)]
    inner = {parent for key in known for parent in itertools.accumulate(key.split("."), "{}.{}".format)}
    for override in overrides:
        key = key_of(override)
        if key in inner or key in groups or key.startswith("hydra") or override.startswith("+"):
            continue
        group, _, rest = key.partition(".")
        if rest and group in NODE_OF_GROUP:
            return f"{group} is chosen with {group}=…, its values are set with {NODE_OF_GROUP[group]}.{rest}=…"
        return nothing_reads(key, meant_keys(name, known, groups))
    return None
