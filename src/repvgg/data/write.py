"""Write a .beton file so that it is either complete and verified, or not there.

Not with FFCV's writer: that one waits for ever when a worker dies or a sample raises, cannot continue after a stop,
cannot store the bytes of a JPEG as they are, and lays the records out differently every time. Here worker processes
read and encode (`workers`, `encode`), this one appends their records in order (`partial`), and the bytes of the file
are a function of source, options and seed alone. The format is FFCV's (`verify`), readable by its Loader.
"""

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from multiprocessing import current_process
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import features

from repvgg.data.encode import Bad, StoredAs, WriteOptions
from repvgg.data.manifest import DatasetMissingError, Manifest, manifest_path, read_manifest
from repvgg.data.partial import PartialBeton
from repvgg.data.patches import describe_patches, patches
from repvgg.data.progress import progress as shown
from repvgg.data.sources import ImageSource, describe_digits, digits
from repvgg.data.verify import Records, content_sha256, read_records, verify_beton
from repvgg.data.workers import WorkerError, encode_all

__all__ = [
    "OnBad",
    "WriteError",
    "WriteOptions",
    "adopt_beton",
    "ensure_beton",
    "ensure_digits",
    "ensure_patches",
    "write_beton",
]

log = logging.getLogger(__name__)

OnBad = Literal["stop", "skip"]

REVISION = 2
"""To be raised when the same request gives other bytes: no file is begun by one revision and ended by another."""
WORTH_WORKERS = 2000
"""With fewer images than this, starting processes takes longer than encoding."""


class WriteError(ValueError):
    """Writing failed, mostly for what the source holds; the target is as it was before."""


def write_beton(
    source: ImageSource,
    path: str | Path,
    *,
    options: WriteOptions,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
    on_bad: OnBad = "stop",
) -> Manifest:
    """Write `source` in its order for `seed`, unless the same is there already; continue what was interrupted.

    With `num_workers` processes; 0: in this one; None: one per allowed core, where there are enough images. A script
    that lets it start processes needs `if __name__ == "__main__":`. An image that does not decode ends the writing
    (`on_bad="stop"`) or is left out and listed in the manifest ("skip").

    Raise WriteError, which names the image where one is to blame. An existing file is then left alone, and so is what
    has been written of the new one: the same call continues.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad must be stop or skip, got {on_bad!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        return _write(source, path, options, seed, num_workers, progress, on_bad)


def _write(
    source: ImageSource,
    path: Path,
    options: WriteOptions,
    seed: int,
    num_workers: int | None = None,
    progress: bool = True,
    on_bad: OnBad = "stop",
) -> Manifest:
    if len(source) == 0:
        raise ValueError(f"{source.description} holds no images")
    unreadable = [Bad(name, reason, skippable=True) for name, reason in source.unreadable]
    for bad in unreadable:
        _skip_or_stop(bad, source, on_bad)
    settings, fingerprint = _settings(options, seed), source.fingerprint()
    there = _usable(path, source.description, settings)
    if there is not None and there.source_sha256 == fingerprint and not (there.skipped and on_bad == "stop"):
        log.info("%s is there already, complete", path)
        return there
    order = source.order(seed)
    if not np.array_equal(np.sort(order), np.arange(len(source))):
        raise ValueError(f"{source.description}: order({seed}) must name every sample once")
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if len(source) >= WORTH_WORKERS else 0
    request = {"source": source.description, "source_sha256": fingerprint} | settings
    request |= {"revision": REVISION} | {name: _versions()[name] for name in ("libjpeg_turbo", "numpy", "pillow")}
    with PartialBeton(path, request, len(source), keep_skipped=on_bad == "skip") as partial:
        _require_space(source, partial.path)
        try:
            _fill(partial, source, order, options, seed, num_workers, progress, on_bad)
            if partial.records == 0:
                raise WriteError(f"{source.description}: none of {partial.done} images decodes")
            partial.finish()
        except OSError as error:
            raise WriteError(f"{partial.path}: {error}. Mend that, and the same command continues.") from error
        except (KeyboardInterrupt, SystemExit):
            log.warning(
                "stopped after %d of %d images of %s: the same command continues", partial.done, len(source), path
            )
            raise
    records = verify_beton(partial.path)
    manifest = Manifest(
        classes=list(source.classes),
        options=settings,
        source=source.description,
        source_sha256=fingerprint,
        content_sha256=partial.digest.hexdigest(),
        stored={kind.name.lower(): int(partial.stored_as[kind]) for kind in StoredAs},
        skipped=[*({"name": bad.name, "reason": bad.reason} for bad in unreadable), *partial.skipped],
        damaged=partial.damaged,
        class_words=None if source.class_words is None else list(source.class_words),
        **_counts(records, len(source.classes)),
    )
    # A crash between these steps leaves a manifest without data, which counts as missing; never data that looks
    # complete beside no manifest or that of other data.
    path.unlink(missing_ok=True)
    manifest.write(manifest_path(path))
    partial.path.replace(path)
    _sync_directory(path.parent)
    partial.remove()
    return manifest


def _fill(
    partial: PartialBeton,
    source: ImageSource,
    order: np.ndarray[Any, np.dtype[np.int64]],
    options: WriteOptions,
    seed: int,
    num_workers: int,
    progress: bool,
    on_bad: OnBad,
) -> None:
    """Append all samples that are not there yet."""
    chunks = [order[at : at + source.chunk].tolist() for at in range(partial.done, len(order), source.chunk)]
    if not chunks:
        return
    encoding = encode_all(source, chunks, options, seed=seed, num_workers=min(num_workers, len(chunks)))
    title = f"writing {partial.path.name.removesuffix('.partial')}"
    try:
        with closing(encoding), shown(title, len(source), done=partial.done, enabled=progress) as advance:
            for outcomes in encoding:
                for outcome in outcomes:
                    if isinstance(outcome, Bad):
                        _skip_or_stop(outcome, source, on_bad)
                    elif outcome.damaged is not None:
                        log.warning("%s is damaged; stored is what decodes", outcome.damaged)
                    partial.add(outcome)
                advance(len(outcomes))
    except WorkerError as error:
        raise WriteError(f"{partial.path}: {error}. The same command continues.") from None


def _skip_or_stop(bad: Bad, source: ImageSource, on_bad: OnBad) -> None:
    if on_bad == "skip" and bad.skippable:
        log.warning("left out: %s %s", bad.name, bad.reason)
        return
    hint = " Repair it, or leave such images out with on_bad=skip; both continue here." if bad.skippable else ""
    raise WriteError(f"{bad.name} of {source.description} {bad.reason}.{hint}")


def _counts(records: Records, classes: int) -> dict[str, Any]:
    """The part of a manifest that can be read off the file."""
    sides = np.stack([records.images["width"], records.images["height"]])
    pixels = {"shorter_side": sides.min(axis=0), "longer_side": sides.max(axis=0)}
    return {
        "samples": len(records),
        "samples_per_class": np.bincount(records.labels, minlength=classes).tolist(),
        "bytes": records.path.stat().st_size,
        "pixels": {name: [int(v) for v in (x.min(), np.median(x), x.max())] for name, x in pixels.items()},
        "versions": _versions(),
    }


def _require_space(source: ImageSource, partial: Path) -> None:
    """Raise WriteError when the disk is certainly too full, warn when it may be."""
    needed = source.total_bytes()
    if needed is None:
        return
    usable = shutil.disk_usage(partial.parent).free + partial.stat().st_blocks * 512
    message = f"{partial.parent.absolute()} has {usable / 1e9:.1f} GB free for {needed / 1e9:.1f} GB of images"
    if usable < needed / 50:  # a fiftieth: 500×375 pixels become 70×53
        raise WriteError(f"{message}. Free some, or write elsewhere with data.dir=/path.")
    if usable < needed:
        log.warning("%s; what is stored may need less, or more", message)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer per target at a time, also between machines where the file system has locks."""
    if getattr(current_process(), "_inheriting", False):
        # A worker, importing the script that started it, would wait here for its own parent.
        raise WriteError('the script that writes with several processes needs `if __name__ == "__main__":` around it')
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
    packages = {name: version(name) for name in ("ffcv", "numpy", "pillow")}
    return {"python": platform.python_version(), "libjpeg_turbo": str(features.version("libjpeg_turbo")), **packages}


def adopt_beton(path: str | Path, *, classes: int | None = None, progress: bool = True) -> Manifest:
    """Check a file that another writer of the format made, as ffcv-imagenet does, and give it a manifest.

    Every record is decoded. The file does not say what the classes are called: they get numbers, as many as
    `classes`, or as the labels need. Raise CorruptDatasetError. A manifest that is there is left alone.
    """
    path = Path(path)
    with _locked(path):
        if manifest_path(path).is_file():
            verify_beton(path, decode=True, show_progress=progress)
            return read_manifest(path)
        records = verify_beton(path, decode=True, show_progress=progress)
        classes = classes or int(records.labels.max()) + 1
        manifest = Manifest(
            classes=[str(number) for number in range(classes)],
            options={},
            source=f"adopted from another writer: {path.name}",
            content_sha256=content_sha256(records),
            **_counts(records, classes),
        )
        manifest.write(manifest_path(path))
    return manifest


def classes_needed(paths: list[Path]) -> int:
    """How many classes the labels of these files need together."""
    return max(int(read_records(path).labels.max()) for path in paths) + 1


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
            manifest = _write(make_source(), path, options, seed, num_workers, progress=False)
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
    settings = (image_size, val_fraction, seed)
    _ensure_splits(directory, digits, describe_digits, settings, jpeg_quality, seed)


def ensure_patches(directory: str | Path, image_size: int = 32, seed: int = 0, jpeg_quality: int = 90) -> None:
    """Write train.beton and val.beton of the embedded photographs' patches into `directory`, unless they are there."""
    _ensure_splits(directory, patches, describe_patches, (image_size, seed), jpeg_quality, seed)


def _ensure_splits(
    directory: str | Path,
    source: Callable[..., ImageSource],
    describe: Callable[..., str],
    settings: tuple[Any, ...],
    jpeg_quality: int,
    seed: int,
) -> None:
    for split in ("train", "val"):
        ensure_beton(
            Path(directory) / f"{split}.beton",
            partial(source, split, *settings),
            description=describe(split, *settings),
            options=WriteOptions(jpeg_quality=jpeg_quality),
            seed=seed,
        )
