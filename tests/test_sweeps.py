"""Every file of sweeps/ runs with both drivers: `wandb agent`, here against the stand-in, and `python src/sweep.py`."""

import importlib.util
import json
import math
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from e2e.test_train import SMALL
from repvgg.cli import NODE_OF_GROUP, prepare_environment
from support.wandb_server import WandbServer, client
from train import require_objective

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optuna 2.10's, of SQLAlchemy
    import optuna
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
spec = importlib.util.spec_from_file_location("sweep", ROOT / "src" / "sweep.py")
assert spec is not None
assert spec.loader is not None
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

BASE = {
    "program": "src/train.py",
    "method": "random",
    "run_cap": 3,
    "metric": {"name": "test/deploy/top1", "goal": "maximize"},
    "parameters": {"recipe.lr": {"values": [0.1, 0.2]}},
    "command": ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"],
}
GRID = {**BASE, "method": "grid"}


def write(directory: Path, content: dict) -> Path:
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def space(arguments: list[str]) -> tuple[dict, dict]:
    """What Hydra's Optuna sweeper makes of the overrides: distributions, and fixed values."""
    return create_params_from_overrides([a for a in arguments[1:] if not a.startswith("hydra")])


# --- the files


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_composes_with_the_values_at_its_ends(file: Path) -> None:
    """In an agent's command: every parameter as one override, and the fixed ones of the file."""
    content = yaml.safe_load(file.read_text())
    assert content["project"] == "repvgg"  # train.py's own, which an agent would otherwise ignore with a warning
    fixed = [item for item in content["command"] if not item.startswith(("${", "hydra."))]
    for end in ("min", "max"):
        point = {
            name: values.get("value", (values.get("values") or [None])[0 if end == "min" else -1])
            if end not in values
            else values[end]
            for name, values in content["parameters"].items()
        }
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", overrides=[*(f"{name}={value}" for name, value in point.items()), *fixed])
        for name, value in point.items():
            if name not in NODE_OF_GROUP:
                node = config
                for part in name.split("."):
                    node = node[part]
                assert node == value
    assert "${args_no_hyphens}" in content["command"]
    assert any("WANDB_RUN_ID" in item for item in content["command"])  # agents do not share a directory


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_has_a_command_without_a_server(file: Path) -> None:
    arguments = sweep.command(file, ["data=digits", "logger=csv"])
    assert arguments[0] == "-m"
    assert arguments[-2:] == ["data=digits", "logger=csv"]
    assert OverridesParser.create().parse_overrides(arguments[1:])
    if yaml.safe_load(file.read_text())["method"] != "grid":
        distributions, _ = space(arguments)
        study = optuna.create_study(direction="maximize")
        trial = study.ask(distributions)
        assert trial.params.keys() == yaml.safe_load(file.read_text())["parameters"].keys()


# --- the translation


def test_a_grid_is_choice_lists(tmp_path: Path) -> None:
    parameters = {"ablation": {"values": ["id", "1x1"]}, "seed": {"values": [0, 1]}, "model": {"value": "repvgg_b1"}}
    file = write(tmp_path, {**GRID, "run_cap": 4, "parameters": parameters, "command": [*BASE["command"], "tf32=true"]})
    expected = ["-m", "ablation=id,1x1", "seed=0,1", "model=repvgg_b1", "tf32=true"]
    assert sweep.command(file) == expected


def test_an_override_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = write(tmp_path, {**GRID, "command": [*BASE["command"], "recipe=fast", "hydra.run.dir=x"]})
    given = ["recipe=quick", "recipe.lr=0.3", "+experiment=on_digits"]
    expected = ["-m", "recipe.lr=0.3", "recipe=quick", "hydra.sweeper.params=null", "+experiment=on_digits"]
    assert sweep.command(file, given) == expected


@pytest.mark.parametrize(
    ("parameter", "distribution"),
    [
        ({"min": 1, "max": 5}, optuna.distributions.IntUniformDistribution(1, 5)),
        ({"min": 1.0, "max": 5.0}, optuna.distributions.UniformDistribution(1.0, 5.0)),
        ({"distribution": "uniform", "min": 0, "max": 1}, optuna.distributions.UniformDistribution(0.0, 1.0)),
        (
            {"distribution": "log_uniform_values", "min": 0.00001, "max": 0.1},
            optuna.distributions.LogUniformDistribution(0.00001, 0.1),
        ),
        (
            {"distribution": "log_uniform", "min": -2, "max": 1},
            optuna.distributions.LogUniformDistribution(math.exp(-2), math.exp(1)),
        ),
        (
            {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1},
            optuna.distributions.DiscreteUniformDistribution(0.0, 0.3, 0.1),
        ),
        (
            {"distribution": "q_log_uniform_values", "min": 1, "max": 64},
            optuna.distributions.IntLogUniformDistribution(1, 64),
        ),
        ({"values": ["id", "1x1", True, 0.5]}, optuna.distributions.CategoricalDistribution(("id", "1x1", True, 0.5))),
    ],
    ids=str,
)
def test_distributions(parameter: dict, distribution: object, tmp_path: Path) -> None:
    arguments = sweep.command(write(tmp_path, {**BASE, "parameters": {"x": parameter}}))
    distributions, fixed = space(arguments)
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        assert [str(choice).lower() for choice in distributions["x"].choices] == ["id", "1x1", "true", "0.5"]
    else:
        assert distributions == {"x": distribution}
    assert not fixed


@pytest.mark.parametrize(
    ("method", "sampler", "goal"), [("random", "random", "minimize"), ("bayes", "tpe", "maximize")]
)
def test_the_sweeper_of_a_method(method: str, sampler: str, goal: str, tmp_path: Path) -> None:
    content = {**BASE, "method": method, "name": "mine", "metric": {"name": "test/deploy/top1", "goal": goal}}
    arguments = sweep.command(write(tmp_path, content), ["hydra.sweeper.sampler.seed=5"])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "train", overrides=[a for a in arguments[1:] if a.startswith("hydra")], return_hydra_config=True
        )
    sweeper = config.hydra.sweeper
    assert sweeper._target_.endswith("OptunaSweeper")
    assert sweeper.sampler._target_.lower().endswith(f"{sampler}sampler")
    assert (sweeper.sampler.seed, sweeper.n_trials, sweeper.n_jobs) == (5, 3, 1)
    assert (str(sweeper.direction), sweeper.study_name) == (goal, "mine")


@given(
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.from_regex(r"(?a)\A[a-z]\w{0,9}\Z").filter(lambda text: text not in ("true", "false", "null", "nan", "inf")),
    )
)
def test_a_value_reaches_hydra_as_it_was(value: object) -> None:
    parsed = OverridesParser.create().parse_override(f"x={sweep._text('x', value)}").value()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "hyperband"}, "method: hyperband: choose grid, random, bayes"),
        ({"early_terminate": {"type": "hyperband"}}, "key: early_terminate: choose program, .*wandb sweep"),
        ({"program": "train.py"}, r"program: train.py: choose src/train.py"),
        ({"metric": {"name": "val/loss"}}, "metric.name: val/loss: choose test/deploy/top1"),
        ({"metric": {"name": "test/deploy/top1", "goal": "up"}}, "metric.goal: up: choose minimize or maximize"),
        ({"metric": {"name": "test/deploy/top1", "target": 1}}, "metric: target: choose name, goal"),
        ({"run_cap": None}, "run_cap: None: random needs a number of runs"),
        ({"command": None}, "command: is missing: choose"),
        ({"command": ["${program}", "${args}"]}, r"command: \$\{args\}: choose"),
        ({"command": ["${program}"]}, r"command: needs \$\{args_no_hyphens\}"),
        ({"command": [*BASE["command"], "seed=1,2"]}, "command: seed=1,2 is several values to Hydra"),
        ({"parameters": {"recipe": {"values": ["fast"]}}}, r"parameters\.recipe: W&B would log .* put recipe=… into"),
        ({"parameters": {"recipe": {"parameters": {"lr": {"value": 1}}}}}, r"parameters\.recipe"),
        ({"parameters": {"net": {"parameters": {"a": {"value": 1}}}}}, r"parameters\.net: nested .* write net\.KEY"),
        ({"parameters": {"x": {"min": "1e-4", "max": 1.0}}}, r"x\.min: '1e-4' is no number: PyYAML, .* write 0\.0001"),
        ({"parameters": {"x": {"max": 1.0}}}, "x: needs value, values, or min and max"),
        ({"parameters": {"x": {"min": 1, "max": 2.5}}}, "a float and an int"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "x: min 2 is above max 1"),
        (
            {"parameters": {"x": {"min": 1, "max": 2, "distribution": "normal"}}},
            r"x\.distribution: normal: choose",
        ),
        ({"parameters": {"x": {"min": 0.0, "max": 2.0, "distribution": "log_uniform_values"}}}, "0.0 has no logarithm"),
        ({"parameters": {"x": {"min": 0.5, "max": 2, "distribution": "int_uniform"}}}, "x.min: 0.5: int_uniform needs"),
        (
            {"parameters": {"x": {"min": 0.0, "max": 0.5, "q": 0.2, "distribution": "q_uniform"}}},
            r"x\.max: 0\.5 is no multiple of q 0\.2",
        ),
        (
            {"parameters": {"x": {"min": 1.0, "max": 9.0, "q": 2, "distribution": "q_log_uniform_values"}}},
            "Optuna knows integers with q 1",
        ),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.5]}}}, "x: probabilities: choose values"),
        ({"parameters": {"x": {"values": []}}}, r"x\.values: \[\]: needs a list"),
        ({"parameters": {"x": {"value": None}}}, 'x=None, a string to Hydra: say "null"'),
        ({"parameters": {"x": {"values": ["a,b"]}}}, "x=a,b is several values to Hydra"),
        ({"parameters": {"x": {"values": ["a: {"]}}}, "Hydra cannot read 'x=a: {'"),
        ({"method": "grid", "parameters": {"x": {"min": 1, "max": 2}}}, "x: a grid needs values"),
        ({"method": "grid", "run_cap": 1}, "run_cap: 1 would cut off a grid of 2 runs"),
        ({"parameters": None}, "is no sweep: it needs program, method and parameters"),
    ],
    ids=str,
)
def test_what_has_no_translation_is_one_clear_error(change: dict, message: str, tmp_path: Path) -> None:
    content = {key: value for key, value in {**BASE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        sweep.command(write(tmp_path, content))


def run(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "src/sweep.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=check,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


def test_print_only_shows_the_command(tmp_path: Path) -> None:
    done = run(ROOT / "sweeps" / "lr_wd.yaml", "data=digits", "--print")
    assert shlex.split(done.stdout) == [
        "python",
        "src/train.py",
        *sweep.command(ROOT / "sweeps" / "lr_wd.yaml", ["data=digits"]),
    ]


def test_a_file_that_is_not_there_names_those_that_are() -> None:
    done = run("sweeps/nothing.yaml", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no file sweeps/nothing.yaml: choose sweeps/ablation.yaml, ")


# --- real runs


@pytest.mark.slow
def test_an_agent_trains_and_the_logged_config_is_whole(
    wandb_server: WandbServer, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sweeps/ablation.yaml as it is, but for what makes it small."""
    content = yaml.safe_load((ROOT / "sweeps" / "ablation.yaml").read_text())
    content["parameters"]["ablation"]["values"] = ["id"]
    content["parameters"]["recipe.lr"] = {"value": 0.01}
    content["command"] = [item.replace("=outputs/", f"={tmp_path}/") for item in content["command"]]
    content["command"] += [*SMALL, "data=digits", f"data.dir={digits}", "trainer=cpu", "trainer.max_epochs=1"]
    options = {"cwd": ROOT, "timeout": 200, "capture_output": True, "text": True}
    subprocess.run(client("sweep", str(write(tmp_path, content))), check=True, **options)
    ((identifier, held),) = wandb_server.sweeps.items()
    subprocess.run(client("agent", "--count", "1", f"me/repvgg/{identifier}"), check=True, **options)

    assert held.given == [{"ablation": "id", "seed": 0, "recipe.lr": 0.01}]
    run = wandb_server.run()
    assert (run.sweep, run.state, run.begun, run.name) == (identifier, "finished", 1, "A0-id-digits-s0")
    assert run.config["choices"]["ablation"] == "id"
    assert run.config["choices"]["model"] == "repvgg_a0"
    assert len(run.config["block"]["branches"]) == 2
    assert run.config["net"]["depths"] == [2, 4, 14, 1]
    assert run.config["net"]["branches"] == run.config["block"]["branches"]
    assert run.config["recipe"]["lr"] == run.config["recipe.lr"] == 0.01
    assert run.config["recipe"]["optimizer"]["momentum"] == 0.9
    assert run.config["data"]["num_classes"] == 10
    (record,) = tmp_path.glob(f"sweep-{identifier}/{run.id}/result.json")
    assert run.summary["test/deploy/top1"] == json.loads(record.read_text())["objective"]


@pytest.mark.slow
def test_optuna_gets_what_the_runs_record(digits: Path, tmp_path: Path) -> None:
    done = run(
        *[ROOT / "sweeps" / "bayes.yaml", *SMALL, "data=digits", f"data.dir={digits}", "trainer=cpu", "logger=csv"],
        *["trainer.max_epochs=1", "recipe.warmup_epochs=0", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}"],
    )
    records = [json.loads((tmp_path / str(number) / "result.json").read_text()) for number in (0, 1)]
    study = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    best = max(records, key=lambda record: record["objective"])
    assert study["best_value"] == best["objective"]
    assert study["best_params"].keys() == {"recipe.lr", "recipe.weight_decay", "recipe.label_smoothing"}
    for name, value in study["best_params"].items():
        node = best["config"]
        for part in name.split("."):
            node = node[part]
        assert node == value
    assert records[0]["config"]["recipe"]["lr"] != records[1]["config"]["recipe"]["lr"]
    assert "Study name: bayes" in done.stdout + done.stderr
    assert (tmp_path / "summary.md").is_file()


# --- what a searching sweeper needs of every run ---


@pytest.mark.parametrize(
    ("sweeper", "overrides", "says"),
    [
        ({"direction": ["maximize", "minimize"]}, [], "a run has one value, test/deploy/top1"),
        ({"direction": "minimize"}, [], "Give hydra.sweeper.direction=maximize"),
        ({}, ["callbacks.two_forms=null"], "needs callbacks.two_forms: switch it on"),
        ({}, ["~callbacks.checkpoints"], "needs callbacks.checkpoints: switch it on"),
        ({}, ["+trainer.fast_dev_run=2"], "trainer.fast_dev_run=2: a dry run has no test/deploy/top1"),
    ],
)
def test_a_search_without_one_value_to_maximise_is_refused(sweeper: dict, overrides: list[str], says: str) -> None:
    prepare_environment()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["output_dir=/nowhere", *overrides])
    optuna = {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", "direction": "maximize"}
    with pytest.raises(ValueError, match=says):
        require_objective(cfg, OmegaConf.create({**optuna, **sweeper}))
    require_objective(cfg, OmegaConf.create({"_target_": "hydra._internal.BasicSweeper"}))  # a grid needs none
