"""The image files below a folder: each once, with all else that is there counted by its kind."""

# A million Path objects are slow.
# ruff: noqa: PTH112, PTH113, PTH114, PTH115, PTH118, PTH122, PTH206

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Those of torchvision's ImageFolder, so that both find the same images; upper and lower case.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
HIDDEN, NO_SUFFIX, TWICE, SPECIAL = "hidden", "without a suffix", "there already by another path", "special files"


@dataclass
class Listing:
    """What lies below a folder; names are relative to it.

    Attributes:
        images: sorted, folder by folder.
        folders: directly below, sorted, those that links lead to among them.
        not_read: how many files of which kind are not among the images, by the folder directly below; "" is for the
            files beside these folders.
        unreadable: paths of what cannot be listed, such as links that lead nowhere, and why.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    not_read: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def kinds(not_read: Mapping[str, int], most: int = 6) -> str:
    """``3 .gif, 1 hidden``; the most frequent first."""
    named = [f"{count} {kind}" for kind, count in sorted(not_read.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join([*named[:most], *(["…"] if len(named) > most else [])])


def list_images(root: Path) -> Listing:
    """Look for images at any depth, as torchvision's ImageFolder does, but for three things.

    Names that begin with a dot are passed over (``.ipynb_checkpoints``, macOS's ``._photo.jpg``). Links are followed
    when all that is no link has been seen, and only to what has not been seen: a loop of links ends, and no image
    comes twice. An error of the file system is noted with its path.
    """
    found = Listing()
    entered: set[str] = set()
    folders = [("", os.path.realpath(root))]
    links: list[tuple[str, str]] = []
    linked_files: list[tuple[str, str]] = []
    while folders or links:
        name, path = folders.pop() if folders else heapq.heappop(links)
        try:
            if os.path.islink(path):
                path = _target(path)
                if not os.path.isdir(path):
                    linked_files.append((name, path))
                    continue
                _note_folder(found, name)
            if path in entered:
                _leave(found, os.path.join(name, ""), TWICE)
                continue
            entered.add(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    below = os.path.join(name, entry.name)
                    if entry.name.startswith("."):
                        _leave(found, below, HIDDEN)
                    elif entry.is_symlink():
                        heapq.heappush(links, (below, entry.path))
                    elif entry.is_dir(follow_symlinks=False):
                        _note_folder(found, below)
                        folders.append((below, entry.path))
                    elif not entry.is_file(follow_symlinks=False):
                        _leave(found, below, SPECIAL)
                    elif _is_image(entry.name):
                        found.images.append(below)
                    else:
                        _leave(found, below, _kind(entry.name))
        except OSError as error:
            found.unreadable.append((os.path.join(root, name), f"cannot be read: {error.strerror}"))
    seen: set[str] = set()
    for name, path in linked_files:
        folder, file = os.path.split(path)
        if not _is_image(name):
            _leave(found, name, _kind(name))
        elif not os.path.isfile(path):
            _leave(found, name, SPECIAL)
        elif path in seen or (folder in entered and _is_image(file) and not file.startswith(".")):
            _leave(found, name, TWICE)
        else:
            seen.add(path)
            found.images.append(name)
    found.images.sort(key=lambda name: name.split(os.sep))
    found.folders.sort()
    return found


def _target(link: str) -> str:
    try:
        return os.path.realpath(link, strict=True)
    except OSError as error:
        raise OSError(error.errno, f"it is a link to {os.readlink(link)}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or NO_SUFFIX


def _note_folder(found: Listing, name: str) -> None:
    if os.sep not in name:
        found.folders.append(name)


def _leave(found: Listing, name: str, kind: str) -> None:
    folder, inside, _ = name.partition(os.sep)
    found.not_read[folder if inside else ""][kind] += 1
