"""`python src/evaluate.py` as a user types it, on what `python src/train.py` leaves."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir

from repvgg.checkpoints import fitting_choices, overrides_of_run
from repvgg.cli import quote_paths
from repvgg.deploy.int8 import sums_saturate
from repvgg.model import RepVGG, load_weights, read_weights, to_deploy
from repvgg.report.offline import find_offline_runs, read_offline_run
from support.networks import ABLATIONS

ROOT = Path(__file__).parents[2]
SMALL = ["model=repvgg_a0", "net.width_a=0.25", "net.width_b=0.25"]
QUICK = ["recipe=quick", "bench.warmup=1", "bench.batches=2", "bench.batch=8", "trainer.max_epochs=1", "logger=csv"]


def python(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"src/{script}.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def record(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(digits: Path) -> list[str]:
    return ["data=digits", f"data.dir={digits}", "trainer=cpu"]


@pytest.fixture(scope="module")
def run(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training, in a directory named as a sweep names it."""
    directory = tmp_path_factory.mktemp("sweep") / "0_ablation=full"
    python("train", *data, *SMALL, *QUICK, f"hydra.run.dir='{directory}'")
    return directory


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's best checkpoint, of which nothing but the file is named."""
    directory = tmp_path_factory.mktemp("evaluated")
    done = python(
        "evaluate",
        *[f"ckpt={run}/checkpoints/best.ckpt", "logger=wandb_offline", "confusion=true"],
        f"hydra.run.dir={directory}",
    )
    assert re.search(r"train form +\d+\.\d\d +\d+\.\d\d +\d+\.\d{4}", done.stdout), done.stdout
    return directory


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ours to the authors', for networks with the branches 3×3, 1×1, identity in this order."""
    words = {
        "branches.0": "rbr_dense",
        "branches.1": "rbr_1x1",
        "branches.2.bn": "rbr_identity",
        ".conv.": ".rbr_reparam.",
        "head": "linear",
        "stem": "stage0",
    }
    out = {}
    for key, tensor in state.items():
        key = key.removeprefix("net.")
        for ours, theirs in words.items():
            if not (ours == ".conv." and "rbr" in key):
                key = key.replace(ours, theirs)
        out[re.sub(r"stages\.(\d)", lambda m: f"stage{int(m[1]) + 1}", key)] = tensor
    return out


@pytest.fixture(scope="module")
def official(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as the authors would have written them, in both forms."""
    directory = tmp_path_factory.mktemp("official")
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    net = RepVGG((2, 4, 14, 1), 0.25, 0.25, ABLATIONS["full"], num_classes=10)
    net.load_state_dict({key.removeprefix("net."): tensor for key, tensor in state.items()})
    files = {"train": directory / "train.pth", "deploy": directory / "deploy.pth"}
    torch.save(official_names(state), files["train"])
    torch.save({"state_dict": official_names(to_deploy(net).state_dict())}, files["deploy"])
    return files


def test_equals_the_runs_own_test_of_its_best_checkpoint(run: Path, evaluated: Path) -> None:
    trained, result = record(run)["metrics"], record(evaluated)
    for name in ("top1", "top5", "deploy/top1", "deploy/top5"):
        assert result["metrics"][f"eval/{name}"] == trained[f"test/{name}"], name
    for name in ("loss", "deploy/loss"):  # summed in batches of another size
        assert result["metrics"][f"eval/{name}"] == pytest.approx(trained[f"test/{name}"], rel=1e-5)
    assert result["status"] == "finished"
    assert result["objective"] == trained["test/deploy/top1"]
    assert result["metrics"]["params/deploy"] == trained["params/deploy"]
    config = result["config"]
    assert {group: config["choices"][group] for group in ("model", "ablation", "data")} == {
        "model": "repvgg_a0",
        "ablation": "full",
        "data": "digits",
    }
    assert config["net"]["width_a"] == 0.25
    assert config["weights"] == {"naming": "ours", "form": "train"}
    assert not {"recipe", "bench", "callbacks"} & config.keys()


def test_the_tables_add_up(evaluated: Path) -> None:
    metrics = record(evaluated)["metrics"]
    classes = table(evaluated / "per_class.csv")
    assert [row["name"] for row in classes] == [str(digit) for digit in range(10)]
    images = [int(row["images"]) for row in classes]
    assert sum(images) == metrics["eval/images"] == 360
    for form, key in (("train_form", "eval/top1"), ("deploy", "eval/deploy/top1")):
        right = [float(row[f"top1_{form}"]) * n for row, n in zip(classes, images, strict=True)]
        assert sum(right) == pytest.approx(360 * metrics[key], abs=1e-3)
        matrix = [list(map(int, list(row.values())[1:])) for row in table(evaluated / f"confusion_{form}.csv")]
        assert [sum(row) for row in matrix] == images
        assert [matrix[i][i] for i in range(10)] == pytest.approx(right)
    outcomes = {row["outcome"]: int(row["images"]) for row in table(evaluated / "forms.csv")}
    assert outcomes["both right"] + outcomes["only the train form right"] == round(360 * metrics["eval/top1"])
    assert sum(outcomes.values()) - outcomes["different answers"] == 360


def test_wandb_has_the_same(evaluated: Path) -> None:
    (path,) = find_offline_runs(evaluated)
    offline = read_offline_run(path)
    assert offline.finished
    assert offline.job_type == "eval"
    assert offline.name == "A0-full-digits-eval"
    metrics = record(evaluated)["metrics"]
    assert {key: offline.summary[key] for key in metrics} == metrics
    assert offline.summary["eval/per_class"]["nrows"] == 10
    assert {"eval/top1", "eval/deploy/top1", "reparam/rel_l2_diff"} <= set(offline.history.columns)


@pytest.mark.slow
def test_the_authors_names_give_the_same_numbers(
    official: dict[str, Path], evaluated: Path, data: list[str], tmp_path: Path
) -> None:
    python("evaluate", f"ckpt={official['train']}", *data, *SMALL, f"hydra.run.dir={tmp_path}")
    ours, theirs = record(evaluated)["metrics"], record(tmp_path)
    assert theirs["metrics"] == ours
    assert theirs["config"]["weights"] == {"naming": "official", "form": "train"}
    assert (tmp_path / "per_class.csv").read_text() == (evaluated / "per_class.csv").read_text()


@pytest.mark.slow
def test_a_deployed_file_at_another_resolution(official: dict[str, Path], data: list[str], tmp_path: Path) -> None:
    small = ["resolution=24", "resize=28", "trainer.precision=bf16-mixed", f"hydra.run.dir={tmp_path}"]
    done = python("evaluate", f"ckpt={official['deploy']}", *data, *SMALL, *small)
    result = record(tmp_path)
    assert result["config"]["data"]["val_transform"]["size"] == 24
    assert result["config"]["data"]["val_transform"]["ratio"] == pytest.approx(24 / 28)
    assert "360 images at 24 px, bf16-mixed" in done.stdout
    assert "eval/deploy/top1" in result["metrics"]
    assert not {"eval/top1", "reparam/rel_l2_diff"} & result["metrics"].keys()
    assert not (tmp_path / "forms.csv").exists()


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same(run: Path, evaluated: Path, tmp_path: Path) -> None:
    python(
        "evaluate",
        *[f"ckpt={run}/checkpoints/best.ckpt", "trainer=cpu", "trainer.devices=2", "batch_size=50"],
        f"hydra.run.dir={tmp_path}",
    )
    one, two = record(evaluated)["metrics"], record(tmp_path)["metrics"]
    for key in ("eval/images", "eval/top1", "eval/top5", "eval/deploy/top1", "eval/forms/both_right"):
        assert one[key] == two[key], key
    assert (tmp_path / "per_class.csv").read_text() == (evaluated / "per_class.csv").read_text()


@pytest.fixture(scope="module")
def renamed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, with one class called otherwise."""
    directory = tmp_path_factory.mktemp("renamed") / "data"
    shutil.copytree(digits, directory)
    for file in directory.glob("*.json"):
        file.write_text(file.read_text().replace('"3"', '"three"', 1))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate", "export", "train"])
def test_data_of_other_classes_is_refused(script: str, run: Path, renamed: Path, tmp_path: Path) -> None:
    """There are as many, so a count would not tell."""
    ckpt, out = run / "checkpoints" / "best.ckpt", f"hydra.run.dir={tmp_path}"
    more = {
        "evaluate": [f"ckpt={ckpt}", "trainer=cpu", out],
        "export": [f"ckpt={ckpt}", f"out={tmp_path / 'net.onnx'}"],
        "train": [f"ckpt_path={ckpt}", "data=digits", "trainer=cpu", *SMALL, *QUICK, "trainer.max_epochs=2", out],
    }[script]
    quoted = quote_paths(more, ["ckpt", "ckpt_path"])
    done = python(script, *quoted, f"data.dir={renamed}", check=False)
    assert done.returncode == 2, done.stderr
    assert f"{ckpt} is of other classes than {renamed}/val.beton" in done.stderr
    assert "only the checkpoint has 3; only the data has three" in done.stderr
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.slow
def test_a_training_begins_with_the_weights_of_a_file(
    official: dict[str, Path], data: list[str], tmp_path: Path
) -> None:
    """After one step of almost no length the kernels are still the file's."""
    step = ["trainer.limit_train_batches=1", "recipe.lr=1.0e-9", f"hydra.run.dir={tmp_path}"]
    done = python("train", f"init_from={official['train']}", *data, *SMALL, *QUICK, *step)
    assert "its classifier of 10 classes too" in done.stdout + done.stderr
    begun = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    given = torch.load(official["train"], weights_only=True)
    for ours, theirs in {
        "net.stem.branches.1.conv.weight": "stage0.rbr_1x1.conv.weight",
        "net.stages.2.13.branches.2.bn.weight": "stage3.13.rbr_identity.weight",
        "net.head.weight": "linear.weight",
    }.items():
        torch.testing.assert_close(begun[ours], given[theirs], rtol=1e-5, atol=1e-6)
    assert record(tmp_path)["config"]["init_from"] == str(official["train"])


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("evaluate", [], ["ckpt=PATH is missing", "RUN/checkpoints/best.ckpt"]),
        ("evaluate", ["ckpt=/none.pth"], ["/none.pth: there is no such file"]),
        ("evaluate", ["ckpt={train}", "forms=deply"], ["forms=deply", "both, train, deploy or null"]),
        ("evaluate", ["ckpt={train}", "recipe.lr=1"], ["recipe.lr=1", "does not read recipe"]),
        ("evaluate", ["ckpt={train}", "resolution=64", "resize=32"], ["resize=32", "resolution="]),
        (
            "evaluate",
            ["ckpt={train}", "data.dir=/none", *SMALL],
            ["val: /none/val.beton", "python src/write_dataset.py"],
        ),
        ("evaluate", ["ckp={train}"], ["Did you mean ckpt?"]),
        ("evaluate", ["ckpt={train}", "int8=int4"], ["int8=int4: choose onnxruntime, torch or null"]),
        (
            "evaluate",
            ["ckpt={train}", "int8=torch", "quantizer.method=max"],
            ["quantizer.method=max: int8=torch"],
        ),
        ("evaluate", ["ckpt={train}", "int8=torch", "forms=train"], ["forms=train leaves out: choose forms=both"]),
        ("train", ["int8=true"], ["int8=true: choose onnxruntime, torch or null"]),
        ("train", ["init_from={train}", "ckpt_path=last"], ["init_from begins", "give one of them"]),
        ("train", ["init_from=/none.pth"], ["there is no file /none.pth"]),
        (
            "train",
            ["data=digits", "weights=raw"],
            ["weights=raw says which weights of init_from", "give init_from=PATH"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and "=" in "".join(value) else None,
)
def test_a_wrong_input_gets_one_clear_error(
    script: str, arguments: list[str], says: list[str], official: dict[str, Path], tmp_path: Path
) -> None:
    typed = [argument.format(**official) for argument in arguments]
    done = python(script, *typed, f"hydra.run.dir={tmp_path / 'run'}", check=False)
    assert done.returncode == 2
    for words in says:
        assert words in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ablation", ["id", "full"])
def test_the_error_of_another_variant_names_the_right_one(
    ablation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROJECT_ROOT", str(ROOT))
    with torch.device("meta"):
        net, other = (RepVGG(depths, 1, 2.5, ABLATIONS[ablation]) for depths in ((2, 4, 14, 1), (4, 6, 16, 1)))
    for form in (net, to_deploy(net)):
        small = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in form.state_dict().items()}
        torch.save(small, tmp_path / "a1.pth")
        weights = read_weights(tmp_path / "a1.pth")
        model = other if form is net else to_deploy(other)
        with (
            initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
            pytest.raises(ValueError, match=r"both are one network\. This file fits (.*)") as caught,
            fitting_choices(weights, "full"),
        ):
            load_weights(model, weights)
        named = str(caught.value).partition("This file fits ")[2]
        assert named == ("model=repvgg_a1 ablation=id" if form is net and ablation == "id" else "model=repvgg_a1")


def test_what_is_typed_comes_before_what_the_run_says(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    of_run = overrides_of_run(best, [])
    assert of_run[:3] == ["model=repvgg_a0", "ablation=full", "data=digits"]
    assert {"net.width_a=0.25", "net.width_b=0.25"} < set(of_run)
    assert not any(override.startswith(("trainer", "hydra", "bench", "recipe")) for override in of_run)
    typed = overrides_of_run(best, ["data=imagenet", "net.width_a=0.5"])
    assert "net.width_b=0.25" in typed
    assert not any(override.startswith(("data", "net.width_a")) for override in typed)
    assert not any(o.startswith(("model", "net.")) for o in overrides_of_run(best, ["model=repvgg_b0"]))
    assert overrides_of_run(run.parent / "weights.pth", []) == []


def test_paths_of_sweeps_need_no_quotes(run: Path) -> None:
    best = f"{run}/checkpoints/best.ckpt"
    assert "=" in best
    assert quote_paths([f"ckpt={best}", "seed=1", f"x={best}"], ["ckpt"]) == [f"ckpt='{best}'", "seed=1", f"x={best}"]
    for unchanged in (f"ckpt='{best}'", "ckpt=a=b", f"ckpt={best},{best}", "-m"):
        assert quote_paths([unchanged], ["ckpt"]) == [unchanged]


@pytest.mark.slow
def test_int8_is_a_third_form(run: Path, tmp_path: Path) -> None:
    """The same images calibrate it, so that what the training measured comes out again."""
    best = f"ckpt={run}/checkpoints/best.ckpt"
    options = ["trainer=cpu", "int8=onnxruntime", "quantizer.images=100"]
    done = python("evaluate", best, *options, f"hydra.run.dir={tmp_path}")
    metrics = record(tmp_path)["metrics"]
    assert {f"eval/int8/{name}" for name in ("top1", "top5", "loss")} <= metrics.keys()
    assert 0 < metrics["int8/rel_l2_diff"] < (math.inf if sums_saturate() else 0.2)
    assert record(tmp_path)["config"]["quantizer"]["backend"] == "onnxruntime"
    assert "int8 by onnxruntime" in done.stdout
    assert re.search(r"\n  int8 +[0-9.]+ +[0-9.]+ +[0-9.]+", done.stdout)
    rows = table(tmp_path / "per_class.csv")
    share = sum(float(row["top1_int8"]) * int(row["images"]) for row in rows) / 360
    assert share == pytest.approx(metrics["eval/int8/top1"])
    counts = [int(row["images"]) for row in table(tmp_path / "forms_int8.csv")[:4]]
    assert sum(counts) == metrics["eval/images"] == 360
    layers = table(tmp_path / "int8_layers.csv")
    assert [layers[0]["name"], layers[-1]["name"]] == ["stem.conv", "head"]
    assert min(float(layer["output_db"]) for layer in layers) == pytest.approx(metrics["int8/output_db_min"], abs=1e-4)


@pytest.mark.slow
def test_a_training_measures_int8_at_its_end(data: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    options = ["int8=torch", "quantizer.images=100", f"hydra.run.dir={directory}"]
    done = python("train", *data, *SMALL, *QUICK, *options)
    metrics = record(directory)["metrics"]
    for name in ("top1", "top5", "loss"):
        assert metrics[f"test/int8/{name}"] == pytest.approx(metrics[f"val/int8/{name}"], rel=1e-6)  # of one epoch
    assert "in int8" in done.stdout
    evaluated = tmp_path / "evaluated"
    best = f"ckpt={directory}/checkpoints/best.ckpt"
    python("evaluate", best, "trainer=cpu", "int8=torch", "quantizer.images=100", f"hydra.run.dir={evaluated}")
    assert record(evaluated)["metrics"]["eval/int8/loss"] == pytest.approx(metrics["test/int8/loss"], rel=1e-6)


def test_int8_without_calibration_images_says_where_to_take_them(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a validation file alone."""
    for name in ("val.beton", "val.beton.json"):
        (tmp_path / name).symlink_to(digits / name)
    options = ["data=folder", f"data.dir={tmp_path}", "data.resolution=32", "trainer=cpu", "int8=torch"]
    done = python("evaluate", f"ckpt={run}/checkpoints/best.ckpt", *options, check=False)
    assert done.returncode == 2
    assert f"there is no {tmp_path}/train.beton" in done.stderr
    assert f"quantizer.file={tmp_path}/val.beton" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_files_are_compared(
    official: dict[str, Path], evaluated: Path, data: list[str], tmp_path: Path
) -> None:
    files = f"ckpt={official['train']},{official['deploy']}"
    python("evaluate", "-m", files, *data, *SMALL, f"hydra.sweep.dir={tmp_path}")
    rows = table(tmp_path / "summary.csv")
    top1 = 100 * record(evaluated)["metrics"]["eval/deploy/top1"]
    assert [float(row["top-1 deploy [%]"]) for row in rows] == pytest.approx([top1, top1])


def test_help_is_worth_reading_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['src/evaluate.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/evaluate.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'ffcv', 'pandas', 'matplotlib', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("python src/evaluate.py ckpt=", "model=repvgg_b1", "forms=both|train|deploy", "resolution=320"):
        assert words in done.stdout
