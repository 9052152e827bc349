"""Image files that a user names: found, and opened as the writer of data sets opens them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from repvgg.data.encode import to_rgb
from repvgg.data.sources import IMAGE_SUFFIXES


class UnreadableImageError(ValueError):
    """A file is no image, or a damaged one."""


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, folders as the image files below them, in the order of their names.

    Raises:
        ValueError: a path that does not exist, a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: there is no such file")
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(path, followlinks=True)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
        if not below:
            raise ValueError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        found += below
    return found


def open_image(path: Path) -> Image.Image:
    """In RGB; rotation notes in EXIF are ignored, as in the data sets.

    Raises:
        UnreadableImageError: whatever PIL makes of the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PIL's about notes and large images; what counts is whether pixels come out
            with Image.open(path) as image:
                return to_rgb(image)
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path} cannot be read as an image: it is of no format that PIL reads") from None
    except Exception as error:  # PIL raises nearly anything
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error
