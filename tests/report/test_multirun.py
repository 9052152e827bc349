import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from repvgg.report import multirun, picture
from repvgg.report.record import RunRecord

Make = Callable[..., RunRecord]


def begin(job: Path, number: int | None = None, **choices: str) -> None:
    """What Hydra writes when a job starts."""
    (job / ".hydra").mkdir(parents=True)
    hydra = {"hydra": {"job": {"num": "???" if number is None else number}, "runtime": {"choices": choices}}}
    OmegaConf.save(OmegaConf.create(hydra), job / ".hydra/hydra.yaml")
    OmegaConf.save(OmegaConf.create({"seed": 5}), job / ".hydra/config.yaml")


def end(sweep_dir: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep_dir)}}})
    multirun.MultirunSummary().on_multirun_end(config, config_name="train")


def test_every_job_is_in_the_summary_in_job_order(make_run: Make, tmp_path: Path, capsys: Any) -> None:
    make_run(10, "full")
    make_run(2, "id")
    make_run(9, "1x1", status="failed", metrics={}, error="RuntimeError: no good")
    begin(tmp_path / "11", ablation="plain", model="repvgg_b0")
    (make_run(12).run_dir / "result.json").write_text("{")
    end(tmp_path)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert [line.split(",")[:5] for line in lines[1:]] == [
        ["2", "finished", "repvgg_b0", "id", "0"],
        ["9", "failed", "repvgg_b0", "1x1", "0"],
        ["10", "finished", "repvgg_b0", "full", "0"],
        ["11", "no result", "repvgg_b0", "plain", "5"],
        ["12", "unreadable", "", "", ""],
    ]
    markdown = (tmp_path / "summary.md").read_text()
    assert "| 2 | finished |" in markdown
    assert "Run 9: failed (RuntimeError: no good)." in markdown
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "no result" in printed
    assert printed.split()[-3:] == [str(tmp_path / f"summary.{kind}") for kind in ("md", "csv", "png")]
    assert not list(tmp_path.glob(".*.tmp"))


def test_named_directories_are_ordered_by_the_number_hydra_gave_the_job(make_run: Make, tmp_path: Path) -> None:
    for number, name in enumerate(("plain", "id", "1x1", "full")):
        begin(make_run(f"ablation={name}", name).run_dir, number)
    assert [r.run_dir.name for r in multirun.collect(tmp_path)] == [
        f"ablation={n}" for n in ("plain", "id", "1x1", "full")
    ]


def test_a_job_whose_directory_is_deeper_is_found(make_run: Make, tmp_path: Path) -> None:
    begin(make_run("0_dir=/a/b,x=1").run_dir, 0)
    begin(make_run("1_dir=c,x=1").run_dir, 1)
    assert [r.run_dir.name for r in multirun.collect(tmp_path)] == ["b,x=1", "1_dir=c,x=1"]


def test_a_picture_that_fails_costs_only_the_picture(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    make_run(0)

    def broken(*_: object) -> None:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(picture, "write_picture", broken)
    end(tmp_path)
    assert {p.name for p in tmp_path.glob("summary*")} == {"summary.md", "summary.csv"}
    assert "95.50" in capsys.readouterr().out
    assert "no fonts here" in caplog.text
    assert "The picture of" in caplog.text


def test_a_sweep_without_a_job_is_said(tmp_path: Path, caplog: Any) -> None:
    end(tmp_path)
    assert "No job has begun" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_callback_is_cheap_to_import(environment: dict[str, str]) -> None:
    code = (
        "import sys, repvgg.report.multirun, repvgg.report.table, repvgg.report.picture, repvgg.report.offline\n"
        "heavy = {'pandas', 'matplotlib', 'rich', 'wandb', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


SCRIPT = """
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from repvgg.report.record import write_record

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    config = {"choices": {"model": "repvgg_b0", "ablation": cfg.ablation}, "seed": 1}
    out = HydraConfig.get().runtime.output_dir
    status = "failed" if cfg.ablation == "id" else "finished"
    error = "RuntimeError: no good" if status == "failed" else None
    write_record(out, status=status, config=config, metrics={"test/top1": 0.5}, objective=0.5, error=error)
    if error:
        raise RuntimeError("no good")

main()
"""


def test_after_a_sweep_with_a_failed_job_the_summary_is_there(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/main.yaml").write_text(
        "defaults: [_self_, override hydra/launcher: process]\nablation: full\n"
        "hydra: {sweep: {dir: sweep}, callbacks: {summary: {_target_: repvgg.report.multirun.MultirunSummary}}}\n"
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", "-m", "ablation=plain,id,full"],
        check=False,
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert "1 of 3 jobs failed:\n#1 : ablation=id: exit code 1 (RuntimeError: no good)" in done.stderr
    rows = (tmp_path / "sweep/summary.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1:4:2] for row in rows] == [["finished", "plain"], ["failed", "id"], ["finished", "full"]]
    assert (tmp_path / "sweep/summary.png").exists()
    assert done.stdout.count("summary.png") == 1
    assert "Callback MultirunSummary" not in done.stderr
