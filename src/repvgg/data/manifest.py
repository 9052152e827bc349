"""What a .beton file holds, in a JSON file beside it.

Standard library only: the training script looks for its data files before it imports anything heavy.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from repvgg.classes import difference
from repvgg.files import replacing


class DatasetMissingError(ValueError):
    """A data file is not where the configuration says."""


@dataclass(frozen=True)
class Manifest:
    """The sidecar of one .beton file.

    `content_sha256` covers labels and encoded images in record order, not the file: FFCV's writer lays the same
    records out differently every time.
    """

    samples: int
    classes: list[str]
    samples_per_class: list[int]
    options: dict[str, Any]
    content_sha256: str
    versions: dict[str, str]
    source: str
    source_sha256: str = ""
    """The source's fingerprint."""
    bytes: int = 0
    """Of the whole file."""
    pixels: dict[str, list[int]] = field(default_factory=dict)
    """Smallest, median and largest shorter_side and longer_side."""
    stored: dict[str, int] = field(default_factory=dict)
    """How many records hold the bytes of a JPEG file as it was, a JPEG encoded anew, raw pixels."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Name of and reason for every image that was left out (on_bad=skip)."""
    damaged: list[str] = field(default_factory=list)
    """Names of images whose files are faulty; PIL made something of them, and that is stored."""
    class_words: list[str] | None = None
    """For readers, where `classes` are mere codes."""

    @property
    def names(self) -> dict[str, list[str]]:
        """`classes`, and `class_words` where there are some; none of an adopted file, whose classes are numbers."""
        if not self.options:
            return {}
        return {"classes": self.classes} | ({} if self.class_words is None else {"class_words": self.class_words})

    def write(self, path: Path) -> None:
        """Write atomically: the file under `path` is either the old one or complete."""
        with replacing(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def manifest_path(beton: str | Path) -> Path:
    """`train.beton` -> `train.beton.json`."""
    beton = Path(beton)
    return beton.with_name(beton.name + ".json")


def read_manifest(beton: str | Path) -> Manifest:
    """Raise DatasetMissingError when there is no sidecar, ValueError when it cannot be understood."""
    path = manifest_path(beton)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetMissingError(
            f"{path} does not exist, so {beton} was not written by this repository or not to its end. "
            "Write it again: python src/write_dataset.py data=…\n"
            f"or, if FFCV's own writer made it, have it checked and {path.name} written: "
            f"python src/write_dataset.py adopt=true data=… data.dir={Path(beton).parent}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Write the data again.") from None
    known = {entry.name for entry in fields(Manifest)}
    required = {entry.name for entry in fields(Manifest) if entry.default is entry.default_factory is MISSING}
    if not isinstance(content, dict) or not required <= set(content) <= known:
        raise ValueError(f"{path} must hold the keys {sorted(required)}. Write the data again.")
    return Manifest(**content)


def suggested(write_command: str, directory: str | Path) -> str:
    """The command that writes the files of a directory, with the images of ``train/`` and ``val/`` there, if any."""
    splits = {split: Path(directory).absolute() / split for split in ("train", "val")}
    begin, found, _ = write_command.partition(" data.dir=")
    if not found or not all(folder.is_dir() for folder in splits.values()):
        return write_command
    places = {"data.dir": directory, **{f"source.{split}": folder for split, folder in splits.items()}}
    return " ".join([begin, *(shlex.quote(f"{key}={place}") for key, place in places.items())])


def require_files(paths: Mapping[str, str | Path], write_command: str) -> None:
    """Raise DatasetMissingError unless every file exists.

    `paths` maps what a file is for ("train_file") to where it should be.
    """
    missing = {what: Path(path).absolute() for what, path in paths.items() if not Path(path).is_file()}
    if missing:
        directory = next(iter(missing.values())).parent
        looked_at = "\n".join(f"  {what}: {path}" for what, path in missing.items())
        raise DatasetMissingError(
            f"The data files are not there. Looked for\n{looked_at}\n"
            f"Write them with\n  {suggested(write_command, directory)}\n"
            "or try without a data set of your own: data=digits"
        )


def number_of_classes(paths: Mapping[str, str | Path], stated: int | None) -> int:
    """How many classes the files of `paths` have, by their manifests.

    Raise ValueError when they differ from each other, by number or name, or from `stated` unless that is None.
    """
    manifests = {what: read_manifest(path) for what, path in paths.items()}
    found = {what: len(manifest.classes) for what, manifest in manifests.items()}
    for what, classes in found.items():
        if stated is not None and classes != stated:
            raise ValueError(
                f"{paths[what]} has {classes} classes, data.num_classes={stated}: set data.num_classes={classes}"
            )
    if len(set(found.values())) != 1:
        counts = ", ".join(f"{paths[what]} has {classes}" for what, classes in found.items())
        raise ValueError(
            f"The data files have different numbers of classes: {counts}. Write them from the same classes."
        )
    (first, names), *rest = ((str(paths[what]), m.names.get("classes")) for what, m in manifests.items())
    for path, others in rest:
        if differing := difference(names, others, first, path):
            raise ValueError(f"The data files have different classes: {differing}. Write them from the same classes.")
    return next(iter(found.values()))
