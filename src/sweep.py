"""Run a W&B sweep file without W&B: `python src/sweep.py sweeps/ablation.yaml [overrides of every run …]`.

A grid becomes a multirun of train.py; `random` and `bayes` become Hydra's Optuna sweeper, with its random sampler and
its TPE. Values reach train.py as the text that `wandb agent` would write. What has no translation is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from repvgg.cli import OBJECTIVE, ROOT, clear_errors

PROGRAM = "src/train.py"
METHODS = ("grid", "random", "bayes")
KEYS = ("program", "project", "entity", "name", "description", "method", "metric", "parameters", "command", "run_cap")
MACROS = ("${env}", "${interpreter}", "${program}", "${args_no_hyphens}")
#: Groups whose node has their name: W&B would log the option in place of the node.
NODES = ("data", "recipe", "trainer", "logger", "callbacks")

Spec = Mapping[str, Any]


def command(file: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The arguments of train.py that run a sweep file without a server.

    Args:
        overrides: of every run. One with the key of a parameter, or of an argument in the file, takes its place.

    Raises:
        ValueError: for what is wrong in the file, and for what only a W&B server does.
    """
    if not file.is_file():
        files = ", ".join(str(path.relative_to(ROOT)) for path in sorted((ROOT / "sweeps").glob("*.yaml")))
        raise ValueError(f"there is no file {file}: choose {files}, or write one")
    sweep = yaml.safe_load(file.read_text(encoding="utf-8-sig"))  # as W&B reads it: 1e-4 is a string
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise ValueError(f"{file} is no sweep: it needs program, method and parameters")
    _require_known("key", sweep, KEYS, hint="the others are for `wandb sweep`")
    if sweep.get("program") != PROGRAM:
        raise ValueError(f"program: {sweep.get('program')}: choose {PROGRAM}, from the repository's root")
    method = sweep.get("method")
    if method not in METHODS:
        raise ValueError(f"method: {method}: choose {', '.join(METHODS)}")
    axes = {name: _axis(name, spec, method) for name, spec in sweep["parameters"].items()}
    metric = _metric(sweep)
    arguments = {_key(argument): argument for argument in [*_fixed(sweep.get("command")), *_sweeper(sweep, metric)]}
    given = {_key(override): override for override in overrides}
    if "+experiment" in given:  # may bring a grid of its own
        arguments["hydra.sweeper.params"] = "hydra.sweeper.params=null"
    swept = {name: f"{name}={text}" for name, (text, _) in axes.items()}
    runs = math.prod(size for name, (_, size) in axes.items() if name not in given)
    if method == "grid" and runs > sweep.get("run_cap", math.inf):
        raise ValueError(f"run_cap: {sweep['run_cap']} would cut off a grid of {runs} runs: leave it out")
    return ["-m", *(swept | arguments | given).values()]


def _metric(sweep: Spec) -> Spec:
    metric: Spec = sweep.get("metric") or ({} if sweep["method"] == "bayes" else {"name": OBJECTIVE})
    if metric.get("name") != OBJECTIVE:
        raise ValueError(f"metric.name: {metric.get('name')}: choose {OBJECTIVE}, which is what train.py returns")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal: {metric['goal']}: choose minimize or maximize")
    _require_known("metric", metric, ("name", "goal"))
    return metric


def _sweeper(sweep: Spec, metric: Spec) -> list[str]:
    if sweep["method"] == "grid":
        return []
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        raise ValueError("Optuna's sweeper is not installed: pip install -e '.[sweeps]'")
    cap = sweep.get("run_cap")
    if type(cap) is not int or cap < 1:
        raise ValueError(f"run_cap: {cap}: {sweep['method']} needs a number of runs")
    return [
        "hydra/sweeper=optuna",
        f"hydra/sweeper/sampler={'random' if sweep['method'] == 'random' else 'tpe'}",
        "hydra.sweeper.sampler.seed=0",
        f"hydra.sweeper.direction={metric.get('goal', 'minimize')}",
        f"hydra.sweeper.study_name={sweep.get('name') or 'sweep'}",
        f"hydra.sweeper.n_trials={cap}",
        "hydra.sweeper.n_jobs=1",  # the launcher runs one after another, so each can learn from all before it
        "hydra.sweeper.max_failure_rate=1.0",  # a run that diverges is no reason to stop, as for an agent
        "hydra.sweep.subdir=${hydra:job.num}",  # names of directories do not hold this many digits
    ]


def _fixed(items: Any) -> list[str]:
    """The overrides that stand in ``command`` themselves."""
    if items is None:
        raise ValueError(f"command: is missing: choose [{', '.join(MACROS)}], since W&B's default writes --key=value")
    found = []
    for item in map(str, items):
        if item.startswith("${") and item not in MACROS:
            raise ValueError(f"command: {item}: choose {', '.join(MACROS)}")
        if item not in MACROS and _key(item) != "hydra.run.dir":  # which is a single run's
            _require_one_value("command", item)
            found.append(item)
    if "${args_no_hyphens}" not in items:
        raise ValueError("command: needs ${args_no_hyphens}, which is where the parameters go")
    return found


def _axis(name: str, spec: Any, method: str) -> tuple[str, float]:
    """What Hydra reads behind ``name=``, and the number of its values."""
    if name in NODES:
        raise ValueError(
            f"parameters.{name}: W&B would log the option in place of the config's {name}: put {name}=… into `command`"
        )
    if not isinstance(spec, dict) or "parameters" in spec:
        raise ValueError(f"parameters.{name}: nested parameters are no overrides: write {name}.KEY")
    if "value" in spec:
        _require_known(f"parameters.{name}", spec, ("value", "distribution"))
        return _text(name, spec["value"]), 1
    if "values" in spec:
        _require_known(f"parameters.{name}", spec, ("values", "distribution"), hint="probabilities are the server's")
        if not isinstance(spec["values"], list) or not spec["values"]:
            raise ValueError(f"parameters.{name}.values: {spec['values']}: needs a list")
        return ",".join(_text(name, value) for value in spec["values"]), len(spec["values"])
    if method == "grid":
        raise ValueError(f"parameters.{name}: a grid needs values, or a value")
    low, high = (_number(name, spec, key) for key in ("min", "max"))
    if low > high:
        raise ValueError(f"parameters.{name}: min {low} is above max {high}")
    whole = isinstance(low, int) and isinstance(high, int)
    if "distribution" not in spec and not whole and (isinstance(low, int) or isinstance(high, int)):
        raise ValueError(f"parameters.{name}: min {low} and max {high} are a float and an int: write both alike")
    distribution = spec.get("distribution", "int_uniform" if whole else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"parameters.{name}.distribution: {distribution}: "
            f"choose {', '.join(DISTRIBUTIONS)}, or values; the others are for `wandb sweep`"
        )
    _require_known(f"parameters.{name}", spec, ("distribution", "min", "max", "q"))
    return DISTRIBUTIONS[distribution](name, spec), math.inf


def _uniform(name: str, spec: Spec) -> str:
    return f"interval({float(spec['min'])},{float(spec['max'])})"


def _log_uniform(name: str, spec: Spec) -> str:
    """W&B gives natural logarithms of the bounds here."""
    return f"tag(log,interval({math.exp(spec['min'])},{math.exp(spec['max'])}))"


def _log_uniform_values(name: str, spec: Spec) -> str:
    if spec["min"] <= 0:
        raise ValueError(f"parameters.{name}: min {spec['min']} has no logarithm")
    return f"tag(log,{_uniform(name, spec)})"


def _int_uniform(name: str, spec: Spec) -> str:
    for key in ("min", "max"):
        if not isinstance(spec[key], int):
            raise ValueError(f"parameters.{name}.{key}: {spec[key]}: int_uniform needs an integer")
    return f"int(interval({spec['min']},{spec['max']}))"


def _q_uniform(name: str, spec: Spec) -> str:
    """Multiples of q; W&B draws the first and the last half as often as the others, Optuna all alike."""
    q = _number(name, {"q": 1, **spec}, "q")
    for key in ("min", "max"):
        steps = spec[key] / q
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"parameters.{name}.{key}: {spec[key]} is no multiple of q {q}")
    return f"range({float(spec['min'])},{float(spec['max'])},{float(q)})"


def _q_log_uniform_values(name: str, spec: Spec) -> str:
    if spec.get("q", 1) != 1 or not isinstance(spec["min"], int) or not isinstance(spec["max"], int):
        raise ValueError(f"parameters.{name}: of q_log_uniform_values, Optuna knows integers with q 1")
    return f"int({_log_uniform_values(name, spec)})"


DISTRIBUTIONS: dict[str, Callable[[str, Spec], str]] = {
    "uniform": _uniform,
    "int_uniform": _int_uniform,
    "q_uniform": _q_uniform,
    "log_uniform": _log_uniform,
    "log_uniform_values": _log_uniform_values,
    "q_log_uniform_values": _q_log_uniform_values,
}


def _number(name: str, spec: Spec, key: str) -> float:
    if key not in spec:
        raise ValueError(f"parameters.{name}: needs value, values, or min and max")
    value = spec[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = ": PyYAML, which W&B reads files with, takes 1e-4 for a string; write 0.0001" if value else ""
        raise ValueError(f"parameters.{name}.{key}: {value!r} is no number{hint}")
    return value


def _text(name: str, value: Any) -> str:
    """A value as an agent writes it behind ``name=``."""
    if value is None:
        raise ValueError(f'parameters.{name}: an agent would write {name}=None, a string to Hydra: say "null"')
    _require_one_value(f"parameters.{name}", f"{name}={value}")
    return str(value)


def _require_one_value(where: str, override: str) -> None:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ValueError(f"{where}: Hydra cannot read {override!r}") from error
    if parsed.is_sweep_override():
        raise ValueError(f"{where}: {override} is several values to Hydra: list them as values, or quote them twice")


def _require_known(where: str, given: Spec, known: Sequence[str], hint: str = "") -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: {key}: choose {', '.join(known)}{f'; {hint}' if hint else ''}")


def _key(override: str) -> str:
    return override.partition("=")[0]


def main() -> None:
    """Translate the file and become train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a W&B sweep file, such as sweeps/ablation.yaml")
    parser.add_argument("overrides", nargs="*", help="of every run: data=digits recipe=quick …")
    parser.add_argument("--print", action="store_true", help="only show the command")
    options = parser.parse_intermixed_args()
    with clear_errors():
        arguments = command(options.file, options.overrides)
    if options.print:
        print(shlex.join(["python", PROGRAM, *arguments]))
        return
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(ROOT / PROGRAM), *arguments])


if __name__ == "__main__":
    main()
