"""What is found in folders as people have them: hidden files, links of every kind, files that are no images."""

import errno
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg.data.folders import HIDDEN, NO_SUFFIX, SPECIAL, TWICE, Listing, kinds, list_images
from repvgg.data.manifest import DatasetMissingError, read_manifest, require_files
from repvgg.data.pictures import find_images
from repvgg.data.sources import ImageFolder, Sample
from repvgg.data.write import WriteError, WriteOptions, write_beton


def image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path, "JPEG" if path.suffix != ".png" else "PNG")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images."""
    folder = tmp_path / "train"
    for name in ("a/1.jpg", "a/2.png", "b/deeper/1.jpg", "b/2.JPG"):
        image(folder / name)
    return folder


IMAGES = ["a/1.jpg", "a/2.png", "b/2.JPG", "b/deeper/1.jpg"]


def counted(listed: Listing) -> Counter[str]:
    return sum(listed.not_read.values(), Counter())


def written(root: Path, on_bad: str = "stop"):
    target = root.parent / "train.beton"
    return write_beton(ImageFolder(root), target, options=WriteOptions(), progress=False, on_bad=on_bad)  # type: ignore[arg-type]


def test_hidden_names_are_passed_over_at_any_depth(root: Path) -> None:
    image(root / ".ipynb_checkpoints" / "1-checkpoint.jpg")
    image(root / "a" / ".ipynb_checkpoints" / "2.jpg")
    (root / "b" / "deeper" / "._1.jpg").write_bytes(b"of the Finder")
    (root / ".DS_Store").write_bytes(b"")
    listed = list_images(root)
    assert (listed.images, listed.folders) == (IMAGES, ["a", "b"])
    assert counted(listed) == {HIDDEN: 4}
    manifest = written(root)
    assert (manifest.classes, manifest.samples) == (["a", "b"], 4)


def test_a_hidden_folder_that_is_named_is_read(root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / ".cache")
    assert list_images(tmp_path / ".cache").images == IMAGES


def test_what_is_no_image_by_its_name_is_counted_by_kind(root: Path) -> None:
    for name in ("a/x.gif", "a/y.GIF", "b/x.jfif", "b/no_suffix", "b/deeper/notes.txt", "list.csv"):
        (root / name).write_bytes(b"")
    image(root / "stray.jpg")
    os.mkfifo(root / "a" / "pipe.jpg")
    source = ImageFolder(root)
    assert [source.name(i) for i in range(len(source))] == IMAGES
    wanted = {
        ".gif": 2,
        ".jfif": 1,
        NO_SUFFIX: 1,
        ".txt": 1,
        ".csv": 1,
        SPECIAL: 1,
        ".jpg outside of a class folder": 1,
    }
    assert source.not_read == wanted
    assert kinds({".gif": 2, ".txt": 1, "hidden": 11}) == "11 hidden, 2 .gif, 1 .txt"
    assert kinds({f".{n}": 1 for n in range(9)}).endswith("1 .5, …")


def test_a_class_of_other_files_alone_says_which(root: Path) -> None:
    (root / "c").mkdir()
    (root / "c" / "1.gif").write_bytes(b"")
    (root / "c" / "2.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/c holds no images \(.*\), but 2 \.gif\."):
        ImageFolder(root)


@pytest.mark.parametrize("target", [".", "..", "../b", "deeper", "/tmp"])
def test_a_loop_of_links_ends_and_multiplies_nothing(root: Path, target: str) -> None:
    if target == "/tmp":  # the root by another way
        target = str(root)
    (root / "a" / "deeper").mkdir()
    (root / "a" / "link").symlink_to(target)
    listed = list_images(root)
    assert listed.images == IMAGES
    assert counted(listed) == {TWICE: 1}
    assert not listed.unreadable


def test_links_to_what_lies_elsewhere_are_followed_once(root: Path, tmp_path: Path) -> None:
    """Classes, folders and files that are links, as subsets of a data set are made."""
    pool = tmp_path / "pool"
    for name in ("cats/1.jpg", "cats/more/2.jpg", "loose/3.jpg", "loose/4.jpg"):
        image(pool / name)
    (pool / "cats" / "more" / "round").symlink_to(pool / "cats")
    (root / "cat").symlink_to(pool / "cats")
    (root / "a" / "3.jpg").symlink_to(pool / "loose" / "3.jpg")
    (root / "a" / "4.png").symlink_to(pool / "loose" / "4.jpg")
    (root / "b" / "3 again.jpg").symlink_to(pool / "loose" / "3.jpg")
    (root / "b" / "1 again.jpg").symlink_to("deeper/1.jpg")
    listed = list_images(root)
    assert listed.folders == ["a", "b", "cat"]
    new = ["a/3.jpg", "a/4.png", "cat/1.jpg", "cat/more/2.jpg"]
    assert listed.images == sorted([*IMAGES, *new], key=lambda name: name.split("/"))
    assert counted(listed) == {TWICE: 3}


def test_a_folder_and_a_file_of_it_by_links_come_once(root: Path, tmp_path: Path) -> None:
    """Whichever name is first in the alphabet: files are looked at after all folders."""
    image(tmp_path / "pool" / "1.jpg")
    (root / "a" / "0.jpg").symlink_to(tmp_path / "pool" / "1.jpg")
    (root / "b" / "pool").symlink_to(tmp_path / "pool")
    assert sorted(set(list_images(root).images) - set(IMAGES)) == ["b/pool/1.jpg"]


def test_two_classes_that_are_one_folder_are_refused(root: Path) -> None:
    (root / "c").symlink_to("b")
    with pytest.raises(ValueError, match=rf"/c holds no images .*, but 1 {TWICE}"):
        ImageFolder(root)


@pytest.mark.parametrize("kind", ["dangling", "loop"])
def test_a_link_that_leads_nowhere_obeys_on_bad(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    (root / "a" / "bad.jpg").symlink_to("bad.jpg" if kind == "loop" else "/gone/x.jpg")
    reason = "Too many levels" if kind == "loop" else "it is a link to /gone/x.jpg: No such file"
    with pytest.raises(WriteError, match=rf"/a/bad\.jpg of .* cannot be read: .*{reason}.* on_bad=skip"):
        written(root)
    assert not (root.parent / "train.beton").exists()
    manifest = written(root, "skip")
    assert manifest.samples == 4
    assert [Path(entry["name"]).name for entry in manifest.skipped] == ["bad.jpg"]
    assert "left out: " in caplog.text
    assert read_manifest(root.parent / "train.beton").skipped == manifest.skipped
    with pytest.raises(WriteError, match=r"bad\.jpg"):
        written(root)


def test_a_folder_that_cannot_be_listed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list everything, so the refusal is played."""
    scandir = os.scandir

    def refusing(path: str):
        if str(path).endswith("deeper"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(WriteError, match=r"/b/deeper of .* cannot be read: Permission denied"):
        written(root)
    assert written(root, "skip").samples == 3
    (root / "b" / "2.JPG").unlink()
    with pytest.raises(ValueError, match=r"/b holds no images .*/b/deeper cannot be read: Permission denied"):
        ImageFolder(root)


class Vanishing(ImageFolder):
    """Its second image is gone, or cannot be opened, when it is to be read."""

    error = errno.ENOENT

    def __getitem__(self, index: int) -> Sample:
        path = str(self.root / self.name(index))
        if path.endswith("2.png"):
            raise OSError(self.error, os.strerror(self.error), path)
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_obeys_on_bad(root: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vanishing, "error", error)
    target = root.parent / "x.beton"
    with pytest.raises(WriteError, match=rf"/a/2\.png of .* cannot be read: {os.strerror(error)}.*on_bad=skip"):
        write_beton(Vanishing(root), target, options=WriteOptions(), progress=False)
    assert write_beton(Vanishing(root), target, options=WriteOptions(), progress=False, on_bad="skip").samples == 3


def test_an_error_of_the_process_is_no_files_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vanishing, "error", errno.EMFILE)
    with pytest.raises(WriteError, match="Too many open files"):
        write_beton(Vanishing(root), root.parent / "x.beton", options=WriteOptions(), progress=False, on_bad="skip")


def test_the_space_that_is_needed_is_guessed_without_the_files_that_are_gone(root: Path) -> None:
    source = ImageFolder(root)
    (root / "a" / "1.jpg").unlink()
    assert source.total_bytes() > 0


def test_images_to_predict_are_found_in_the_same_way(root: Path) -> None:
    (root / "a" / "._1.jpg").write_bytes(b"")
    (root / "a" / "x.gif").write_bytes(b"")
    (root / "a" / "round").symlink_to("..")
    (root / "b" / "bad.jpg").symlink_to("/gone.jpg")
    found = find_images([root / "a", root / "b"])
    assert [str(file.relative_to(root)) for file in found.files[:3]] == ["a/1.jpg", "a/2.png", "a/round/b/2.JPG"]
    found = find_images([root])
    assert [str(file.relative_to(root)) for file in found.files] == IMAGES
    assert found.not_read == {HIDDEN: 1, ".gif": 1, TWICE: 1}
    (line,) = found.unreadable
    assert line.startswith(f"{root}/b/bad.jpg cannot be read: it is a link to /gone.jpg")


# --- where the data is looked for -------------------------------------------------------------------------------------

COMMANDS = {
    "folder": "data.dir={} source.train=/path/to/train source.val=/path/to/val",
    "imagenet": "data.dir={} source=ilsvrc_tars source.dir=/path/to/downloads",
}


@pytest.mark.parametrize("data", COMMANDS)
def test_a_folder_of_train_and_val_is_what_the_command_names(data: str, tmp_path: Path) -> None:
    directory = tmp_path / "my photos"
    for split in ("train", "val"):
        image(directory / split / "a" / "1.jpg")
    files = {"val": directory / "val.beton"}
    template = f"python src/write_dataset.py data={data} {COMMANDS[data]}"
    with pytest.raises(DatasetMissingError) as caught:
        require_files(files, template.format(directory))
    command = f"data={data} 'data.dir={directory}' 'source.train={directory}/train' 'source.val={directory}/val'"
    assert f"  python src/write_dataset.py {command}\n" in str(caught.value)
    (directory / "val").rename(directory / "validation")
    with pytest.raises(DatasetMissingError, match=r"source.*=/path/to/"):
        require_files(files, template.format(directory))
