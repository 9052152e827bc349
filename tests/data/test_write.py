import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from repvgg.data.encode import PAGE_BYTES, to_rgb
from repvgg.data.ffcv_setup import IntDecoder, Loader, SimpleRGBImageDecoder, libffcv
from repvgg.data.manifest import DatasetMissingError, Manifest, manifest_path, read_manifest, require_files
from repvgg.data.sources import ImageFolder, InMemory, Sample, describe_digits, digits, require_same_classes
from repvgg.data.verify import RAW, content_sha256, encoded, read_records, verify_beton
from repvgg.data.write import WriteError, WriteOptions, ensure_beton, ensure_digits, write_beton
from support.commands import heavy

pytestmark = pytest.mark.timeout(120)
SOURCE_ROOT = str(Path(__file__).parents[2] / "src")


def decoded(path: Path) -> list[np.ndarray]:
    records = read_records(path)
    images = []
    for image, content in zip(records.images, encoded(records), strict=True):
        shape = (int(image["height"]), int(image["width"]), 3)
        if image["mode"] == RAW:
            images.append(np.array(content).reshape(shape))
            continue
        pixels = np.empty(shape, dtype=np.uint8)
        size = shape[:2]
        assert libffcv.imdecode(content, pixels, *size, *size, 0, 0, 1, 1, False, False) == 0
        images.append(pixels)
    return images


def pixels_of(sample: Sample) -> np.ndarray:
    image = Image.open(BytesIO(sample.image)) if isinstance(sample.image, bytes) else sample.image
    return np.asarray(to_rgb(image))


def test_jpeg_records_hold_the_folder_in_shuffled_order(folder: Path, varied: Path) -> None:
    source = ImageFolder(folder)
    order = np.random.default_rng(3).permutation(len(source))
    assert not np.array_equal(order, np.arange(len(source)))
    records = read_records(varied)
    for index, label, pixels in zip(order, records.labels, decoded(varied), strict=True):
        sample = source[int(index)]
        expected = pixels_of(sample)
        assert label == sample.label
        assert pixels.shape == expected.shape
        difference = np.abs(pixels.astype(float) - expected).mean()
        assert difference < 16, sample.name  # JPEG's loss; bilevel and palette images are the worst


def test_raw_records_are_exact(squares: InMemory, square: Path) -> None:
    for label, pixels in zip(read_records(square).labels, decoded(square), strict=True):
        assert np.array_equal(pixels, squares.images[label])


def test_every_mode_becomes_rgb(folder: Path) -> None:
    source = ImageFolder(folder)
    images = {Path(sample.name).name: pixels_of(sample) for sample in source if "/modes/" in sample.name}
    assert len(images) == 11
    assert all(image.shape[2:] == (3,) for image in images.values())
    rgb = images["rgb.png"].astype(float)
    assert np.array_equal(images["rgba.png"], rgb)
    assert np.array_equal(images["gray16.png"], images["gray.png"])
    assert np.abs(images["cmyk.jpg"] - rgb).mean() < 16
    assert images["exif.jpg"].shape == (40, 60, 3), "rotation notes are ignored"


def test_proportion_chooses_by_sample_not_by_order(mixed: Path) -> None:
    records = read_records(mixed)
    assert max(records.images["width"].max(), records.images["height"].max()) == 64
    raw = records.images["mode"] == RAW
    assert 20 < raw.sum() < 80
    options = WriteOptions(write_mode="proportion")
    for index, is_raw in zip(np.random.default_rng(0).permutation(101), raw, strict=True):
        assert options.as_jpeg(0, int(index)) != is_raw


def test_manifest(folder: Path, varied: Path) -> None:
    manifest = read_manifest(varied)
    source = ImageFolder(folder)
    assert manifest.samples == sum(manifest.samples_per_class) == len(source) == 101
    assert manifest.classes == ["class_0", "class_1", "modes"]
    assert manifest.samples_per_class[2] == 11
    assert manifest.options["jpeg_quality"] == 95
    assert manifest.options["seed"] == 3
    assert manifest.versions["ffcv"] == "1.0.2"
    assert str(folder) in manifest.source
    assert manifest.content_sha256 == content_sha256(read_records(varied))
    assert sorted(path.name for path in varied.parent.iterdir()) == [
        ".train.beton.lock",
        "train.beton",
        "train.beton.json",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"samples": 3}'])
def test_unreadable_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.beton.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.beton\.json.*again"):
        read_manifest(tmp_path / "x.beton")


def test_missing_files_are_all_named_with_the_way_out(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.touch()
    with pytest.raises(DatasetMissingError) as error:
        require_files({"a": tmp_path / "one", "b": tmp_path / "two", "c": here}, "write it!")
    message = str(error.value)
    assert all(word in message for word in (str(tmp_path / "one"), str(tmp_path / "two"), "write it!", "data=digits"))
    assert str(here) not in message
    require_files({"c": here}, "write it!")
    with pytest.raises(DatasetMissingError, match="write_dataset"):
        read_manifest(tmp_path / "none.beton")


def test_the_manifest_module_needs_the_standard_library_only() -> None:
    code = "import sys, repvgg.data.manifest; print('numpy' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": SOURCE_ROOT}, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("kind", "words", "num_workers"),
    [
        ("raises", "sample 23 of faulty cannot be read: KeyError: 'no such image'", 0),
        ("raises", "sample 23 of faulty cannot be read: KeyError: 'no such image'", 2),
        ("label", "square 23 of faulty has label 2, not .* 0 … 1", 0),
        ("huge", "square 23 of faulty .*2000×2000 .*write.max_resolution", 0),
        ("long", "square 23 of faulty .*70000×1 .*write.max_resolution", 0),
        ("cut", "square 23 of faulty does not decode: .*on_bad=skip", 0),
    ],
)
def test_trouble_is_one_error_and_leaves_the_old_file(
    faulty_sources: ModuleType, kind: str, words: str, num_workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.beton"
    path.write_text("old")
    source = faulty_sources.Faulty(kind)
    with pytest.raises(WriteError, match=words):
        write_beton(source, path, options=WriteOptions(write_mode="raw"), num_workers=num_workers, progress=False)
    assert path.read_text() == "old"
    kept = ["", ".partial", ".partial.journal"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".x.beton.lock", *(f"x.beton{end}" for end in kept)]


def test_a_killed_worker_is_one_error_and_not_a_wait(faulty_sources: ModuleType, tmp_path: Path) -> None:
    source = faulty_sources.Faulty("dies")
    with pytest.raises(WriteError, match=r"code -9 .*continues"):
        write_beton(source, tmp_path / "x.beton", options=WriteOptions(), num_workers=2, progress=False)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("from_stdin", [True, heavy(False)])
def test_a_script_that_cannot_start_workers_ends(tmp_path: Path, from_stdin: bool) -> None:
    """From stdin there is no file for them to import, without a guard they would run the script again."""
    code = f"""
import numpy as np
from repvgg.data.sources import InMemory
from repvgg.data.write import WriteOptions, write_beton
source = InMemory(np.zeros((300, 32, 32), np.uint8), np.zeros(300, np.int64), ["a"], "more bytes than a pipe holds")
write_beton(source, {str(tmp_path / "x.beton")!r}, options=WriteOptions(), num_workers=1, progress=False)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-" if from_stdin else str(script)],
        input=code if from_stdin else None,
        env={**os.environ, "PYTHONPATH": SOURCE_ROOT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "a worker process died with code 1" in done.stderr
    if not from_stdin:
        assert "needs `if __name__" in done.stderr


def test_silent_workers_are_one_error_and_not_a_wait(
    faulty_sources: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repvgg.data.workers.STALL_S", 0.1)
    monkeypatch.setattr("repvgg.data.workers.POLL_S", 0.1)
    source = faulty_sources.Faulty("slow")
    with pytest.raises(WriteError, match=r"nothing has been read"):
        write_beton(source, tmp_path / "x.beton", options=WriteOptions(), num_workers=1, progress=False)
    assert not multiprocessing.active_children()


def test_bad_images_are_left_out_on_request_and_listed(faulty_sources: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    source = faulty_sources.Faulty("cut")

    def write(on_bad: Literal["stop", "skip"]) -> Manifest:
        options = WriteOptions(write_mode="raw")
        return write_beton(source, path, options=options, num_workers=0, progress=False, on_bad=on_bad)

    with pytest.raises(WriteError, match="square 23"):
        write("stop")
    manifest = write("skip")  # continues
    assert (manifest.samples, manifest.samples_per_class) == (39, [20, 19])
    assert [entry["name"] for entry in manifest.skipped] == ["square 23"]
    assert "does not decode" in manifest.skipped[0]["reason"]
    verify_beton(path, decode=True)
    order = [i for i in np.random.default_rng(0).permutation(40) if i != 23]
    assert [int(pixels[0, 0, 0]) for pixels in decoded(path)] == order
    content = path.read_bytes()
    with pytest.raises(WriteError, match="square 23"):
        write("stop")  # a file without that image is not what was asked for
    assert path.read_bytes() == content
    inode = path.stat().st_ino
    assert write("skip") == manifest
    assert path.stat().st_ino == inode, "complete files are left alone"


def test_the_bytes_do_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    options = WriteOptions(write_mode="proportion", short_side=40)
    contents = set()
    for workers in (0, 1, 3):
        path = tmp_path / f"{workers}.beton"
        write_beton(ImageFolder(folder), path, options=options, seed=5, num_workers=workers, progress=False)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_ffcvs_own_loader_reads_records_over_many_pages(tmp_path: Path) -> None:
    """With both of its memory managers; the process cache cannot read a record that lies in two pages."""
    photo = load_sample_image("china.jpg")
    images = np.stack([np.roll(photo[:200, :300], shift, axis=1) for shift in range(150)])
    source = InMemory(images, np.arange(150), [str(i) for i in range(150)], "rolled")
    path = tmp_path / "x.beton"
    manifest = write_beton(source, path, options=WriteOptions(write_mode="raw"), progress=False)
    assert manifest.bytes == path.stat().st_size > 3 * PAGE_BYTES
    records = read_records(path)
    starts = records.images["data_ptr"]
    assert np.array_equal(starts // PAGE_BYTES, (starts + records.sizes - 1) // PAGE_BYTES)
    for os_cache in (True, False):
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        loader = Loader(str(path), batch_size=50, num_workers=1, os_cache=os_cache, pipelines=pipelines)
        seen = 0
        for pixels, labels in loader:
            assert np.array_equal(pixels, images[labels[:, 0]])
            seen += len(labels)
        assert seen == 150


def test_a_disk_that_is_certainly_too_small_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = ImageFolder(folder)
    total = source.total_bytes()
    assert total == sum(file.stat().st_size for file in folder.rglob("*.*"))

    def write(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        write_beton(source, tmp_path / "x.beton", options=WriteOptions(), progress=False)

    with pytest.raises(WriteError, match=r"GB free for .*data\.dir="):
        write(total // 100)
    write(total // 3)
    assert "GB free" in caplog.text


def test_a_full_disk_is_one_error(squares: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "x.beton", WriteOptions(write_mode="raw")
    real = os.pwrite
    calls = iter(range(10**6))

    def full(*arguments: Any) -> int:
        if next(calls) > 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(WriteError, match=r"No space left.*continues"):
            write_beton(squares, path, options=options, progress=False)
    assert not path.exists()
    assert write_beton(squares, path, options=options, progress=False).samples == len(squares)
    verify_beton(path, decode=True)


@pytest.mark.slow
def test_ensure_writes_once_even_in_a_race_and_again_for_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    code = (
        "import functools; from pathlib import Path; from repvgg.data.write import *\n"
        "from repvgg.data.sources import digits, describe_digits\n"
        f"ensure_beton({str(path)!r}, functools.partial(digits, 'val', 8), options=WriteOptions(),\n"
        "             description=describe_digits('val', 8, 0.2, 0))\n"
        f"print(Path({str(path)!r}).stat().st_ino)"
    )
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": SOURCE_ROOT}
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    seen = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert seen == {f"{path.stat().st_ino}\n".encode()}, "both saw one file"
    verify_beton(path, decode=True)

    class WouldWriteError(Exception):
        pass

    def ensure(**options: int) -> None:
        def make() -> InMemory:
            raise WouldWriteError

        description = describe_digits("val", 8, 0.2, 0)
        ensure_beton(path, make, options=WriteOptions(**options), description=description)  # type: ignore[arg-type]

    ensure()
    with pytest.raises(WouldWriteError):
        ensure(jpeg_quality=70)
    manifest_path(path).rename(tmp_path / "kept.json")  # as after a crash
    with pytest.raises(WouldWriteError):
        ensure()
    (tmp_path / "kept.json").rename(manifest_path(path))
    ensure()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 24)
    with pytest.raises(WouldWriteError):
        ensure()


def test_ensure_digits_asks_for_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, str] = {}

    def write(source: InMemory, path: Path, *_: object, **__: object) -> None:
        written[path.name] = source.description

    monkeypatch.setattr("repvgg.data.write._write", write)
    ensure_digits(tmp_path / "new" / "folder", image_size=16)
    assert written == {f"{split}.beton": digits(split, 16).description for split in ("train", "val")}  # type: ignore[arg-type]


def test_digits_split_is_fixed_and_stratified() -> None:
    train, val = digits("train"), digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert np.abs(np.bincount(val.labels) - 36).max() <= 1
    _, label, image = val[0]
    assert (image.size, label) == ((32, 32), int(val.labels[0]))
    held = {hashlib.sha256(x.tobytes()).digest() for x in val.images}
    assert not held & {hashlib.sha256(x.tobytes()).digest() for x in train.images}
    assert np.array_equal(digits("val").images, val.images)
    assert not np.array_equal(digits("val", seed=1).labels, val.labels)
    assert digits("val", image_size=20)[0].image.size == (20, 20)
    with pytest.raises(ValueError, match="'test'"):
        digits("test")  # type: ignore[arg-type]


def test_image_folder_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no folders"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"cat holds no images"):
        ImageFolder(tmp_path)
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "cut.png")
    whole = (tmp_path / "cat" / "cut.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[:-30])
    with pytest.raises(WriteError, match=r"cat/broken\.jpg .* does not decode"):
        write_beton(ImageFolder(tmp_path), tmp_path / "x.beton", options=WriteOptions())
    (tmp_path / "cat" / "broken.jpg").unlink()
    with pytest.raises(WriteError, match=r"cat/cut\.png .* does not decode"):
        write_beton(ImageFolder(tmp_path), tmp_path / "x.beton", options=WriteOptions())
    with pytest.raises(WriteError, match="none of 1 images"):
        write_beton(ImageFolder(tmp_path), tmp_path / "x.beton", options=WriteOptions(), on_bad="skip")


def test_classes_of_both_splits_must_agree(squares: InMemory) -> None:
    require_same_classes(squares, squares)
    with pytest.raises(ValueError, match=r"in one only: .*… *$"):
        require_same_classes(squares, digits("val"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"write_mode": "smart"},
        {"max_resolution": 0},
        {"short_side": -1},
        {"jpeg_quality": 101},
        {"compress_probability": 1.5},
    ],
)
def test_write_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        WriteOptions(**wrong)  # type: ignore[arg-type]


def test_an_empty_source_is_refused(squares: InMemory, tmp_path: Path) -> None:
    empty = InMemory(squares.images[:0], squares.labels[:0], squares.classes, "nothing at all")
    with pytest.raises(ValueError, match="nothing at all"):
        write_beton(empty, tmp_path / "x.beton", options=WriteOptions())


def test_manifest_is_plain_json(varied: Path) -> None:
    assert json.loads(manifest_path(varied).read_text())["samples"] == 101


@pytest.mark.slow
def test_a_single_allowed_core_is_enough(tmp_path: Path) -> None:
    """The writer's process once waited for ever at its end: numba's TBB pool, unloaded after a fork on one core."""
    code = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from repvgg.data.write import ensure_digits
ensure_digits({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": SOURCE_ROOT})
    assert read_manifest(tmp_path / "val.beton").samples == 360
