"""Several real processes over gloo: exact validation, equal replicas, the share of every rank."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

VALIDATE = """
import json, sys
from pathlib import Path
import torch
from support.networks import randomize, tiny
from support.training import classifier, datamodule, trainer, two_forms

devices, batch, files, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
torch.manual_seed(0)
module = classifier(randomize(tiny(num_classes=10)))
run = trainer(out.parent, [two_forms()], devices=devices)
scores = run.validate(module, datamodule=datamodule(files, batch_size=batch), verbose=False)[0]
if run.is_global_zero:
    out.write_text(json.dumps(scores))
"""

TRAIN = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from support.training import classifier, datamodule, trainer, two_forms

files, out = Path(sys.argv[1]), Path(sys.argv[2])
module = classifier()
run = trainer(out, [two_forms()], devices=2, limit_train_batches=None)
run.fit(module, datamodule=datamodule(files, batch_size=32))
result = {"weights": module.net.state_dict(), "logged": dict(run.callback_metrics)}
torch.save(result, out / f"rank{run.global_rank}.pt")
"""

SUBSET = """
import sys
from repvgg.data.sources import digits
from repvgg.data.write import WriteOptions, write_beton
from support.images import First

options = WriteOptions(write_mode="jpg", jpeg_quality=95)
for split, count in (("train", 120), ("val", 101)):
    write_beton(First(digits(split), count), f"{sys.argv[1]}/{split}.beton", options=options, progress=False)
"""


def run(code: str, directory: Path, *arguments: object) -> None:
    """A script of its own: Lightning starts the other ranks by running it again."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def images_101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images_101")
    run(SUBSET, directory, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "batch"), [(3, 33), (2, 10)])
def test_every_image_counts_once_whatever_the_ranks(devices: int, batch: int, images_101: Path, tmp_path: Path) -> None:
    """101 images: ranks with different numbers of batches, and last batches of any size."""
    scores = []
    for ranks in (1, devices):
        out = tmp_path / f"{ranks}.json"
        run(VALIDATE, tmp_path, ranks, batch, images_101, out)
        scores.append(json.loads(out.read_text()))
    one, several = scores
    for key in ("val/top1", "val/top5", "val/deploy/top1", "val/deploy/top5", "reparam/top1_agreement"):
        assert one[key] == several[key], key  # to the last digit
    assert 0 < one["val/top1"] < 1
    assert (one["val/top1"] * 101) == pytest.approx(round(one["val/top1"] * 101), abs=1e-4)
    assert one["val/loss"] == pytest.approx(several["val/loss"], rel=1e-5)


def test_two_ranks_train_one_model(digits: Path, tmp_path: Path) -> None:
    import torch

    run(TRAIN, tmp_path, digits, tmp_path)
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    for key in ("val/top1", "val/deploy/top1", "train/top1", "bench/speedup", "reparam/rel_l2_diff"):
        assert a["logged"][key] == b["logged"][key], key
    assert a["logged"]["reparam/rel_l2_diff"] < 1e-4
