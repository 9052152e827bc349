"""Where images come from before they are written to a .beton file.

Here: arrays in memory, the embedded digits, class folders. ImageNet's own archives are in `ilsvrc`, the Hub's Parquet
and Arrow files in `huggingface`.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repvgg.data.folders import IMAGE_SUFFIXES, kinds, list_images

SIZES_LOOKED_AT = 1000


class Sample(NamedTuple):
    """One image: the bytes of its file, which may then be stored as they are, or a PIL image of any mode."""

    name: str
    """By which a person finds it again: errors, and the manifest's list of skipped images, show it."""
    label: int
    """An index into the source's classes."""
    image: bytes | Image.Image


class ImageSource(ABC):
    """A sized, indexable collection of images. It must pickle: worker processes read from it."""

    classes: Sequence[str]
    """Class names; a label is an index into them."""
    description: str
    """What this is, for the manifest: the same settings give the same words."""
    class_words: Sequence[str] | None = None
    """For readers, where `classes` are mere codes."""
    chunk: int = 32
    """Samples that a worker reads in one go."""
    not_read: Mapping[str, int] = {}
    """How many files of which kind lie there besides, and are no images to it."""
    unreadable: Sequence[tuple[str, str]] = ()
    """Names of what should be images and cannot be listed, and why: `on_bad` says what becomes of them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample; do not decode it.

        An OSError that names its file counts as an image that does not decode; all else that is raised here ends the
        writing.
        """

    def order(self, seed: int) -> NDArray[np.int64]:
        """The samples in the order of the records: shuffled, so that neighbours are not all of one class."""
        return np.random.default_rng(seed).permutation(len(self))

    def fingerprint(self) -> str:
        """Changes when samples are added, renamed or labelled anew. An interrupted writing continues only if not."""
        return str(len(self))

    def total_bytes(self) -> int | None:
        """About how large all images are together as they are stored now; None: unknown."""
        return None


def sha256(*parts: bytes) -> str:
    """Of all parts together, as hexadecimal digits; for fingerprints."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(frozen=True)
class InMemory(ImageSource):
    """Images held as one uint8 array of shape N×H×W (gray) or N×H×W×3, labels of shape (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    description: str
    image_size: int | None = None
    """Side in pixels to which images are resized (bicubic) when they are read; None leaves them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index])
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return Sample(f"image {index}", int(self.labels[index]), image)

    def fingerprint(self) -> str:
        """Of all pixels and labels."""
        return sha256(self.images.tobytes(), self.labels.tobytes())


def describe_digits(split: str, image_size: int, val_fraction: float, seed: int) -> str:
    """The `description` of `digits(…)`, without reading anything."""
    return f"scikit-learn digits, {split}, {image_size} px bicubic, val_fraction {val_fraction:g}, seed {seed}"


def digits(split: Literal["train", "val"], image_size: int = 32, val_fraction: float = 0.2, seed: int = 0) -> InMemory:
    """Scanned handwritten digits that scikit-learn ships: 1797 images of 8×8 pixels with 17 gray levels.

    From E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
    (1998), CC BY 4.0. The split is stratified and fixed by `seed`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if image_size < 8 or not 0 < val_fraction < 1:
        raise ValueError(f"digits need image_size ≥ 8 and 0 < val_fraction < 1, got {image_size} and {val_fraction}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    chosen = train_test_split(
        np.arange(len(data.target)), test_size=val_fraction, stratify=data.target, random_state=seed
    )[split == "val"]
    chosen = np.sort(chosen)
    return InMemory(
        images=np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8),
        labels=data.target[chosen].astype(np.int64),
        classes=[str(name) for name in data.target_names],
        description=describe_digits(split, image_size, val_fraction, seed),
        image_size=image_size,
    )


class ImageFolder(ImageSource):
    """`root/<class>/**/<image>`: one folder per class, classes and files in sorted order (ImageNet's layout).

    See :func:`repvgg.data.folders.list_images` for what is passed over.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.description = f"image folder {self.root.absolute()}"
        if not self.root.is_dir():
            raise ValueError(f"{self.root.absolute()} is not a folder. It should hold one folder per class.")
        listed = list_images(self.root)
        self.classes, self.unreadable = listed.folders, listed.unreadable
        if not self.classes:
            why = "".join(f" {path} {reason}." for path, reason in self.unreadable[:1])
            raise ValueError(f"{self.root.absolute()} holds no folders. It should hold one folder per class.{why}")
        label_of = {name: label for label, name in enumerate(self.classes)}
        # An image beside the class folders has no class.
        inside = [name for name in listed.images if os.sep in name]
        beside = [os.path.splitext(name)[1].lower() for name in listed.images if os.sep not in name]  # noqa: PTH122
        # One array: it travels to every worker.
        self._names = np.array([os.fsencode(name) for name in inside])
        self.labels = np.array([label_of[name.partition(os.sep)[0]] for name in inside], dtype=np.int64)
        self.not_read = Counter(f"{suffix} outside of a class folder" for suffix in beside)
        for counted in listed.not_read.values():
            self.not_read.update(counted)
        empty = sorted(set(self.classes) - {self.classes[label] for label in np.unique(self.labels)})
        if empty:
            folder = self.root / empty[0]
            there = kinds(listed.not_read[empty[0]])
            why = "".join(f" {path} {reason}." for path, reason in self.unreadable if Path(path).is_relative_to(folder))
            raise ValueError(
                f"{folder.absolute()} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
                f"{f', but {there}' if there else ''}.{why}"
            )

    def name(self, index: int) -> str:
        """Path below the root."""
        return os.fsdecode(bytes(self._names[index]))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        path = self.root / self.name(index)
        return Sample(str(path), int(self.labels[index]), path.read_bytes())

    def fingerprint(self) -> str:
        """Of all names and labels."""
        return sha256(self._names.tobytes(), self.labels.tobytes())

    def total_bytes(self) -> int:
        """Extrapolated from at most 1000 files: each costs a question to the file system."""
        looked_at = np.linspace(0, len(self) - 1, min(len(self), SIZES_LOOKED_AT)).astype(np.int64)
        return round(np.mean([_size(self.root / self.name(int(i))) for i in looked_at]) * len(self))


def _size(path: Path) -> int:
    """In bytes; 0 for what is no longer there, which will be named when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def require_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise ValueError unless labels mean the same in both."""
    if list(train.classes) != list(val.classes):
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{train.description} and {val.description} must have the same classes, in the same order; in one only: "
            f"{', '.join(differing[:10])}{' …' if len(differing) > 10 else ''}"
        )
