"""What a wrong command is answered with, in this process; `tests/e2e` types some of them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from repvgg import cli, command
from repvgg.cli import ROOT, clear_errors, prepare_environment
from repvgg.command import CheckInputs, answering, require_keywords
from repvgg.identity import claim, with_drawn_seed

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
DIGITS = ("data=digits", "model=repvgg_a0", "trainer=cpu", "recipe=quick", "logger=csv")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv("MULTIRUN_DIR", raising=False)
    prepare_environment()
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    cli._new_folder.clear()


def run(root: str, *overrides: str) -> DictConfig:
    """As Hydra's main does before a single run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(root, list(overrides), return_hydra_config=True)
    CheckInputs().on_run_start(config)
    return config


def answer(capsys: pytest.CaptureFixture[str], root: str, *overrides: str) -> str:
    """What is printed for a command that is refused."""
    with pytest.raises(SystemExit) as stopped, answering(root, overrides):
        run(root, *overrides)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("root", "typed", "says"),
    [
        ("train", "lr=1", "nothing reads lr. Did you mean recipe.lr? Keys of recipe: epochs, "),
        ("train", "+lr=1", "nothing reads lr. Did you mean recipe.lr? Keys of recipe: epochs, "),
        ("train", "module.lr=1", "nothing reads module.lr. Did you mean recipe.lr?"),
        ("train", "modle=repvgg_b1", "nothing reads modle. Did you mean model?"),
        ("plan", "+modle=repvgg_b1", "nothing reads modle. Did you mean model?"),
        ("train", "model.width_a=1", "model is chosen with model=…, its values are set with net.width_a=…"),
        ("export", "imges=3", "nothing reads imges. Did you mean images?"),
        ("report", "targt=page", "nothing reads targt. Did you mean target?"),
        ("train", "logger=null", "logger=null: choose csv, wandb, wandb_offline"),
        ("train", "+recipe=5", "+recipe=5: choose fast, finetune, paper_120"),
        ("train", "~logger", "logger is missing: choose logger=OPTION"),
        ("train", "~model", "net.depths is missing"),
        ("train", "data.dir=${nowhere}", "data.dir: Interpolation key 'nowhere' not found"),
        ("train", "hydra.run.dir=${nowhere}", "hydra.run.dir: Interpolation key 'nowhere' not found"),
        ("evaluate", "forms=deply", "forms=deply: choose both, train, deploy or null"),
        ("write_dataset", "on_bad=ignore", "on_bad=ignore: choose stop or skip"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line(
    root: str, typed: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(capsys, root, typed)
    assert said.startswith(says)
    assert len(said.splitlines()) == 1 or typed == "~model"


def test_what_something_reads_is_accepted() -> None:
    typed = [
        *("+trainer.deterministic=true", "+recipe.optimizer.dampening=0.1", "++data.train_transform.flip=true"),
        *("+callbacks.mine={_target_:mine.Callback}", "+logger.mine={_target_:mine.Logger}", "~callbacks.perf"),
        *("callbacks.two_forms=null", "hydra.job_logging.root.level=INFO", "+hydra.job.env_set.A=1"),
        *("+experiment=table6", "trainer.limit_train_batches=0.5", "data.num_classes=null"),
    ]
    with answering("train", typed):
        run("train", *typed)


def test_a_key_of_ones_own_file_is_read_where_another_refers_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    own = "defaults: [digits]\nfold: 3\nspare: 1\ndir: /data/fold${data.fold}\n"
    (tmp_path / "data" / "mine.yaml").write_text(own)
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert answer(capsys, "train", search, "data=mine").startswith("nothing reads data.spare.")
    (tmp_path / "data" / "mine.yaml").write_text(own.replace("spare: 1\n", ""))
    with answering("train", []):
        assert run("train", search, "data=mine", "data.fold=4").data.dir == "/data/fold4"


def test_several_mistakes_are_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "train", "recipe.epochs=abc", "seed=-1")
    assert [line.partition("=")[0] for line in said.splitlines()] == ["seed", "recipe.epochs"]  # and not max_epochs


def test_hydras_own_errors_are_shown_as_before_once_the_config_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering("train", []):
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
        run("train")
        assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HydraException), answering("train", []):
        run("train", "lr=1")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


# --- the keywords of what is instantiated -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("+trainer.gpus=1", "trainer.gpus: pytorch_lightning.Trainer takes no gpus. Did you mean trainer.devices?"),
        ("+recipe.optimizer.momentun=.8", "takes no momentun. Did you mean recipe.optimizer.momentum?"),
        ("recipe.optimizer._target_=torch.optim.AdamW", "~recipe.optimizer.momentum ~recipe.optimizer.nesterov"),
        (
            "callbacks.health._target_=repvgg.learn.health.Helth",
            "callbacks.health._target_=repvgg.learn.health.Helth: ",
        ),
        ("+block.branches=[{_target_: repvgg.model.ConvBN, kernel: 3}]", "block.branches[0].kernel"),
    ],
)
def test_a_keyword_that_a_target_does_not_take_is_named(typed: str, says: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*DIGITS, typed.replace("+block", "block")])
    with pytest.raises(ValueError, match=re.escape(says)):
        require_keywords(cfg)


def test_what_the_configs_instantiate_takes_their_keywords() -> None:
    for root in ("train", "evaluate", "write_dataset"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(root, ["trainer=ddp", "recipe=paper_200"] if root != "write_dataset" else [])
        require_keywords(cfg)


# --- a sweep ----------------------------------------------------------------------------------------------------------


def checked(*overrides: str, check: command.Check | None = None, sweeper: str = BASIC) -> DictConfig:
    """A sweep's config, as Hydra composes it and the sweeper gets it."""
    GlobalHydra.instance().clear()
    initialize_config_dir(str(ROOT / "conf"), version_base="1.3")  # until the test ends
    loader = GlobalHydra.instance().config_loader()
    config = loader.load_configuration("train", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False)
    with read_write(config), open_dict(config):
        config.hydra.sweeper._target_ = sweeper
    with answering("train", overrides, check):
        CheckInputs().on_multirun_start(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=0,1,abc"], ["seed=abc must be a whole number", "in the sweep's job 2: "]),
        (["seed=0,1", "recipe.lr=0.1,0"], ["recipe.lr=0 must be a number above 0", "job 1"]),
        (["lr=1,2"], ["nothing reads lr. Did you mean recipe.lr?"]),
        (["ablation=full,fulll"], ["fulll"]),
        (["seed=0,1", "+trainer.gpus=1"], ["trainer.gpus: pytorch_lightning.Trainer takes no gpus"]),
    ],
)
def test_a_sweep_is_refused_before_its_first_job(
    overrides: list[str], says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        checked(*DIGITS, *overrides)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    for words in says:
        assert words in said
    assert not list(tmp_path.iterdir())


def test_a_fault_of_all_jobs_is_said_once_and_of_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    def check(cfg: DictConfig) -> None:
        raise ValueError(f"no files for {cfg.net.width_a}")

    with pytest.raises(SystemExit):
        checked("ablation=plain,id,1x1,full", check=check)
    assert capsys.readouterr().err == "error: no files for 1\n"


def test_a_clusters_jobs_look_for_their_files_themselves() -> None:
    def check(cfg: DictConfig) -> None:
        raise ValueError("no files here")

    checked("seed=1,2", "hydra/launcher=submitit_slurm", check=check)


def test_of_a_search_every_value_and_bound_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    checked(*DIGITS, "recipe.lr=interval(0.01,0.1)", "seed=1,2", sweeper=OPTUNA)
    for bad in ("recipe.lr=interval(0,0.1)", "recipe.batch_size=choice(64,63.5)", "recipe.mixup=range(-1,1)"):
        with pytest.raises(SystemExit):
            checked(*DIGITS, bad, sweeper=OPTUNA)
        assert f"error: {bad.partition('=')[0]}=" in capsys.readouterr().err


def folder(config: DictConfig, number: int, *overrides: str) -> str:
    """As a launcher does."""
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
    HydraConfig.instance().set_config(job)
    return str(job.hydra.sweep.subdir)


def test_a_jobs_folder_says_what_varies_and_is_never_too_long() -> None:
    fixed = [*DIGITS, "net.width_a=0.25", "+trainer.enable_progress_bar=false"]
    config = checked(*fixed, "seed=1,2", "ablation=id,id")
    assert folder(config, 3, *fixed, "seed=2", "ablation=id") == "3_ablation=id,seed=2"
    assert folder(checked(*fixed), 0, *fixed) == "0"
    long = [f"run.tags=[{'x' * 200}],[{'x' * 200}y]", "run.group='a/b c','d'"]
    config = checked(*fixed, *long)
    names = {folder(config, 0, *fixed, f"run.tags=[{'x' * 200}{end}]", "run.group='a/b c'") for end in ("", "y")}
    assert len(names) == 2
    assert {len(name) for name in names} == {80}
    assert not any("/" in name or "'" in name for name in names)


# --- what is left -----------------------------------------------------------------------------------------------------


def refuse() -> None:
    with pytest.raises(SystemExit), clear_errors():
        raise ValueError("wrong")


def test_a_refused_run_leaves_nothing_that_it_made(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    for before in (False, True):
        run_dir = outputs / "mine"
        if before:
            (outputs / "other").mkdir(parents=True)
        cli.folder_to_be(run_dir)
        (run_dir / ".hydra").mkdir(parents=True)
        claim(run_dir, {}, [], begun=False)
        refuse()
        assert not run_dir.exists()
        assert outputs.exists() is before


def test_what_was_trained_stays(tmp_path: Path) -> None:
    """An error of the data, say, has the exit code of a wrong input whenever it comes."""

    class DamagedError(ValueError):
        exit_code = 2

    for name, setting_up in (("begun", False), ("saved", True)):
        cli.folder_to_be(tmp_path / name)
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if name == "saved":
            (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        with pytest.raises(SystemExit) as stopped, clear_errors(lambda up=setting_up: up):
            raise DamagedError("record 700")
        assert stopped.value.code == 2
        assert (tmp_path / name / "checkpoints").exists()


def test_a_folder_that_was_there_or_is_anothers_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    cli.folder_to_be(tmp_path / "there")
    refuse()
    assert (tmp_path / "there").exists()
    cli.folder_to_be(tmp_path / "taken")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / ".lock").write_text("process 1 on another host\n")
    refuse()
    assert (tmp_path / "taken").exists()
    monkeypatch.setenv("MULTIRUN_DIR", str(tmp_path))  # of a sweep that goes on, the log says why
    cli.folder_to_be(tmp_path / "job")
    (tmp_path / "job").mkdir()
    refuse()
    assert (tmp_path / "job").exists()


def test_a_drawn_seed_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = with_drawn_seed(["model=repvgg_a0", "seed=null"])
    assert drawn[0] == "model=repvgg_a0"
    assert re.fullmatch(r"seed=\d+", drawn[1])
    assert with_drawn_seed(["seed=null"]) != with_drawn_seed(["seed=null"])
    assert with_drawn_seed(["-m", "seed=null"]) == ["-m", "seed=null"]
    monkeypatch.setenv("RANK", "1")
    assert with_drawn_seed(["seed=null"]) == ["seed=null"]
