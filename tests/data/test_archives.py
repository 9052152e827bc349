"""ImageNet's archives and Hugging Face's files give the samples that class folders give."""

import logging
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from repvgg.data.huggingface import HuggingFaceFiles
from repvgg.data.ilsvrc import IlsvrcTars
from repvgg.data.loader import make_loader
from repvgg.data.sources import ImageFolder, ImageSource
from repvgg.data.transforms import CenterCrop
from repvgg.data.write import WriteOptions, write_beton
from support.archives import devkit, files_of, shards, table, train_tar, val_tar
from support.images import photo_folder

WNIDS = ["n01440764", "n02084071", "n07697537"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 photographs in three classes, as folders, as archives and as Parquet and Arrow files."""
    root = tmp_path_factory.mktemp("archives")
    photo_folder(root / "photos", 3, 8, (80, 60))
    for number, wnid in enumerate(WNIDS):
        (root / "photos" / f"class_{number}").rename(root / "photos" / wnid)
    for extra in ("0000.jpg", "0001.jpg"):
        (root / "photos" / WNIDS[1] / extra).unlink()
    files = files_of(root / "photos")
    train_tar(root / "ILSVRC2012_img_train.tar", root / "photos")
    val_tar(root / "ILSVRC2012_img_val.tar", files)
    devkit(root / "devkit.tar.gz", WNIDS, [label for _, label, _ in files], [8, 6, 8])
    for kind in ("parquet", "stream", "file"):
        shards(root / kind, files, WNIDS, split="train", kind=kind)
    return root


def source_of(root: Path, kind: str) -> ImageSource:
    match kind:
        case "folder":
            return ImageFolder(root / "photos")
        case "train" | "val":
            return IlsvrcTars(root / f"ILSVRC2012_img_{kind}.tar", root / "devkit.tar.gz")
        case _:
            return HuggingFaceFiles(root / kind)


KINDS = ["train", "val", "parquet", "stream", "file"]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_equal_those_of_the_folder(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, source = source_of(root, "folder"), source_of(root, kind)
    assert source.classes == folder.classes == WNIDS
    assert len(source) == len(folder) == 22
    copied = pickle.loads(pickle.dumps(source))  # as a worker gets it
    for index in (*range(22), 3, 17):
        sample, expected = source[index], folder[index]
        assert (sample.label, sample.image) == (expected.label, expected.image)
        assert copied[index] == sample
        assert isinstance(pickle.dumps(source), bytes), "also once it has been read from"
    assert np.array_equal(np.sort(source.order(3)), np.arange(22))
    assert source.fingerprint() == source_of(root, kind).fingerprint() != folder.fingerprint()
    assert source.total_bytes() is not None
    assert not caplog.records or caplog.records[-1].levelno == logging.INFO


@pytest.mark.parametrize("kind", ["folder", "train", "parquet"])
def test_equal_images_load_equal_whatever_they_came_from(root: Path, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    source = source_of(root, kind)
    manifest = write_beton(source, path, options=WriteOptions(short_side=64), progress=False)
    assert sum(manifest.stored.values()) == 22
    assert min(manifest.stored["passed_through"], manifest.stored["encoded"]) > 0
    order = source.order(0)
    loader = make_loader(path, transform=CenterCrop(32), batch_size=22, train=False)
    ((images, labels),) = [(images.clone(), labels.clone()) for images, labels in loader]
    back = torch.as_tensor(np.argsort(order))
    reference = tmp_path / "reference.beton"
    write_beton(source_of(root, "folder"), reference, options=WriteOptions(short_side=64), progress=False)
    loader = make_loader(reference, transform=CenterCrop(32), batch_size=22, train=False)
    ((expected, expected_labels),) = [(images.clone(), labels.clone()) for images, labels in loader]
    there = torch.as_tensor(np.argsort(source_of(root, "folder").order(0)))
    assert torch.equal(images[back], expected[there])
    assert torch.equal(labels[back], expected_labels[there])


def test_the_words_of_classes_come_along(root: Path, tmp_path: Path) -> None:
    manifest = write_beton(source_of(root, "val"), tmp_path / "x.beton", options=WriteOptions(), progress=False)
    assert manifest.class_words == [f"words of {wnid}" for wnid in WNIDS]


def refused(words: str, archive: Path, kit: Path) -> None:
    with pytest.raises(ValueError, match=words):
        IlsvrcTars(archive, kit)


def test_wrong_archives_are_told_apart(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, val, kit = root / "ILSVRC2012_img_train.tar", root / "ILSVRC2012_img_val.tar", root / "devkit.tar.gz"
    refused(r"no\.tar does not exist\. Set source\.dir.*image-net\.org", tmp_path / "no.tar", kit)
    refused(r"is not ILSVRC2012_devkit_t12\.tar\.gz", train, val)
    refused(r"is not ILSVRC2012_devkit_t12", train, Path(__file__))
    refused(r"test_archives\.py is no tar archive", Path(__file__), kit)
    other = devkit(tmp_path / "other.tar.gz", [*WNIDS[:2], "n99999999"], [0] * 22, [8, 6, 8])
    refused(r"missing: n99999999, not known to the kit: n07697537", train, other)
    short = devkit(tmp_path / "short.tar.gz", WNIDS, [0] * 20, [8, 6, 8])
    refused(r"22 images, numbered 1 … 22; .* 1 … 20", val, short)
    for archive in (train, val):
        cut = tmp_path / archive.name
        cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        refused(r"cut short|damaged|missing|numbered", cut, kit)
    with tarfile.open(tmp_path / "foreign.tar", "w") as foreign:
        foreign.add(Path(__file__), "notes.txt")
    refused(r"does not hold n01440764\.tar.*notes\.txt", tmp_path / "foreign.tar", kit)
    fewer = devkit(tmp_path / "fewer.tar.gz", WNIDS, [0] * 22, [8, 7, 8])
    IlsvrcTars(train, fewer)
    assert "n02084071 has 6 images, not 7" in caplog.text


def test_hugging_face_files_say_what_they_lack(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.parquet or \.arrow files there\. Quote"):
        HuggingFaceFiles(tmp_path / "none-*.parquet")
    with pytest.raises(ValueError, match=r"no column 'img': set source\.image_column to one of image, label"):
        HuggingFaceFiles(root / "parquet", image_column="img")
    with pytest.raises(ValueError, match=r"image must hold whole numbers"):
        HuggingFaceFiles(root / "stream", label_column="image")
    files = files_of(root / "photos")
    nameless = tmp_path / "nameless.parquet"
    pa.parquet.write_table(table(files, None), nameless)
    with pytest.raises(ValueError, match=r"do not name their classes \(labels 0 … 2\): set source\.classes=3"):
        HuggingFaceFiles(nameless)
    assert HuggingFaceFiles(nameless, classes=3).classes == ["0", "1", "2"]
    assert HuggingFaceFiles(nameless, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"label 2, but 2 classes"):
        HuggingFaceFiles(nameless, classes=2)
    pa.parquet.write_table(table([(name, -1, content) for name, _, content in files], WNIDS), nameless)
    with pytest.raises(ValueError, match=r"label -1\. A test split"):
        HuggingFaceFiles(nameless)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((root / "parquet" / "train-00000-of-00002.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"broken\.parquet is damaged"):
        HuggingFaceFiles(broken)
    mixed = tmp_path / "mixed"
    shutil.copytree(root / "parquet", mixed)
    pa.parquet.write_table(table(files, ["x", "y", "z"]), mixed / "train-2.parquet")
    with pytest.raises(ValueError, match=r"names other classes"):
        HuggingFaceFiles(mixed)


def test_plain_bytes_and_paths_are_images_too(root: Path, tmp_path: Path) -> None:
    files = files_of(root / "photos")
    labels = pa.array([label for _, label, _ in files])
    pa.parquet.write_table(pa.table({"image": [c for _, _, c in files], "label": labels}), tmp_path / "plain.parquet")
    plain = HuggingFaceFiles(tmp_path / "plain.parquet", classes=3)
    assert [plain[i].image for i in range(22)] == [content for _, _, content in files]
    folder = source_of(root, "folder")
    linked = [{"bytes": None, "path": folder[i].name} for i in range(22)]
    pa.parquet.write_table(pa.table({"image": linked, "label": labels}), tmp_path / "linked.parquet")
    source = HuggingFaceFiles(tmp_path / "linked.parquet", classes=3)
    assert [source[i].image for i in range(22)] == [content for _, _, content in files]


def test_rows_of_one_group_follow_each_other(root: Path) -> None:
    """Else every record would cost the reading of a whole row group."""
    order = source_of(root, "parquet").order(0)
    sizes = [5, 5, 2, 5, 5]
    group = np.repeat(np.arange(5), sizes)[order]
    assert np.count_nonzero(np.diff(group)) == 4
    assert not np.array_equal(order, np.sort(order))


def test_hidden_and_unreadable_files_beside_the_shards(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    images = [("1.jpg", 0, b"x")]
    shards(folder, images, ["cat"], split="train", kind="parquet")
    (folder / "._train-00000.parquet").write_bytes(b"of the Finder")
    assert len(HuggingFaceFiles(folder)) == 1
    (folder / "gone.parquet").symlink_to("/gone")
    with pytest.raises(ValueError, match=r"gone\.parquet cannot be read: .*No such file"):
        HuggingFaceFiles(folder)
