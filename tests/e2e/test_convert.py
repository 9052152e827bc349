"""`python src/convert.py` as a user types it."""

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors import safe_open
from torch import Tensor, nn

from repvgg import checkpoints
from repvgg.model import ConvBN, RepVGG, read_weights, to_deploy
from support import official
from support.commands import ROOT, environment, wait_until
from support.networks import ABLATIONS, randomize

SMALL = ["model=repvgg_a0", "net.depths=[1,2,2,1]", "net.width_a=0.25", "net.width_b=0.125"]
COMMAND = [sys.executable, "src/convert.py"]

Convert = Callable[..., SimpleNamespace]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """The command, in this process: torch is here already."""
    monkeypatch.setenv("PROJECT_ROOT", str(ROOT))

    def call(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["src/convert.py", *arguments])
        code, on_term = 0, signal.getsignal(signal.SIGTERM)
        try:
            runpy.run_path(str(ROOT / "src" / "convert.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        signal.signal(signal.SIGTERM, on_term)
        GlobalHydra.instance().clear()
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def trained(**options) -> nn.Module:
    torch.manual_seed(3)
    return randomize(RepVGG((1, 2, 2, 1), 0.25, 0.125, ABLATIONS["full"], num_classes=7, **options)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both forms as the authors would have written them, and of ours."""
    directory = tmp_path_factory.mktemp("files")
    reference = official.RepVGG((1, 2, 2, 1), 0.25, 0.125, num_classes=7)
    torch.manual_seed(3)
    torch.save(randomize(reference).state_dict(), directory / "train.pth")
    deploy = official.RepVGG((1, 2, 2, 1), 0.25, 0.125, num_classes=7, deploy=True)
    torch.save(deploy.state_dict(), directory / "deploy.pth")
    torch.save({f"net.{key}": tensor for key, tensor in trained().state_dict().items()}, directory / "ours.ckpt")
    return {file.name: file for file in directory.iterdir()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_the_authors_train_form_becomes_a_deploy_form_of_ours(run: Convert, files: dict, tmp_path: Path) -> None:
    out = tmp_path / "0_ablation=full" / "deploy.safetensors"
    out.parent.mkdir()
    source = files["train.pth"]
    done = run(f"ckpt={source}", f"out={out}", "form=deploy", *SMALL)
    assert done.code == 0, done.err
    assert "Found by names and shapes of the tensors: ablation=full" in done.out
    assert "deploy form, ours naming, model=repvgg_a0 ablation=full, 7 classes" in done.out
    said = metadata_of(out)
    assert said["source"] == "train.pth"
    assert said["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert {"form": "deploy", "naming": "ours", "model": "repvgg_a0", "ablation": "full"}.items() <= said.items()
    assert {"num_classes": "7", "fold_dtype": "float64", "torch": torch.__version__}.items() <= said.items()
    for dtype, bound in (("float64", 1e-6), ("float32", 1e-4)):
        found = json.loads(said[f"equivalence_{dtype}"])
        assert 0 < found["rel_l2"] < bound
        assert found["top1_agreement"] == 1
        assert (found["dtype"], found["images"], found["pixels"]) == (dtype, 4, 64)
    net = to_deploy(RepVGG((1, 2, 2, 1), 0.25, 0.125, ABLATIONS["full"], num_classes=7))
    net.load_state_dict(safetensors.torch.load_file(out), strict=True)
    reference = official.RepVGG((1, 2, 2, 1), 0.25, 0.125, num_classes=7)
    reference.load_state_dict(torch.load(source, weights_only=True))
    torch.testing.assert_close(logits(net), logits(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("naming", ["official", "timm", "mmpretrain"])
def test_ours_goes_to_every_naming_and_comes_back_the_same(
    run: Convert, files: dict, tmp_path: Path, naming: str
) -> None:
    there, back = tmp_path / "there.pth", tmp_path / "back.safetensors"
    assert run(f"ckpt={files['ours.ckpt']}", f"out={there}", f"naming={naming}", *SMALL).code == 0
    content = torch.load(there, weights_only=True)
    assert content["state_dict"].keys() == official.renamed(torch.load(files["train.pth"]), naming).keys()
    assert content["metadata"]["naming"] == naming
    done = run(f"ckpt={there}", f"out={back}")  # the file says what it is
    assert done.code == 0, done.err
    assert "As the file says: model=repvgg_a0 ablation=full net.depths=[1, 2, 2, 1]" in done.out
    state, original = safetensors.torch.load_file(back), trained().state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[key], original[key]) for key in state)


def test_the_same_input_gives_the_same_bytes(run: Convert, files: dict, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pt"):
        outs = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]
        for out in outs:
            assert run(f"ckpt={files['train.pth']}", f"out={out}", "form=deploy", *SMALL).code == 0
        assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_deploy_form_keeps_what_was_said_of_its_forms(run: Convert, files: dict, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    run(f"ckpt={files['train.pth']}", f"out={one}", "form=deploy", "fold_dtype=float32", "ablation=full", *SMALL)
    done = run(f"ckpt={one}", f"out={other}", "naming=official")
    assert done.code == 0, done.err
    kept = ("equivalence_float64", "equivalence_float32", "fold_dtype", "ablation")
    assert [metadata_of(one)[key] for key in kept] == [metadata_of(other)[key] for key in kept]
    assert metadata_of(other)["fold_dtype"] == "float32"
    unknown = run(f"ckpt={files['deploy.pth']}", f"out={tmp_path / 'third.pth'}", *SMALL)
    assert "(a deploy form does not say its ablation)" in unknown.out
    said = torch.load(tmp_path / "third.pth", weights_only=True)["metadata"]
    assert not {"ablation", *kept[:3]} & said.keys()


def test_without_out_a_file_is_shown_and_nothing_written(run: Convert, files: dict, tmp_path: Path) -> None:
    before = set(files["train.pth"].parent.iterdir())
    done = run(f"ckpt={files['train.pth']}", *SMALL)
    assert done.code == 0
    for words in (
        "train form, official naming, 7 classes",
        "model=repvgg_a0 ablation=full",
        "1+1+2+2+1 layers of 16, 16, 32, 64, 64 channels; branches 3x3 1x1 identity",
        hashlib.sha256(files["train.pth"].read_bytes()).hexdigest(),
        f"deployed {sum(p.numel() for p in to_deploy(trained()).parameters()):,}",
        "it is whole",
        f"python src/convert.py ckpt={files['train.pth']} out=FILE.safetensors form=train naming=ours",
    ):
        assert words in done.out
    assert set(files["train.pth"].parent.iterdir()) == before
    out = tmp_path / "out.safetensors"
    run(f"ckpt={files['train.pth']}", f"out={out}", *SMALL)
    assert "says source_sha256" in run(f"ckpt={out}").out


def damaged(path: Path, value: float) -> Path:
    state = trained().state_dict()
    state["stages.1.0.branches.0.bn.running_var"][3] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "1 values that are not finite"), (-1.0, "negative variances")]
)
def test_damage_is_named_and_not_converted_unless_asked(run: Convert, value: float, says: str, tmp_path: Path) -> None:
    path, out = damaged(tmp_path / "nan.pth", value), tmp_path / "out.pth"
    for more in ([], [f"out={out}", "form=deploy"]):
        done = run(f"ckpt={path}", *more, *SMALL)
        assert done.code == 2
        assert f"is damaged: stages.1.0.branches.3x3.bn.running_var has {says}" in done.err
        assert not out.exists()
    done = run(f"ckpt={path}", f"out={out}", "form=deploy", "check=false", *SMALL)
    assert done.code == 0, done.err
    assert "equivalence_float64" not in torch.load(out, weights_only=True)["metadata"]


def test_forms_that_differ_are_not_written(run: Convert, files: dict, tmp_path: Path, monkeypatch) -> None:
    """With a branch whose map is not what it computes."""
    right, more = ConvBN.affine, torch.tensor(1.01, dtype=torch.float64)
    monkeypatch.setattr(ConvBN, "affine", lambda self, *args: right(self, *args).scaled(more, 0 * more))
    done = run(f"ckpt={files['train.pth']}", f"out={tmp_path / 'out.pth'}", "form=deploy", *SMALL)
    assert done.code == 2
    assert "the two forms differ by" in done.err
    assert "check=false" in done.err
    assert not list(tmp_path.iterdir())


WRONG = {
    "no ckpt": ([], ["ckpt=PATH is missing", "ckpt=RUN/checkpoints/best.ckpt"]),
    "none there": (["ckpt=/none.pth"], ["ckpt=/none.pth: there is no such file"]),
    "form": (["ckpt={train}", "form=deployed"], ["form=deployed: choose train, deploy or null"]),
    "naming": (["ckpt={train}", "naming=keras"], ["naming=keras: choose ours, official, timm, mmpretrain"]),
    "fold": (["ckpt={train}", "fold_dtype=float16"], ["fold_dtype=float16: choose float64 or float32"]),
    "switch": (["ckpt={train}", "overwrite=maybe"], ["overwrite=maybe: choose true or false"]),
    "of training": (["ckpt={train}", "recipe.lr=1"], ["recipe.lr=1: a conversion reads only model, ablation"]),
    "suffix": (["ckpt={train}", "out=x.onnx"], ["x.onnx ends in .onnx: name a .safetensors, .pth or .pt"]),
    "ckpt suffix": (["ckpt={train}", "out=x"], ["x has no suffix"]),
    "directory": (["ckpt={train}", "out=src"], ["out=src is a directory", "out=src/train-deploy.safetensors"]),
    "parent": (["ckpt={train}", "out=/none/x.pth"], ["there is no directory /none"]),
    "itself": (["ckpt={train}", "out={train}", "overwrite=true"], ["is ckpt itself"]),
    "there": (["ckpt={train}", "out={deploy}"], ["is there already", "overwrite=true"]),
    "to train": (["ckpt={deploy}", "form=train"], ["cannot be recovered", "form=deploy takes this one"]),
    "no variant": (["ckpt={train}"], ["does not fit the model", "the nearest, model=repvgg_a0", "net.width_a=0.5"]),
    "other variant": (["ckpt={train}", "model=repvgg_b0"], ["does not fit the model", "the nearest, model=repvgg_b0"]),
    "classes": (["ckpt={train}", "net.num_classes=5", *SMALL], ["classifier of 7 classes, the model one of 5"]),
    "text": (["ckpt=README.md"], ["README.md cannot be read as tensors alone"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_input_gets_one_clear_error(run: Convert, files: dict, wrong: str) -> None:
    arguments, says = WRONG[wrong]
    typed = [a.format(train=files["train.pth"], deploy=files["deploy.pth"]) for a in arguments]
    before = {file: file.read_bytes() for file in files.values()}
    done = run(*typed)
    assert done.code == 2
    assert done.err.count("error:") == 1
    for words in says:
        assert words in done.err
    assert {file: file.read_bytes() for file in files.values()} == before


def test_a_design_without_names_is_named(run: Convert, tmp_path: Path) -> None:
    net = checkpoints._made(checkpoints._config("repvgg_a0", "acb", SMALL[1:]).net, "train", with_values=True)
    torch.save(randomize(net).state_dict(), tmp_path / "acb.pth")
    out = tmp_path / "out.pth"
    done = run(f"ckpt={tmp_path / 'acb.pth'}", f"out={out}", "naming=official", *SMALL)
    assert done.code == 2
    assert "official has no names for" in done.err
    assert "stem.branches.1x3.conv.weight" in done.err
    assert not out.exists()
    assert run(f"ckpt={tmp_path / 'acb.pth'}", f"out={out}", "naming=official", "form=deploy", *SMALL).code == 0
    assert read_weights(out).naming == "official"


def test_an_existing_file_is_replaced_when_asked(run: Convert, files: dict, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")
    assert run(f"ckpt={files['train.pth']}", f"out={out}", *SMALL).code == 2
    assert out.read_bytes() == b"old"
    assert run(f"ckpt={files['train.pth']}", f"out={out}", "overwrite=true", *SMALL).code == 0
    assert read_weights(out).form == "train"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_it_writes_it_leaves_nothing(files: dict, tmp_path: Path, number: int, code: int) -> None:
    """The process is stopped at the moment when the new file is whole, but has not got its name."""
    place = tmp_path / "place"
    place.mkdir()
    script = (
        "import runpy, sys, time; from pathlib import Path; sys.path.insert(0, 'src')\n"
        "import repvgg.model.tensorfile as files\n"
        "def slow(path):\n"
        f"    Path({str(tmp_path / 'begun')!r}).touch()\n"
        "    time.sleep(60)\n"
        "same, files._same = files._same, lambda one, other: slow(one)\n"
        "sys.argv[0] = 'src/convert.py'; runpy.run_path('src/convert.py', run_name='__main__')\n"
    )
    arguments = [f"ckpt={files['train.pth']}", f"out={place / 'out.safetensors'}", "check=false", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: (tmp_path / "begun").exists() or process.poll() is not None, "the file", 120)
        assert process.poll() is None, process.communicate()[1]
        assert len(list(place.iterdir())) == 1
        os.kill(process.pid, number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code
    assert not list(place.iterdir())
    if number == signal.SIGINT:
        assert error.splitlines()[-1] == "stopped: a file is written whole or not at all; the same command begins anew"
        assert "Traceback" not in error


def test_help_and_sweeps() -> None:
    """Help imports nothing heavy, and a sweep is refused before anything is."""
    code = (
        "import sys, runpy; sys.argv = ['src/convert.py', '--help']; sys.path.insert(0, 'src')\n"
        "try: runpy.run_path('src/convert.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'ffcv', 'pandas', 'safetensors', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("out=B0.safetensors form=deploy", "naming=ours|official|timm|mmpretrain", "overwrite=true"):
        assert words in done.stdout
    sweep = subprocess.run([*COMMAND, "-m", "form=train,deploy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert sweep.returncode == 2
    assert sweep.stderr == "error: -m: a conversion writes one file; call it once for each\n"


# --- what other commands make of it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # eight commands, and perhaps a busy machine
def test_training_begins_with_converted_files_and_evaluation_reads_them(
    files: dict, digits: Path, tmp_path: Path
) -> None:
    """A foreign file to ours and finetuned on other classes; then ours to a foreign one, evaluated and begun with."""

    def python(script: str, *arguments: str) -> str:
        command = [sys.executable, f"src/{script}.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    data = ["data=digits", f"data.dir={digits}", "trainer=cpu", "logger=csv"]
    quick = ["bench.warmup=1", "bench.batches=1", "bench.batch=8", "trainer.limit_train_batches=1"]
    finetune = ["recipe=finetune", "trainer.max_epochs=1", "recipe.warmup_epochs=0", "recipe.lr=1.0e-9", *quick]
    there = tmp_path / "there.safetensors"
    python("convert", f"ckpt={files['train.pth']}", f"out={there}", *SMALL)
    said = python("train", f"init_from={there}", *finetune, *data, *SMALL, f"hydra.run.dir={tmp_path / 'one'}")
    assert "the classifier is fresh, since the file's has 7 classes, not 10" in said
    best = tmp_path / "one" / "checkpoints" / "best.ckpt"
    begun = torch.load(best, weights_only=True)["state_dict"]
    given = torch.load(files["train.pth"], weights_only=True)["stage2.1.rbr_dense.conv.weight"]
    torch.testing.assert_close(begun["net.stages.1.1.branches.0.conv.weight"], given, rtol=1e-4, atol=1e-6)

    back = tmp_path / "back.safetensors"
    assert "Of the checkpoint's run: model=repvgg_a0" in python("convert", f"ckpt={best}", f"out={back}", "naming=timm")
    assert metadata_of(back)["data"] == "digits"
    said = python("train", f"init_from={back}", *finetune, *data, *SMALL, f"hydra.run.dir={tmp_path / 'two'}")
    assert "(timm naming), its classifier of 10 classes too" in said
    deploy = tmp_path / "deploy.safetensors"
    python("convert", f"ckpt={back}", f"out={deploy}", "form=deploy", "naming=mmpretrain")
    scores = []
    for file in (best, back, deploy):  # the file alone says network and data
        place = tmp_path / f"eval-{file.stem}"
        python("evaluate", f"ckpt={file}", f"data.dir={digits}", "trainer=cpu", f"hydra.run.dir={place}")
        scores.append(json.loads((place / "result.json").read_text())["metrics"])
    assert scores[0] == scores[1]
    assert scores[2]["eval/deploy/top1"] == scores[0]["eval/deploy/top1"]
