"""Is a .beton file what its writer meant it to be? Checked before every opening, because FFCV does not.

A writer that was killed leaves a file of full size that opens without an error and serves black images, and so do
a truncated allocation table and a zeroed JPEG.

Three looks, each at more than the one before: the tables (`verify_beton`, every opening), a sample of the images
(`check_beton`, before a training) and all of them with the content hash. Decoding finds what libjpeg can notice: of
4000 damages to photographs of 500×375 it noticed every cut, a fifth of the stretches that became zero and a fiftieth
of the single bits that were turned; what it does not notice decodes to another image. The content hash finds all.

Layout of the file (FFCV 1.0.2): header, field descriptors, one metadata row per sample, then pages of image data
from the next multiple of the page size, then the allocation table up to the end of the file. A table row is
(sample, address, bytes).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from repvgg.data.ffcv_setup import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    get_metadata_type,
)
from repvgg.data.jobs import JOB, run_jobs
from repvgg.data.manifest import DatasetMissingError, Manifest, manifest_path, read_manifest
from repvgg.data.progress import Advance, progress
from repvgg.files import replacing

log = logging.getLogger(__name__)

Check = Literal["sample", "full", "tables"]

JPG, RAW = 0, 1
MARKERS_LOOKED_AT = 1024
SAMPLE_PIXELS = 800_000_000
"""What `check="sample"` decodes: some 4000 images of 500×375, below 2 CPU-seconds and 300 MB. Fewer are all decoded."""
CHUNK = 1024
FIELDS = {"image": RGBImageField, "label": IntField}
FIELD_TYPE_IDS = (2, 1)
METADATA = np.dtype(get_metadata_type([RGBImageField(), IntField()]))
METADATA_START = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize


class CorruptDatasetError(ValueError):
    """A .beton file is damaged or was not written to its end."""

    exit_code = 2
    """Of a command that it ends: the message says enough, also in the middle of a training."""


def corrupt(path: str | Path, problem: str) -> CorruptDatasetError:
    """The error, with the way out."""
    return CorruptDatasetError(
        f"{path}: {problem}. The file is damaged or was not written to its end; delete it and write it again: "
        "python src/write_dataset.py data=… (data=digits writes its files by itself)"
    )


@dataclass(frozen=True)
class Records:
    """The parsed tables of one file. `images` has columns mode, width, height, data_ptr; all have N rows."""

    path: Path
    images: NDArray[Any]
    labels: NDArray[np.int64]
    sizes: NDArray[np.uint64]
    """Bytes of each record's image."""

    def __len__(self) -> int:
        return len(self.labels)


def _require(condition: bool, path: Path, problem: str) -> None:
    if not condition:
        raise corrupt(path, problem)


def _first(path: Path, bad: NDArray[np.bool_], problem: str) -> None:
    """Raise for the first record that is bad."""
    if bad.any():
        raise corrupt(path, f"record {int(np.argmax(bad))} {problem} ({int(bad.sum())} such records)")


def read_records(path: str | Path) -> Records:
    """Parse the tables and check that they fit each other and the file's size."""
    path = Path(path)
    if not path.is_file():
        raise DatasetMissingError(f"{path.absolute()} does not exist. Write it: python src/write_dataset.py data=…")
    bytes_total = path.stat().st_size
    _require(bytes_total >= HeaderType.itemsize, path, f"has only {bytes_total} bytes")
    header = np.fromfile(path, dtype=HeaderType, count=1)[0]
    version, samples, table_start = (int(header[k]) for k in ("version", "num_samples", "alloc_table_ptr"))
    _require(version == CURRENT_VERSION, path, f"has format version {version} instead of {CURRENT_VERSION}")
    _require(int(header["num_fields"]) == len(FIELDS), path, "does not hold exactly an image and a label")
    _require(samples > 0, path, "holds no samples")
    _require(table_start != 0, path, "has no allocation table: its writer was stopped")
    data_start = METADATA_START + samples * METADATA.itemsize
    _require(
        data_start <= table_start and table_start + samples * ALLOC_TABLE_TYPE.itemsize == bytes_total,
        path,
        f"has {bytes_total} bytes, but {samples} samples and an allocation table at {table_start} were announced",
    )
    descriptors = np.fromfile(path, dtype=FieldDescType, count=len(FIELDS), offset=HeaderType.itemsize)
    _require(tuple(descriptors["type_id"]) == FIELD_TYPE_IDS, path, "does not hold an RGB image and an integer label")
    rows = np.fromfile(path, dtype=METADATA, count=samples, offset=METADATA_START)
    table = np.fromfile(path, dtype=ALLOC_TABLE_TYPE, count=samples, offset=table_start)
    table = table[np.argsort(table["ptr"])]
    images = rows["f0"]
    slot = np.minimum(np.searchsorted(table["ptr"], images["data_ptr"]), samples - 1)
    _first(path, table["ptr"][slot] != images["data_ptr"], "points at data that the allocation table does not list")
    sizes = table["size"][slot]
    ends = images["data_ptr"] + sizes
    _first(path, (images["data_ptr"] < data_start) | (ends > table_start), "lies outside the file's data")
    _first(path, (images["width"] == 0) | (images["height"] == 0), "has no width or height")
    _first(path, images["mode"] > RAW, "is neither JPEG nor raw pixels")
    pixels = 3 * images["width"].astype(np.uint64) * images["height"].astype(np.uint64)
    _first(path, (images["mode"] == RAW) & (sizes != pixels), "has not 3 × width × height bytes")
    _first(path, rows["f1"] < 0, "has a negative label")
    return Records(path, images, rows["f1"].astype(np.int64), sizes)


def _check_markers(records: Records, chosen: NDArray[np.int64]) -> None:
    """JPEG data begins with FF D8 and ends with FF D9."""
    chosen = chosen[records.images["mode"][chosen] == JPG]
    data = np.memmap(records.path, dtype=np.uint8, mode="r")
    start = records.images["data_ptr"][chosen].astype(np.int64)
    end = start + records.sizes[chosen].astype(np.int64)
    bad = (data[start] != 0xFF) | (data[start + 1] != 0xD8) | (data[end - 2] != 0xFF) | (data[end - 1] != 0xD9)
    if bad.any():
        raise corrupt(records.path, f"record {chosen[np.argmax(bad)]} is no JPEG image ({int(bad.sum())} such records)")


def _check_manifest(records: Records, manifest: Manifest) -> None:
    path = records.path
    _require(
        len(records) == manifest.samples, path, f"has {len(records)} samples, its manifest says {manifest.samples}"
    )
    _first(path, records.labels >= len(manifest.classes), f"has a label beyond the {len(manifest.classes)} classes")
    counts = np.bincount(records.labels, minlength=len(manifest.classes)).tolist()
    _require(counts == manifest.samples_per_class, path, "has other labels than its manifest counts")


def encoded(records: Records) -> Iterator[NDArray[np.uint8]]:
    """The stored bytes of each image, in record order."""
    data = np.memmap(records.path, dtype=np.uint8, mode="r")
    for start, size in zip(records.images["data_ptr"].tolist(), records.sizes.tolist(), strict=True):
        yield data[start : start + size]


def add_content(digest: "hashlib._Hash", label: int, mode: int, height: int, width: int, content: bytes) -> None:
    """Add one record to the content hash."""
    digest.update(f"{label} {mode} {height} {width} ".encode())
    digest.update(content)


def content_sha256(records: Records) -> str:
    """Hash of every record's label, mode, size and stored bytes, in record order."""
    digest = hashlib.sha256()
    for image, label, content in zip(records.images, records.labels, encoded(records), strict=True):
        add_content(digest, label, image["mode"], image["height"], image["width"], content.tobytes())
    return digest.hexdigest()


def _to_last_pixel(records: Records, chosen: NDArray[np.int64], memory: NDArray[np.uint8]) -> NDArray[Any]:
    """Jobs that ask for the lower right pixel: the whole of a JPEG is read for it, without making all its colours."""
    images = records.images[chosen]
    jobs = np.zeros(len(chosen), dtype=JOB)
    jobs["address"], jobs["bytes"] = np.uint64(memory.ctypes.data) + images["data_ptr"], records.sizes[chosen]
    jobs["jpg"] = images["mode"] == JPG
    jobs["height"], jobs["width"] = images["height"], images["width"]
    jobs["top"], jobs["left"] = jobs["height"] - 1, jobs["width"] - 1
    jobs["box_height"] = jobs["box_width"] = 1
    return jobs


def _decode(records: Records, chosen: NDArray[np.int64], advance: Advance) -> None:
    """Raise for the first of the chosen records that training could not decode."""
    memory = np.memmap(records.path, dtype=np.uint8, mode="r")
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(chosen), CHUNK):
            numbers = chosen[at : at + CHUNK]
            out = np.empty((len(numbers), 1, 1, 3), dtype=np.uint8)
            failure = run_jobs(_to_last_pixel(records, numbers, memory), out, pool, threads)
            if failure is not None:
                raise corrupt(records.path, f"record {numbers[failure[0]]} {failure[1]}")
            advance(len(numbers))


def verify_beton(path: str | Path, *, decode: bool = False, show_progress: bool = False) -> Records:
    """Raise CorruptDatasetError, which names file and record, unless the file is sound.

    The tables are always checked, and the JPEG markers of at most 1024 records spread over the file: reading a
    byte of every record would read a whole ImageNet from a cold disk. `decode=True` decodes every record
    and compares the content hash with the manifest's, where there is one; that the file is sound is then remembered.
    """
    path = Path(path)
    before = _state(path) if decode and path.is_file() else None
    if decode:
        _forget(path)
    records = read_records(path)
    looked_at = len(records) if decode else min(len(records), MARKERS_LOOKED_AT)
    _check_markers(records, np.linspace(0, len(records) - 1, looked_at).astype(np.int64))
    manifest = read_manifest(path) if manifest_path(path).is_file() else None
    if manifest is not None:
        _check_manifest(records, manifest)
    if before is not None:
        with progress(f"decoding {path.name}", len(records), enabled=show_progress) as advance:
            _decode(records, _in_file_order(records), advance)
        if manifest is not None and content_sha256(records) != manifest.content_sha256:
            raise corrupt(path, "holds other images or labels than its manifest says (content hash)")
        _remember(path, before)
    return records


def require_check(check: str) -> None:
    """Raise ValueError unless there is such a check."""
    if check not in get_args(Check):
        raise ValueError(f"data.check must be one of {', '.join(get_args(Check))}, got {check!r}")


def check_beton(path: str | Path, check: Check = "sample", *, show_progress: bool = False) -> None:
    """Raise CorruptDatasetError, which names file and record, for what is found before a training at little cost.

    `tables` reads no image. `sample` decodes images spread over the file; all of them, and their content hash, where
    they have less than SAMPLE_PIXELS together. `full` does so in any case. A file of which all has been decoded once
    is not decoded again, unless it has changed.
    """
    require_check(check)
    records = verify_beton(path)
    if check == "tables" or _is_remembered(records.path):
        return
    sample = _sample(records)
    if check == "full" or len(sample) == len(records):
        verify_beton(path, decode=True, show_progress=show_progress and check == "full")
        return
    with progress(f"decoding a sample of {records.path.name}", len(sample), enabled=show_progress) as advance:
        _decode(records, sample, advance)
    log.info(
        "%s: its tables and a sample of %d of %d images are sound (data.check=full looks at all)",
        *(records.path, len(sample), len(records)),
    )


def _in_file_order(records: Records) -> NDArray[np.int64]:
    """Record numbers, as disks like it."""
    return np.argsort(records.images["data_ptr"], kind="stable")


def _sample(records: Records) -> NDArray[np.int64]:
    """As many records as have SAMPLE_PIXELS together, in equal distances over the file."""
    pixels = records.images["width"].astype(np.int64) @ records.images["height"].astype(np.int64)
    count = min(len(records), max(1, len(records) * SAMPLE_PIXELS // int(pixels)))
    return _in_file_order(records)[np.linspace(0, len(records) - 1, count).astype(np.int64)]


def note_path(path: Path) -> Path:
    """Where it is remembered that `path` was sound: `.train.beton.checked`."""
    return path.with_name(f".{path.name}.checked")


def _state(path: Path) -> dict[str, int]:
    """What changes when a file is written to or put in another's place; a copy has another inode."""
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def _is_remembered(path: Path) -> bool:
    try:
        return bool(json.loads(note_path(path).read_text(encoding="utf-8")) == _state(path))
    except (OSError, ValueError):  # no note, or a broken one: look again
        return False


def _forget(path: Path) -> None:
    with suppress(OSError):  # a directory that cannot be written to
        note_path(path).unlink(missing_ok=True)


def _remember(path: Path, state: dict[str, int]) -> None:
    """Unless the file has changed meanwhile. Where nothing can be written, the next check looks again."""
    if _state(path) != state:
        return
    try:
        with replacing(note_path(path)) as note:
            note.write(json.dumps(state).encode())
    except OSError as error:
        log.debug("that %s is sound cannot be noted beside it: %s", path, error)
