"""`python src/report.py` as a user types it."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg.cli import ROOT, interruptible, quote_paths
from repvgg.report.record import write_record


def report(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "src" / "report.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def leave(directory: Path, ablation: str, seed: int, top1: float, status: str = "finished") -> None:
    """What a run leaves."""
    directory.mkdir(parents=True)
    choices = {"model": "repvgg_b0", "ablation": ablation, "data": "digits", "recipe": "quick"}
    write_record(
        directory,
        status=status,  # type: ignore[arg-type]
        config={"choices": choices, "seed": seed},
        metrics={"test/top1": top1, "test/deploy/top1": top1},
        objective=top1,
        error=None,
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep's directory, with what Hydra's grammar has a meaning for in its name."""
    sweep = tmp_path / "sweep,lr=0.1"
    for seed, top1 in ((1, 0.75), (2, 0.76)):
        leave(sweep / f"{seed}_ablation=full,seed={seed}", "full", seed, top1)
        leave(sweep / f"{2 + seed}_ablation=id,seed={seed}", "id", seed, top1 - 0.01 * seed)
    leave(sweep / "5_ablation=plain", "plain", 1, 0.1, status="interrupted")
    return sweep


def test_a_directory_becomes_a_page_in_it(sweep: Path, tmp_path: Path) -> None:
    done = report(f"runs={sweep}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{sweep}/report/report.md", f"{sweep}/report/report.html"]
    text = (sweep / "report" / "report.md").read_text()
    assert "| id | 2 | 74.00 ± 0.00 | 74.00 ± 0.00 | -1.50 |" in text
    assert "| `5_ablation=plain` | interrupted |" in text
    before = {p: p.read_bytes() for p in (sweep / "report").rglob("*") if p.is_file()}
    leave(tmp_path / "more" / "6_ablation=id,seed=3", "id", 3, 0.7)
    done = report(f"runs=[{sweep},{tmp_path}/more]", f"out={tmp_path}/page", "reference=id", "title=Mine")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "page"
    assert (out / "report.md").read_text().startswith("# Mine\n")
    assert sum(r["group"] == "id" for r in csv.DictReader((out / "data.csv").read_text().splitlines())) == 3
    assert report(f"runs={sweep}").returncode == 0
    assert {p: p.read_bytes() for p in (sweep / "report").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "runs=PLACE is missing: where the runs are, as in\n  python src/report.py runs=multirun"),
        (["runs=nowhere"], "runs=nowhere: there is no directory"),
        (["runs=conf"], "runs: there is no run in it."),
        (
            ["runs={sweep}", "reference=identity"],
            "reference=identity: no finished run is of it. There are ablation full,",
        ),
        (["runs={sweep}", "paper=table5"], "paper=table5: experiments/ has table4, table6, table7"),
        (["runs={sweep}", "target=pdf"], "target=pdf: choose page or wandb"),
        (["runs={sweep}", "entity=me"], "entity=me is of target=wandb"),
        (["runs={sweep}", "out=conf"], "out=conf holds other files ("),
        (["title=a=b"], "mismatched input '='"),
        (["run=x"], "error: nothing reads run. Did you mean runs?"),
    ],
)
def test_a_wrong_command_is_one_clear_error(sweep: Path, arguments: list[str], says: str) -> None:
    done = report(*(argument.format(sweep=sweep) for argument in arguments))
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert not (sweep / "report").exists()


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, interruptible("the same command makes the report anew"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped: the same command makes the report anew\n"


def test_help_has_examples_and_needs_nothing_heavy() -> None:
    done = report("--help")
    assert done.returncode == 0
    assert "python src/report.py runs=multirun" in done.stdout
    code = (
        "import sys; sys.path.insert(0, 'src'); sys.argv = ['report.py', '--help']\n"
        "import report\n"
        "import repvgg.report.page, repvgg.report.compare, repvgg.report.runs\n"
        "heavy = {'pandas', 'matplotlib', 'scipy', 'wandb', 'torch', 'numpy', 'markdown_it'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_paths_in_a_list_need_no_quotes(tmp_path: Path) -> None:
    a, b = tmp_path / "a=1,b=2", tmp_path / "plain"
    a.mkdir()
    b.mkdir()
    assert quote_paths([f"runs=[{a},{b}]"], ["runs"]) == [f"runs=['{a}',{b}]"]
    assert quote_paths([f"runs={a}"], ["runs"]) == [f"runs='{a}'"]
    for unchanged in ("runs=[x=1,y]", "runs=[]", "runs=wandb:me/p/2026-01-01/10-00-00", f"runs=['{a}']", f"x=[{a}]"):
        assert quote_paths([unchanged], ["runs"]) == [unchanged]


OWN_BRANCH = """
from __future__ import annotations
import torch
from torch import Tensor, nn
from repvgg.model import Affine, Branch, ConvShape, identity_map
"""
OWN_ABLATION = """# @package block
norm: false
branches:
  - {_target_: repvgg.model.ConvBN, kernel_size: 3, _partial_: true}
  - {_target_: own_branch.Scaled.where_it_fits, _partial_: true}
"""


@pytest.mark.slow
def test_a_design_of_ones_own_trains_converts_and_is_on_the_page(digits: Path, tmp_path: Path) -> None:
    """CONTRIBUTING's class and one YAML file, neither of them in the repository, beside the full block."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "own_branch.py").write_text(OWN_BRANCH + example)
    (tmp_path / "conf" / "ablation").mkdir(parents=True)
    (tmp_path / "conf" / "ablation" / "own.yaml").write_text(OWN_ABLATION)
    overrides = [
        *("model=repvgg_a0", "net.width_a=0.25", "net.width_b=0.25", "data=digits", f"data.dir={digits}"),
        *("trainer=cpu", "recipe=quick", "trainer.max_epochs=1", "bench.batch=8", "bench.warmup=1", "bench.batches=2"),
        *("logger=wandb_offline", "ablation=own,full", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep"),
        f"hydra.searchpath=[file://{tmp_path}/conf]",
    ]
    done = subprocess.run(
        [sys.executable, "src/train.py", "-m", *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = report(f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert "2 groups by ablation, 4 finished runs, seeds 1, 2" in text
    drawn = {p.stem for p in (tmp_path / "report" / "pictures").iterdir()}
    assert drawn == {"top1", "speed", "curves", "losses", "branches"}
    assert "ablation=full,own seed=1,2" in text
    rows = list(csv.DictReader((tmp_path / "report" / "data.csv").read_text().splitlines()))
    assert len({row["parameters deploy"] for row in rows}) == 1
    for row in rows:
        assert row["status"] == "finished"
        assert float(row["logits rel. L2 difference"]) < 1e-5
