"""Image files that a user names: found, and opened as the writer of data sets opens them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from repvgg.data.encode import to_rgb
from repvgg.data.folders import IMAGE_SUFFIXES, kinds, list_images


class UnreadableImageError(ValueError):
    """A file is no image, or a damaged one."""


class Found(NamedTuple):
    """Image files; what cannot be listed, a line each; and how many files of which kind lie there besides."""

    files: list[Path]
    unreadable: list[str]
    not_read: Counter[str]


def find_images(paths: Iterable[str | Path]) -> Found:
    """Files as they are, folders as the image files below them, in the order of their names.

    Of a folder what :func:`repvgg.data.folders.list_images` finds.

    Raises:
        ValueError: a path that does not exist, a folder without images.
    """
    found = Found([], [], Counter())
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: there is no such file")
        if not path.is_dir():
            found.files.append(path)
            continue
        below = list_images(path)
        not_read = sum(below.not_read.values(), Counter[str]())
        unreadable = [f"{name} {reason}" for name, reason in below.unreadable]
        if not below.images:
            there = "; ".join([*([f"not read: {kinds(not_read)}"] if not_read else []), *unreadable[:1]])
            raise ValueError(
                f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})" + (f"; {there}" if there else "")
            )
        found.files.extend(path / name for name in below.images)
        found.unreadable.extend(unreadable)
        found.not_read.update(not_read)
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
