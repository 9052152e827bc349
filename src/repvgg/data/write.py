"""Write a .beton file so that it is either complete and verified, or not there.

FFCV's writer waits for ever when a worker dies or a sample raises, forks a process that already has threads, and
leaves a plausible file behind when it is killed. So it runs in a fresh process of its own (`write_process`), in a
process group that is killed as a whole, writes to a name beside the target, and only a file whose every record was
decoded gets the target's name.
"""

import fcntl
import json
import logging
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from repvgg.data.manifest import DatasetMissingError, Manifest, manifest_path, read_manifest
from repvgg.data.sources import ImageSource, describe_digits, digits
from repvgg.data.verify import content_sha256, verify_beton

log = logging.getLogger(__name__)


class WriteError(ValueError):
    """Writing failed, mostly for what the source holds; the target is as it was before."""


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored. `max_resolution` bounds the *longer* side in pixels (null: keep the size).

    `proportion` stores each image as JPEG with `compress_probability`, else as raw pixels: faster to read, larger.
    """

    write_mode: Literal["jpg", "raw", "proportion"] = "jpg"
    max_resolution: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.write_mode not in ("jpg", "raw", "proportion"):
            raise ValueError(f"write_mode must be jpg, raw or proportion, got {self.write_mode!r}")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"max_resolution must be at least 1 pixel (or null), got {self.max_resolution}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in 1 … 100, got {self.jpeg_quality}")
        if not 0 <= self.compress_probability <= 1:
            raise ValueError(f"compress_probability must lie in 0 … 1, got {self.compress_probability}")


@dataclass(frozen=True)
class Request:
    """What the writing process is told."""

    source: ImageSource
    target: Path
    options: WriteOptions
    seed: int
    num_workers: int
    error_file: Path
    """JSON text of the first error. Its existence means failure."""


def write_beton(
    source: ImageSource,
    path: str | Path,
    *,
    options: WriteOptions,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Write `source`, shuffled by `seed`, with `num_workers` processes (None: one per allowed core).

    Raise WriteError, which names the sample where one is to blame; an existing file is then left alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        return _write(source, path, options, seed, num_workers or len(os.sched_getaffinity(0)), progress)


def _write(
    source: ImageSource, path: Path, options: WriteOptions, seed: int, num_workers: int, progress: bool
) -> Manifest:
    if len(source) == 0:
        raise ValueError(f"{source.description} holds no images")
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            error_file = Path(scratch) / "error.json"
            _run_writer(Request(source, partial, options, seed, num_workers, error_file), scratch, progress)
        records = verify_beton(partial, decode=True)
        if len(records) != len(source):
            raise WriteError(f"{partial} holds {len(records)} of {len(source)} samples")
        manifest = Manifest(
            samples=len(records),
            classes=list(source.classes),
            samples_per_class=np.bincount(records.labels, minlength=len(source.classes)).tolist(),
            options=_settings(options, seed),
            content_sha256=content_sha256(records),
            versions=_versions(),
            source=source.description,
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # A crash between these steps leaves a manifest without data, which counts as missing; never data that
        # looks complete beside no manifest or that of other data.
        path.unlink(missing_ok=True)
        manifest.write(manifest_path(path))
        partial.replace(path)
        _sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def _run_writer(request: Request, scratch: str, progress: bool) -> None:
    request_file = Path(scratch) / "request.pickle"
    request_file.write_bytes(pickle.dumps(request))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    if not progress:
        environment["TQDM_DISABLE"] = "1"  # FFCV's bar; read when tqdm is imported
    process = subprocess.Popen(
        [sys.executable, "-m", "repvgg.data.write_process", str(request_file)],
        env=environment,
        start_new_session=True,  # a process group of its own
    )
    try:
        code = process.wait()  # bounded: the process watches its workers and its own progress
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if request.error_file.exists():
        raise WriteError(json.loads(request.error_file.read_text(encoding="utf-8")))
    if code != 0:
        raise WriteError(f"the process that writes {request.target} ended with code {code}; its output is above")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer per target at a time, also between machines where the file system has locks."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that writes %s", path)
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when that process ends, however it ends
        yield


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settings(options: WriteOptions, seed: int) -> dict[str, Any]:
    return asdict(options) | {"seed": seed}


def _versions() -> dict[str, str]:
    packages = ("ffcv", "numpy", "opencv-python", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def ensure_beton(
    path: str | Path,
    make_source: Callable[[], ImageSource],
    *,
    description: str,
    options: WriteOptions,
    seed: int = 0,
    num_workers: int | None = None,
) -> Manifest:
    """Write the file unless a sound one with the same source description and settings is there.

    Safe when several processes call it at once: one writes, the others wait and find the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        manifest = _usable(path, description, _settings(options, seed))
        if manifest is None:
            log.info("writing %s (%s)", path, description)
            cores = len(os.sched_getaffinity(0))
            manifest = _write(make_source(), path, options, seed, num_workers or cores, progress=False)
    return manifest


def _usable(path: Path, description: str, settings: dict[str, Any]) -> Manifest | None:
    try:
        manifest = read_manifest(path)
        verify_beton(path)
    except DatasetMissingError:
        return None
    except ValueError as error:  # damaged file or manifest
        log.warning("%s Writing it again.", error)
        return None
    return manifest if (manifest.source, manifest.options) == (description, settings) else None


def ensure_digits(
    directory: str | Path, image_size: int = 32, val_fraction: float = 0.2, seed: int = 0, jpeg_quality: int = 90
) -> None:
    """Write train.beton and val.beton of the embedded digits into `directory`, unless they are there."""
    for split in ("train", "val"):
        ensure_beton(
            Path(directory) / f"{split}.beton",
            lambda split=split: digits(split, image_size, val_fraction, seed),  # type: ignore[misc]
            description=describe_digits(split, image_size, val_fraction, seed),
            options=WriteOptions(jpeg_quality=jpeg_quality),
            seed=seed,
        )
