"""write_dataset.py as it is typed: sources, interruption, verification, files of FFCV's own writer."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from repvgg.data.loader import make_loader
from repvgg.data.manifest import read_manifest
from repvgg.data.transforms import CenterCrop
from repvgg.data.verify import read_records
from support.archives import devkit, files_of, shards, train_tar, val_tar
from support.images import photo, photo_folder

ROOT = Path(__file__).parents[2]
WNIDS = ["n01440764", "n02084071", "n07697537"]

pytestmark = pytest.mark.timeout(180)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "src/write_dataset.py", *map(str, arguments)]


def write_dataset(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = photo_folder(tmp_path_factory.mktemp("photos"), 3, 6, (80, 60))
    for number, wnid in enumerate(WNIDS):
        (folder / f"class_{number}").rename(folder / wnid)
    return folder


def test_imagenets_archives_then_verify_then_damage(photos: Path, tmp_path: Path) -> None:
    files = files_of(photos)
    train_tar(tmp_path / "ILSVRC2012_img_train.tar", photos)
    val_tar(tmp_path / "ILSVRC2012_img_val.tar", files)
    devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", WNIDS, [label for _, label, _ in files], [6, 6, 6])
    out = f"data.dir={tmp_path / 'out'}"
    done = write_dataset("data=imagenet", out, "source=ilsvrc_tars", f"source.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("18 images of 3 classes") == 2
    manifest = read_manifest(tmp_path / "out" / "train.beton")
    assert manifest.classes == WNIDS
    assert manifest.stored == {"passed_through": 18, "encoded": 0, "raw": 0}
    assert (manifest.options["short_side"], manifest.options["max_resolution"]) == (384, None)

    val = tmp_path / "out" / "val.beton"
    records = read_records(val)
    with val.open("r+b") as file:
        file.seek(int(records.images["data_ptr"][5]) + 2)
        file.write(bytes(int(records.sizes[5]) - 4))
    refused = write_dataset("data=imagenet", out, "--verify")
    assert refused.returncode == 2
    assert "train.beton: 18 images of 3 classes, sound" in refused.stdout
    assert "val.beton: not sound" in refused.stdout
    assert "record 5 does not decode" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_one_split_of_hugging_face_files(photos: Path, tmp_path: Path) -> None:
    pattern = shards(tmp_path / "hf", files_of(photos), ["cat", "dog", "eel"], split="validation", kind="parquet")
    arguments = [f"data.dir={tmp_path}", "data=folder", "source=huggingface", "splits=[val]", f"source.val='{pattern}'"]
    done = write_dataset(*arguments)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "val.beton").classes == ["cat", "dog", "eel"]
    assert not (tmp_path / "train.beton").exists()


@pytest.mark.slow
def test_interrupted_twice_the_same_command_ends_it(tmp_path: Path) -> None:
    original = tmp_path / "photo.jpg"
    photo(np.random.default_rng(0), (1200, 900)).save(original)
    (tmp_path / "images" / "one").mkdir(parents=True)
    for number in range(160):
        (tmp_path / "images" / "one" / f"{number}.jpg").hardlink_to(original)
    target = tmp_path / "out" / "train.beton"
    partial = target.with_name("train.beton.partial")
    arguments = ["data=folder", f"data.dir={tmp_path / 'out'}", f"source.train={tmp_path / 'images'}", "splits=[train]"]
    sizes = [0]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command(*arguments, "num_workers=2"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 60
        while not partial.exists() or partial.stat().st_size <= sizes[-1]:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "of 160 images" in out
        assert "the same command continues" in out
        assert "Traceback" not in err
        assert not target.exists()
        sizes.append(partial.stat().st_size)
    assert sizes == sorted(sizes)
    done = write_dataset(*arguments)
    assert done.returncode == 0, done.stderr
    assert "continuing after" in done.stdout
    assert len(read_records(target)) == 160
    assert not partial.exists()


@pytest.mark.slow
def test_a_file_of_ffcvs_own_writer_is_adopted(photos: Path, tmp_path: Path) -> None:
    code = f"""
import numpy as np
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from repvgg.data.sources import ImageFolder

class Decoded(ImageFolder):
    def __getitem__(self, index):
        name, label, _ = super().__getitem__(index)
        return np.asarray(Image.open(name)), label

fields = {{"image": RGBImageField(max_resolution=70), "label": IntField()}}
for split in ("train", "val"):
    writer = DatasetWriter({str(tmp_path)!r} + f"/{{split}}.beton", fields, num_workers=1)
    writer.from_indexed_dataset(Decoded({str(photos)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    out = f"data.dir={tmp_path}"
    refused = write_dataset("data=folder", out, "verify=true")
    assert refused.returncode == 2
    assert f"adopt=true data=… {out}" in refused.stderr
    adopted = write_dataset("data=folder", out, "adopt=true")
    assert adopted.returncode == 0, adopted.stderr
    manifest = read_manifest(tmp_path / "train.beton")
    assert (manifest.samples, manifest.classes, manifest.samples_per_class) == (18, ["0", "1", "2"], [6, 6, 6])
    loader = make_loader(tmp_path / "train.beton", transform=CenterCrop(32), batch_size=18, train=False)
    ((_, labels),) = [(images, labels.clone()) for images, labels in loader]
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
