import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from repvgg.data.ffcv_setup import libffcv
from repvgg.data.manifest import DatasetMissingError, manifest_path, read_manifest, require_files
from repvgg.data.sources import ImageFolder, InMemory, describe_digits, digits, require_same_classes
from repvgg.data.verify import RAW, content_sha256, encoded, read_records, verify_beton
from repvgg.data.write import WriteError, WriteOptions, ensure_beton, ensure_digits, write_beton
from repvgg.data.write_process import CheckedSource

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


def test_jpeg_records_hold_the_folder_in_shuffled_order(folder: Path, varied: Path) -> None:
    source = ImageFolder(folder)
    order = np.random.default_rng(3).permutation(len(source))
    assert not np.array_equal(order, np.arange(len(source)))
    records = read_records(varied)
    for index, label, pixels in zip(order, records.labels, decoded(varied), strict=True):
        expected, expected_label = source[int(index)]
        assert label == expected_label
        assert pixels.shape == np.asarray(expected).shape
        difference = np.abs(pixels.astype(float) - np.asarray(expected)).mean()
        assert difference < 16, source.files[index]  # JPEG's loss; bilevel and palette images are the worst


def test_raw_records_are_exact(squares: InMemory, square: Path) -> None:
    for label, pixels in zip(read_records(square).labels, decoded(square), strict=True):
        assert np.array_equal(pixels, squares.images[label])


def test_every_mode_becomes_rgb(folder: Path) -> None:
    source = ImageFolder(folder)
    images = {path.name: source[i][0] for i, (path, _) in enumerate(source.files) if path.parent.name == "modes"}
    assert len(images) == 11
    assert {image.mode for image in images.values()} == {"RGB"}
    rgb = np.asarray(images["rgb.png"]).astype(float)
    assert np.array_equal(np.asarray(images["rgba.png"]), rgb)
    gray = np.asarray(images["gray.png"])
    assert np.array_equal(np.asarray(images["gray16.png"]), gray)
    assert np.abs(np.asarray(images["cmyk.jpg"]) - rgb).mean() < 16
    assert images["exif.jpg"].size == (60, 40), "rotation notes are ignored"


def test_proportion_chooses_by_sample_not_by_worker(folder: Path, mixed: Path) -> None:
    records = read_records(mixed)
    assert max(records.images["width"].max(), records.images["height"].max()) == 64
    raw = records.images["mode"] == RAW
    assert 20 < raw.sum() < 80
    checked = CheckedSource(ImageFolder(folder), WriteOptions(), 0, Path(), multiprocessing.Value("Q", 0))
    for index, is_raw in zip(np.random.default_rng(0).permutation(101), raw, strict=True):
        checked[int(index)]
        assert (np.random.rand() >= 0.5) == is_raw  # noqa: NPY002 - as FFCV draws


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
    ("kind", "words"),
    [("raises", "sample 23 of faulty: KeyError: 'no such image'"), ("dies", "code -9"), ("writer dies", "code -9")],
)
def test_trouble_is_one_error_and_leaves_the_old_file(
    faulty_sources: ModuleType, kind: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.beton"
    path.write_text("old")
    source = faulty_sources.Faulty(kind)
    with pytest.raises(WriteError, match=words):
        write_beton(source, path, options=WriteOptions(write_mode="raw"), num_workers=2, progress=False)
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".x.beton.lock", "x.beton"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gray", "sample 23 of faulty: .*mode L"),
        ("label", "sample 23 of faulty: .*label 2"),
        ("huge", "sample 23 of faulty: .*2000×2000.*max_resolution"),
        ("flat", "sample 23 of faulty: .*3000×1"),
    ],
)
def test_samples_that_ffcv_would_hang_on_are_refused(
    faulty_sources: ModuleType, kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "killpg", lambda group, number: None)  # it would end this process
    error_file = tmp_path / "error.json"
    options = WriteOptions(write_mode="raw", max_resolution=1000 if kind == "flat" else None)
    done = multiprocessing.Value("Q", 0)
    checked = CheckedSource(faulty_sources.Faulty(kind), options, 0, error_file, done)
    checked[22]
    assert not error_file.exists()
    with pytest.raises(SystemExit):
        checked[23]
    assert re.search(words, json.loads(error_file.read_text()))
    assert done.value == 1


def group_members(group: int) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = entry.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            found.append(entry.parent.name)
    return found


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_killing_the_caller_ends_the_writers_and_leaves_no_target(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    code = (
        "from faulty_sources import Faulty; from repvgg.data.write import *\n"
        f"write_beton(Faulty('slow'), {str(path)!r}, options=WriteOptions(), num_workers=2, progress=False)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([SOURCE_ROOT, str(Path(__file__).parent)])}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
    partial = path.with_name("x.beton.partial")
    try:
        wait_for(partial.exists)
        (group,) = (int(child) for child in children.read_text().split())
        assert len(group_members(group)) >= 2
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_for(lambda: not group_members(group), seconds=20)  # they had over a minute of work left
    assert not path.exists()
    assert not manifest_path(path).exists()


def test_ensure_writes_once_even_in_a_race_and_again_for_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    code = (
        "import functools; from repvgg.data.write import *; from repvgg.data.sources import digits, describe_digits\n"
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
    image, label = val[0]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), int(val.labels[0]))
    held = {hashlib.sha256(x.tobytes()).digest() for x in val.images}
    assert not held & {hashlib.sha256(x.tobytes()).digest() for x in train.images}
    assert np.array_equal(digits("val").images, val.images)
    assert not np.array_equal(digits("val", seed=1).labels, val.labels)
    assert digits("val", image_size=20)[0][0].size == (20, 20)
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
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        ImageFolder(tmp_path)[0]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "cut.png")
    whole = (tmp_path / "cat" / "cut.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        ImageFolder(tmp_path)[1]


def test_classes_of_both_splits_must_agree(squares: InMemory) -> None:
    require_same_classes(squares, squares)
    with pytest.raises(ValueError, match=r"in one only: .*… *$"):
        require_same_classes(squares, digits("val"))


@pytest.mark.parametrize(
    "wrong",
    [{"write_mode": "smart"}, {"max_resolution": 0}, {"jpeg_quality": 101}, {"compress_probability": 1.5}],
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
