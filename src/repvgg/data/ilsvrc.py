"""ImageNet-1k as it is downloaded: two tar archives and the development kit, read without unpacking them.

ILSVRC2012_img_train.tar holds a tar archive per class, ILSVRC2012_img_val.tar the validation images, and
ILSVRC2012_devkit_t12.tar.gz the classes and the validation images' labels.
"""

import io
import logging
import os
import re
import tarfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repvgg.data.sources import ImageSource, Sample, sha256

log = logging.getLogger(__name__)

DOWNLOAD = "download it anew from https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
INDEXING_THREADS = 8
"""Reading an index waits for the disk, once per image."""


@dataclass(frozen=True)
class Devkit:
    """What the development kit says. WNIDs are WordNet's names of classes, such as n01440764."""

    wnids: list[str]
    """Of the classes that have images, sorted: the order that torchvision's labels follow."""
    words: list[str]
    """What each class is called in English."""
    train_images: list[int]
    """How many each class has."""
    val_labels: list[int]
    """Indices into wnids, of validation image 1, 2, …"""


def read_devkit(path: Path) -> Devkit:
    """Raise ValueError when this is not the development kit of tasks 1 and 2."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    wrong = f"{path} is not ILSVRC2012_devkit_t12.tar.gz (of tasks 1 and 2, 2.5 MB): {DOWNLOAD}"
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                for name in (META, TRUTH):
                    file = archive.extractfile(member) if member.name.endswith(name) else None
                    if file is not None:
                        files[name] = file.read()
        synsets: Any = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
        # Numbered 1 … 1000; synsets with children are not classes but groups of them.
        rows = [row for row in np.atleast_1d(synsets) if int(row["num_children"]) == 0]
        rows.sort(key=lambda row: str(row["WNID"]))
        label = {int(row["ILSVRC2012_ID"]): number for number, row in enumerate(rows)}
        truth = [int(line) for line in files[TRUTH].split()]
        return Devkit(
            wnids=[str(row["WNID"]) for row in rows],
            words=[str(row["words"]) for row in rows],
            train_images=[int(row["num_train_images"]) for row in rows],
            val_labels=[label[number] for number in truth],
        )
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{wrong} ({type(error).__name__}: {error})") from error


class Member(NamedTuple):
    """A file in an archive: its bytes lie at offset … offset + size."""

    name: str
    offset: int
    size: int


class IlsvrcTars(ImageSource):
    """The training or the validation images, whichever the archive holds. Labels are indices into the sorted WNIDs.

    Raise ValueError when archives are missing, cut short, of other classes or of another challenge.
    """

    def __init__(self, archive: str | Path, devkit: str | Path) -> None:
        self.archive, devkit = Path(archive), Path(devkit)
        self.description = f"ILSVRC archive {self.archive.absolute()}"
        for path in (self.archive, devkit):
            if not path.is_file():
                raise ValueError(
                    f"{path.absolute()} does not exist. Set source.dir to the folder that holds "
                    "ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB) and "
                    "ILSVRC2012_devkit_t12.tar.gz (2.5 MB), from "
                    "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
                )
        kit = read_devkit(devkit)
        self.classes, self.class_words = kit.wnids, kit.words
        log.info("reading the index of %s: minutes for the training images", self.archive)
        outer = self._members(0, self.archive.stat().st_size)
        if outer and all(CLASS_TAR.fullmatch(member.name) for member in outer):
            images, labels = self._train(outer, kit)
        elif outer and all(VAL_IMAGE.fullmatch(member.name) for member in outer):
            images, labels = self._val(outer, kit)
        else:
            example = f", but {outer[0].name}" if outer else " and is empty"
            raise ValueError(
                f"{self.archive} does not hold n01440764.tar … (ILSVRC2012_img_train.tar) or "
                f"ILSVRC2012_val_00000001.JPEG … (ILSVRC2012_img_val.tar){example}"
            )
        # Arrays: they travel to every worker.
        self._names = np.array([member.name.encode() for member in images])
        self._offsets = np.array([member.offset for member in images], dtype=np.int64)
        self._sizes = np.array([member.size for member in images], dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)

    def _train(self, tars: Sequence[Member], kit: Devkit) -> tuple[list[Member], list[int]]:
        tars = sorted(tars, key=lambda tar: Path(tar.name).name)
        found = [Path(tar.name).stem for tar in tars]
        if found != kit.wnids:
            missing, extra = sorted(set(kit.wnids) - set(found)), sorted(set(found) - set(kit.wnids))
            raise ValueError(
                f"{self.archive} has {len(found)} classes, the development kit {len(kit.wnids)}; missing: "
                f"{', '.join(missing[:5]) or 'none'}, not known to the kit: {', '.join(extra[:5]) or 'none'}. If it is "
                f"not the training archive of tasks 1 and 2 or was cut short, {DOWNLOAD}"
            )
        with ThreadPoolExecutor(INDEXING_THREADS) as pool:
            indices = list(pool.map(lambda tar: self._members(tar.offset, tar.size), tars))
        for wnid, members, expected in zip(found, indices, kit.train_images, strict=True):
            if not members:
                raise ValueError(f"{self.archive}: {wnid}.tar holds no images: {DOWNLOAD}")
            if len(members) != expected:
                log.warning("%s: %s has %d images, not %d", self.archive, wnid, len(members), expected)
        images = [member for members in indices for member in members]
        return images, [label for label, members in enumerate(indices) for _ in members]

    def _val(self, images: Sequence[Member], kit: Devkit) -> tuple[list[Member], list[int]]:
        images = sorted(images, key=_number)
        numbers = [_number(image) for image in images]
        if numbers != list(range(1, len(kit.val_labels) + 1)):
            raise ValueError(
                f"{self.archive} has {len(images)} images, numbered {numbers[0]} … {numbers[-1]}; the development kit "
                f"has labels of 1 … {len(kit.val_labels)}. One of both is cut short or of another year: {DOWNLOAD}"
            )
        return list(images), kit.val_labels

    def _members(self, offset: int, size: int) -> list[Member]:
        """Index of the tar archive that lies at this place of the file; offsets are those of the whole file."""
        try:
            with _Part(self.archive, offset, size) as part, tarfile.open(fileobj=part, mode="r:") as archive:
                files = [Member(m.name, offset + m.offset_data, m.size) for m in archive if m.isfile()]
        except tarfile.TarError as error:
            raise ValueError(f"{self.archive} is no tar archive, or is damaged at byte {offset} ({error})") from error
        for member in files:
            if member.offset + member.size > offset + size:
                raise ValueError(f"{self.archive} is cut short within {member.name}: {DOWNLOAD}")
        return files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        size = int(self._sizes[index])
        content = os.pread(self._descriptor, size, int(self._offsets[index]))
        if len(content) != size:
            raise ValueError(f"{self.archive} has changed: {len(content)} of {size} bytes at {self._offsets[index]}")
        return Sample(self._names[index].decode(), int(self.labels[index]), content)

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.archive, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_descriptor"}

    def fingerprint(self) -> str:
        """Of names, labels and places."""
        return sha256(self._names.tobytes(), self.labels.tobytes(), self._offsets.tobytes())

    def total_bytes(self) -> int:
        """Exact."""
        return int(self._sizes.sum())


def _number(image: Member) -> int:
    match = VAL_IMAGE.fullmatch(image.name)
    assert match is not None
    return int(match[1])


class _Part(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file: tarfile wants one for an archive within an archive."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._size - self._at, 0))
        content = os.pread(self._file.fileno(), wanted, self._offset + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
