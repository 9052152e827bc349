"""Data files that are damaged, and what `python src/train.py` and `write_dataset.py` say; a writer that is killed."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repvgg.data.manifest import manifest_path
from repvgg.data.verify import read_records
from support.commands import TRAIN, begun, only_run, record, small, start, wait_until
from support.images import photo

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in [*digits.glob("*.beton"), *digits.glob("*.beton.json")]:
        shutil.copy(file, folder)
    return folder


def garble(path: Path, number: int) -> None:
    records = read_records(path)
    with path.open("r+b") as file:
        file.seek(int(records.images["data_ptr"][number]) + 2)
        file.write(bytes(int(records.sizes[number]) - 4))


def training(data: Path, root: Path, *more: str, epochs: int = 1) -> list[str]:
    return [*TRAIN, *small(data, root, "data.prepare=null", *more, epochs=epochs)]


def ended(command: list[str], log: Path) -> tuple[int, str]:
    code = start(command, log).wait(timeout=200)
    return code, log.read_text()


@pytest.mark.slow
def test_an_image_that_does_not_decode_ends_a_training_with_its_number(data: Path, tmp_path: Path) -> None:
    garble(data / "train.beton", 700)
    code, said = ended(training(data, tmp_path, "data.check=tables", "recipe.batch_size=32"), tmp_path / "log")
    problem = f"{data / 'train.beton'}: record 700 does not decode. The file is damaged"
    assert code == 2
    assert f"error: {problem}" in said
    assert "Traceback" not in said
    assert record(only_run(tmp_path))["status"] == "failed"
    assert record(only_run(tmp_path))["error"].startswith(f"CorruptDatasetError: {problem}")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_it_is_found_before_the_training_unless_it_is_told_not_to_look(
    data: Path, tmp_path: Path, devices: int
) -> None:
    garble(data / "train.beton", 700)
    code, said = ended(training(data, tmp_path, f"trainer.devices={devices}"), tmp_path / "log")
    assert code == 2
    assert f"error: {data / 'train.beton'}: record 700 does not decode" in said
    assert "Traceback" not in said
    assert not begun(tmp_path)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_once_repaired_the_same_command_goes_on(digits: Path, data: Path, tmp_path: Path) -> None:
    """The file is cut off in the second epoch."""
    command = training(data, tmp_path, "recipe.batch_size=32", epochs=3)
    size = (data / "train.beton").stat().st_size
    process = start(command, tmp_path / "log")
    try:
        wait_until(lambda: begun(tmp_path) or process.poll() is not None, "an epoch", 100)
        with (data / "train.beton").open("r+b") as file:
            file.truncate(size // 2)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "log").read_text()
    # In the midst of a batch it is the kernel that ends the process, and the next start that names the file.
    assert (code == 2 and f"was shortened from {size:,} to" in said) or (
        code == -signal.SIGBUS and "Fatal Python error: Bus error" in said
    )
    code, said = ended(command, tmp_path / "log")
    assert code == 2
    assert re.search(rf"error: {data / 'train.beton'}: has \d+ bytes, but 1437 samples", said)
    shutil.copy(digits / "train.beton", data)
    code, said = ended(command, tmp_path / "log")
    assert code == 0, said
    assert "goes on in epoch" in said
    assert record(only_run(tmp_path))["status"] == "finished"


# The writer


@pytest.mark.slow
def test_a_writer_killed_at_random_points_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(10):
        folder = tmp_path / "images" / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(np.random.default_rng(number), (1200, 900)).save(folder / f"{number}.jpg")
        for copy in range(31):
            (folder / f"{number}_{copy}.jpg").hardlink_to(folder / f"{number}.jpg")

    def command(out: Path) -> list[str]:
        sources = [f"source.train={tmp_path / 'images'}", "splits=[train]", "write.short_side=600", "num_workers=2"]
        return [sys.executable, "src/write_dataset.py", "data=folder", f"data.dir={out}", *sources]

    def run(out: Path) -> subprocess.Popen[bytes]:
        return start(command(out), tmp_path / "log")

    whole, killed = tmp_path / "whole" / "train.beton", tmp_path / "killed" / "train.beton"
    assert run(whole.parent).wait(timeout=120) == 0
    partial = killed.with_name("train.beton.partial")
    codes, sizes = [], [0]
    while not killed.exists() and len(codes) < 4:
        process = run(killed.parent)
        try:
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:
                if partial.exists() and partial.stat().st_size > sizes[-1]:
                    time.sleep(rng.uniform(0, 0.3))
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            codes.append(process.wait())
        if partial.exists():
            sizes.append(partial.stat().st_size)
    assert codes.count(-signal.SIGKILL) >= 2
    assert len(sizes) > 2
    assert run(killed.parent).wait(timeout=120) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert manifest_path(killed).read_bytes() == manifest_path(whole).read_bytes()
    assert not list(killed.parent.glob("*.partial*"))
