"""Where images come from before they are written to a .beton file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageSource(Protocol):
    """A sized, indexable collection. It must pickle: writing happens in other processes."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is an index into them."""
        ...

    @property
    def description(self) -> str:
        """What this is, for the manifest: the same settings give the same words."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image in mode RGB, and its label."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Images held as one uint8 array of shape N×H×W (gray) or N×H×W×3, labels of shape (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    description: str
    image_size: int | None = None
    """Side in pixels to which images are resized (bicubic) when they are read; None leaves them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return image.convert("RGB"), int(self.labels[index])


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


class ImageFolder:
    """`root/<class>/**/<image>`: one folder per class, classes and files in sorted order (ImageNet's layout).

    Rotation notes in EXIF are ignored, as torchvision's ImageFolder does.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root.absolute()} is not a folder. It should hold one folder per class.")
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir())
        if not folders:
            raise ValueError(f"{self.root.absolute()} holds no folders. It should hold one folder per class.")
        self.classes: Sequence[str] = [folder.name for folder in folders]
        self.files: list[tuple[Path, int]] = []
        for label, folder in enumerate(folders):
            images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise ValueError(f"{folder.absolute()} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            self.files.extend((path, label) for path in images)

    @property
    def description(self) -> str:
        """The folder's path."""
        return f"image folder {self.root.absolute()}"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                return to_rgb(image), label
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def require_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise ValueError unless labels mean the same in both."""
    if list(train.classes) != list(val.classes):
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{train.description} and {val.description} must have the same classes; in one only: "
            f"{', '.join(differing[:10])}{' …' if len(differing) > 10 else ''}"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB; transparent pixels keep the colour stored under them.

    16-bit gray is scaled to 8 bit first: PIL would clip everything above 255 to white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # PIL warns about the direct way
    return image.convert("RGB")
