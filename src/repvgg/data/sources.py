"""Where images come from before they are written to a .beton file.

Here: arrays in memory, the embedded digits, class folders. ImageNet's own archives are in `ilsvrc`, the Hub's Parquet
and Arrow files in `huggingface`.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
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

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample; do not decode it. Whatever is raised here ends the writing."""

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
    """`root/<class>/**/<image>`: one folder per class, classes and files in sorted order (ImageNet's layout)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.description = f"image folder {self.root.absolute()}"
        if not self.root.is_dir():
            raise ValueError(f"{self.root.absolute()} is not a folder. It should hold one folder per class.")
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{self.root.absolute()} holds no folders. It should hold one folder per class.")
        names: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(self.classes):
            images = sorted(_images_below(self.root / folder), key=lambda name: name.split(os.sep))  # noqa: PTH206
            if not images:
                raise ValueError(
                    f"{(self.root / folder).absolute()} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})."
                )
            names += [os.path.join(folder, name) for name in images]  # noqa: PTH118 - a million Path objects are slow
            labels += [label] * len(images)
        # One array: it travels to every worker.
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

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
        return round(np.mean([(self.root / self.name(int(i))).stat().st_size for i in looked_at]) * len(self))


def _images_below(folder: Path) -> list[str]:
    """Relative names; links to folders are followed, as torchvision's ImageFolder does."""
    prefix = len(str(folder)) + 1
    return [
        os.path.join(parent, name)[prefix:]  # noqa: PTH118
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
    ]


def require_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise ValueError unless labels mean the same in both."""
    if list(train.classes) != list(val.classes):
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{train.description} and {val.description} must have the same classes, in the same order; in one only: "
            f"{', '.join(differing[:10])}{' …' if len(differing) > 10 else ''}"
        )
