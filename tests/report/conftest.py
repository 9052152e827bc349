import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repvgg.report.record import RunRecord, read_record, write_record

Make = Callable[..., RunRecord]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Writes the directory of a run as a training job leaves it."""

    def make(
        job: int | str,
        ablation: str = "full",
        *,
        status: Any = "finished",
        metrics: dict[str, float] | None = None,
        error: str | None = None,
        curve: tuple[float, ...] = (0.5, 0.8, 0.9),
        seed: int = 0,
        config: dict[str, Any] | None = None,
        **choices: str,
    ) -> RunRecord:
        run_dir = tmp_path / str(job)
        run_dir.mkdir(parents=True)
        rows = ["epoch,step,train/loss,val/deploy/top1"]
        for epoch, value in enumerate(curve):
            rows += [f"{epoch},{10 * epoch},0.5,", f"{epoch},{10 * epoch + 9},,{value}"]
        (run_dir / "metrics.csv").write_text("\n".join(rows) + "\n")
        measured = {
            "val/top1": 0.91,
            "val/deploy/top1": 0.91,
            "test/top1": 0.9525,
            "test/deploy/top1": 0.9550,
            "reparam/rel_l2_diff": 3.25e-6,
            "reparam/max_abs_logit_diff": 1e-5,
            "bench/train_form/images_per_s": 300.0,
            "bench/deploy/images_per_s": 630.0,
            "bench/speedup": 2.1,
            "params/train_form": 15817960.0,
            "params/deploy": 14339048.0,
        }
        write_record(
            run_dir,
            status=status,
            config={
                "choices": {"model": "repvgg_b0", "ablation": ablation, "recipe": "quick", "data": "digits"} | choices,
                "seed": seed,
                "bench": {"batch": 64, "dtype": "float32", "device": "cpu", "resolution": 32},
            }
            | (config or {}),
            metrics=measured if metrics is None else metrics,
            objective=0.955,
            error=error,
        )
        return read_record(run_dir)

    return make


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For child processes: this repository's code, and a W&B client that neither calls nor writes anywhere else."""
    src = Path(__file__).resolve().parents[2] / "src"
    folders = {
        f"WANDB_{name}DIR": str(tmp_path / f"wandb-{name.lower()}") for name in ("", "DATA_", "CACHE_", "CONFIG_")
    }
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    path = os.pathsep.join([str(src), str(tmp_path)])
    return {k: v for k, v in os.environ.items() if k not in ("COLUMNS",)} | folders | quiet | {"PYTHONPATH": path}
