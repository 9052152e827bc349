"""Every config composes, and every choice instantiates."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from repvgg.cli import ROOT, logged_config, prepare_environment
from repvgg.command import require_right_values
from repvgg.identity import run_name
from repvgg.model import Block, count_macs, count_parameters, to_deploy
from repvgg.report.table import load_paper
from support.paper import (
    ABLATION_TRAIN_PARAMS,
    DESIGN_DEPLOY_PARAMS,
    DESIGN_TRAIN_PARAMS,
    PROJECTION_CHANNELS,
    PROJECTION_KERNELS,
    VARIANTS,
    layers,
)

CONF = ROOT / "conf"
EXPERIMENTS = ["table4", "table6", "table7", "int8"]


def options(group: str) -> list[str]:
    return sorted(f.stem for f in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", "unset")
    monkeypatch.delenv("PROJECT_ROOT")
    prepare_environment()


def config(*overrides: str, root: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(root, [*overrides, "output_dir=/nowhere"])
    require_right_values(root, cfg, {})  # whatever this repository's files say is in the table
    return cfg


def test_the_promised_choices_are_there() -> None:
    assert set(options("model")) == {f"repvgg_{name}" for name in VARIANTS}
    assert set(options("ablation")) == {*ABLATION_TRAIN_PARAMS, *DESIGN_TRAIN_PARAMS}
    assert {"imagenet", "digits", "folder"} <= set(options("data"))
    assert {"paper_120", "paper_200", "fast", "finetune", "quick"} <= set(options("recipe"))
    assert {"default", "auto", "cpu", "ddp"} <= set(options("trainer"))
    assert {"wandb", "wandb_offline", "csv"} <= set(options("logger"))


def test_defaults_are_table_6() -> None:
    cfg = config()
    assert (cfg.net.depths, cfg.net.width_a, cfg.net.width_b) == ([4, 6, 16, 1], 1, 2.5)
    assert (cfg.recipe.epochs, cfg.recipe.batch_size, cfg.recipe.lr) == (120, 256, 0.1)
    assert cfg.recipe.optimizer.momentum == 0.9
    assert not cfg.recipe.optimizer.nesterov
    assert (cfg.recipe.weight_decay, cfg.recipe.label_smoothing, cfg.recipe.warmup_epochs) == (1e-4, 0, 0)
    assert (cfg.data.name, cfg.data.num_classes, cfg.data.resolution) == ("imagenet", 1000, 224)
    assert cfg.trainer.precision == "32-true"
    assert cfg.tf32 is False


@pytest.mark.parametrize(
    ("model", "ablation"),
    [*itertools.product(["repvgg_b0"], options("ablation")), *itertools.product(options("model"), ["full"])],
)
def test_every_model_and_ablation_builds_its_module(model: str, ablation: str) -> None:
    cfg = config(f"model={model}", f"ablation={ablation}")
    with torch.device("meta"):
        module = instantiate(cfg.module)
    assert isinstance(module, pl.LightningModule)
    expected = VARIANTS[model.removeprefix("repvgg_")]
    projections = ablation == "residual_reorg"  # beside the layers
    if ablation == "full":
        assert count_parameters(module.net) == expected.train_params
    elif ablation in ABLATION_TRAIN_PARAMS:
        assert count_parameters(module.net) == ABLATION_TRAIN_PARAMS[ablation]
    else:
        of_blocks = sum(DESIGN_TRAIN_PARAMS[ablation](*layer) for layer in layers(expected))
        of_blocks += projections * (PROJECTION_KERNELS + 2 * PROJECTION_CHANNELS)
        assert count_parameters(module.net) == of_blocks + 1000 * (1280 + 1)
    deploy_params = expected.deploy_params + projections * (PROJECTION_KERNELS + PROJECTION_CHANNELS)
    if ablation in DESIGN_DEPLOY_PARAMS:
        deploy_params = sum(DESIGN_DEPLOY_PARAMS[ablation](*layer) for layer in layers(expected)) + 1000 * (1280 + 1)
    assert count_parameters(to_deploy(module.net)) == deploy_params


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_an_experiment_sweeps_the_rows_of_its_table(table: str) -> None:
    content, experiment = (OmegaConf.load(ROOT / d / f"{table}.yaml") for d in ("experiments", "conf/experiment"))
    group = "model" if "models" in content.paper else "ablation"
    rows = content.paper[f"{group}s"]
    assert dict(experiment.hydra.sweeper.params) == {group: ",".join(map(str, rows))}
    assert experiment.experiment == table
    assert content.cost.runs == len(rows)
    assert set(rows) <= set(options(group))


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_the_commands_of_an_experiment_compose(table: str) -> None:
    commands = OmegaConf.load(ROOT / "experiments" / f"{table}.yaml").commands
    for name, command in commands.items():
        program, *arguments = shlex.split(command)[1:]
        if program != "src/train.py":
            continue
        assert "-m" in arguments
        # of what is swept the first
        once = [re.sub(r"(?<==)([^\[,]*),.*", r"\1", argument) for argument in arguments if argument != "-m"]
        composed = config(*once)
        assert composed.data.name == ("imagenet" if name in ("imagenet", "table5") else name)
        assert composed.experiment == table


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_the_cost_of_an_experiment_is_arithmetic(table: str) -> None:
    """Multiply-adds of its runs with one seed: three times a forward pass's, on 1,281,167 images an epoch."""
    content = OmegaConf.load(ROOT / "experiments" / f"{table}.yaml")
    sweep = OmegaConf.load(ROOT / "conf" / "experiment" / f"{table}.yaml").hydra.sweeper.params
    ((group, rows),) = sweep.items()
    fixed = [] if group == "model" else [f"model={content.paper.model}"]
    total = 0
    for row in rows.split(","):
        with torch.device("meta"):
            net = instantiate(config(*fixed, f"{group}={row}").net)
        total += 3 * count_macs(net, (3, 224, 224)) * 1_281_167 * content.cost.epochs
    assert content.cost.multiply_adds == pytest.approx(total, rel=0.01)


def test_every_experiment_file_is_read() -> None:
    found = {file.stem: load_paper(file) for file in (ROOT / "experiments").glob("*.yaml")}
    assert {"speed", "table4", "table6", "table7"} <= found.keys()
    deploy_params = {f"repvgg_{name}": variant.deploy_params for name, variant in VARIANTS.items()}
    for name, row in found["table4"].models.items():
        assert row["params_deploy"] == deploy_params[name]


def test_the_data_says_classes_and_stem() -> None:
    with torch.device("meta"):
        net = instantiate(config("data=digits", "model=repvgg_a0", "data.stem_stride=1").net)
    stem = net.stem
    assert isinstance(stem, Block)
    assert stem.shape.stride == 1
    assert net.head.out_features == 10


@pytest.mark.parametrize("data", options("data"))
def test_every_data_config_builds_its_module(data: str) -> None:
    cfg = config(f"data={data}", *(["data.num_classes=3"] if data == "folder" else []))
    datamodule = instantiate(cfg.datamodule, batch_size=8)
    assert isinstance(datamodule, pl.LightningDataModule)
    assert Path(cfg.data.train_file).is_absolute()


@pytest.mark.parametrize("trainer", options("trainer"))
def test_every_trainer_builds(trainer: str) -> None:
    cfg = config(f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.benchmark=null")
    made = instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    assert made.world_size == 2
    assert made.max_epochs == 120


@pytest.mark.parametrize("logger", options("logger"))
def test_every_logger_builds(logger: str, tmp_path: Path) -> None:
    made = instantiate(config(f"logger={logger}", f"output_dir={tmp_path}").logger)
    assert len(made) == (1 if logger == "csv" else 2)


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_makes_its_optimiser(recipe: str) -> None:
    make = instantiate(config(f"recipe={recipe}").recipe.optimizer)
    assert isinstance(make([torch.nn.Parameter(torch.zeros(1))], lr=0.1), torch.optim.Optimizer)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's
@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_builds_its_module_data_and_callbacks(recipe: str) -> None:
    cfg = config(f"recipe={recipe}")
    with torch.device("meta"):
        module = instantiate(cfg.module)
    assert isinstance(module, pl.LightningModule)
    assert isinstance(instantiate(cfg.datamodule, batch_size=8), pl.LightningDataModule)
    callbacks = instantiate(cfg.callbacks)
    # before the next batch is looked at; and averaged weights are swapped in before the others look
    assert list(callbacks)[:3] == ["interruption", "ema", "resize"]
    assert all(c is None or isinstance(c, pl.Callback) for c in callbacks.values())


def test_an_evaluation_takes_the_device_that_is_there() -> None:
    assert config(root="evaluate").trainer.accelerator == "auto"
    assert config("trainer=cpu", root="evaluate").trainer.accelerator == "cpu"
    assert config().trainer.accelerator == "gpu"


def test_recipes_keep_to_their_sources() -> None:
    old = config("recipe=paper_200")
    assert (old.recipe.epochs, old.recipe.warmup_epochs, old.recipe.label_smoothing) == (200, 5, 0.1)
    assert (old.recipe.mixup, old.recipe.batch_size, old.recipe.lr, old.recipe.weight_decay) == (0.2, 256, 0.1, 1e-4)
    policy = instantiate(old.recipe.rand_augment)
    assert (policy.operations, policy.magnitude, policy.std, policy.probability) == (2, 7, 0.5, 0.5)
    fast = config("recipe=fast")
    assert (fast.compile, fast.trainer.precision, fast.trainer.max_epochs) == (True, "bf16-mixed", 32)
    for recipe in options("recipe"):  # what the authors' older script had is never a default
        node = config(f"recipe={recipe}").recipe
        assert (node.decay_identity_gamma, node.bias_lr_factor, node.custom_l2) == (False, 1, False), recipe


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_int8_is_one_option_for_training_and_evaluation(backend: str) -> None:
    assert instantiate(config().quantizer) is None
    assert instantiate(config().callbacks.int8) is None
    for root in ("train", "evaluate"):
        cfg = config(f"int8={backend}", "quantizer.images=64", root=root)
        made = instantiate(cfg.quantizer)
        assert (made.backend, made.images, made.method, made.per_channel) == (backend, 64, "minmax", True)
        assert made.file == Path(cfg.data.train_file)
    callback = instantiate(config(f"int8={backend}").callbacks.int8)
    assert callback.quantizer.backend == backend


def test_callbacks_build() -> None:
    made = instantiate(config().callbacks)
    assert made.two_forms.throughput.batch == 128
    assert made.two_forms.throughput.resolution == 224


def test_logged_config_is_plain_nested_and_without_repetition() -> None:
    choices = {"model": "repvgg_b0", "ablation": "id", "data": "imagenet", "recipe": "paper_120"}
    logged = logged_config(config("ablation=id"), choices)
    assert logged["choices"] == choices
    assert logged["net"]["depths"] == [4, 6, 16, 1]
    assert logged["recipe"]["optimizer"]["momentum"] == 0.9
    assert logged["bench"]["batch"] == 128
    assert logged["callbacks"]["ema"] is None
    assert not {"module", "datamodule", "logger"} & logged.keys()
    assert OmegaConf.create(logged) is not None  # plain types only


def test_the_files_say_how_many_classes_there_are(tmp_path: Path) -> None:
    from repvgg.data.manifest import Manifest, manifest_path, number_of_classes

    files = {"train": tmp_path / "train.beton", "val": tmp_path / "val.beton"}
    for file, classes in zip(files.values(), (["a", "b"], ["a", "b", "c"]), strict=True):
        Manifest(1, classes, [1], {}, "", {}, "").write(manifest_path(file))
    with pytest.raises(ValueError, match="different numbers of classes"):
        number_of_classes(files, None)
    with pytest.raises(ValueError, match=r"val\.beton has 3 classes, data\.num_classes=2"):
        number_of_classes(files, 2)
    assert number_of_classes({"val": files["val"]}, None) == 3


def test_run_names_are_short_and_tell_apart() -> None:
    assert run_name({"model": "repvgg_b0", "ablation": "id", "data": "imagenet"}, 1) == "B0-id-s1"
    assert run_name({"model": "repvgg_b1g4", "ablation": "1x1", "data": "digits"}, 0) == "B1g4-1x1-digits-s0"
