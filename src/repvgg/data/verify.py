"""Is a .beton file what its writer meant it to be? Checked before every opening, because FFCV does not.

A writer that was killed leaves a file of full size that opens without an error and serves black images, and so do
a truncated allocation table and a zeroed JPEG.

Layout of the file (FFCV 1.0.2): header, field descriptors, one metadata row per sample, then pages of image data
from the next multiple of the page size, then the allocation table up to the end of the file. A table row is
(sample, address, bytes).
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg.data.encode import decodes
from repvgg.data.ffcv_setup import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    get_metadata_type,
)
from repvgg.data.manifest import DatasetMissingError, Manifest, manifest_path, read_manifest
from repvgg.data.progress import Advance, progress

JPG, RAW = 0, 1
MARKERS_LOOKED_AT = 1024
FIELDS = {"image": RGBImageField, "label": IntField}
FIELD_TYPE_IDS = (2, 1)
METADATA = np.dtype(get_metadata_type([RGBImageField(), IntField()]))
METADATA_START = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize


class CorruptDatasetError(ValueError):
    """A .beton file is damaged or was not written to its end."""


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


def _decode_all(records: Records, num_threads: int, advance: Advance) -> None:
    """Raise for the first JPEG record that FFCV's decoder rejects."""

    def decodes_or_is_raw(job: tuple[Any, NDArray[np.uint8]]) -> bool:
        image, content = job
        return bool(image["mode"] == RAW) or decodes(content, int(image["height"]), int(image["width"]))

    jobs = enumerate(zip(records.images, encoded(records), strict=True))
    with ThreadPoolExecutor(num_threads) as pool:
        while batch := list(islice(jobs, 1024)):  # bounded: pool.map would read everything at once
            for (index, _), good in zip(batch, pool.map(decodes_or_is_raw, [job for _, job in batch]), strict=True):
                if not good:
                    raise corrupt(records.path, f"record {index} does not decode")
            advance(len(batch))


def verify_beton(path: str | Path, *, decode: bool = False, show_progress: bool = False) -> Records:
    """Raise CorruptDatasetError, which names file and record, unless the file is sound.

    The tables are always checked, and the JPEG markers of at most 1024 records spread over the file: reading a
    byte of every record would read a whole ImageNet from a cold disk. `decode=True` decodes every record
    and compares the content hash with the manifest's, where there is one.
    """
    records = read_records(path)
    looked_at = len(records) if decode else min(len(records), MARKERS_LOOKED_AT)
    _check_markers(records, np.linspace(0, len(records) - 1, looked_at).astype(np.int64))
    manifest = read_manifest(path) if manifest_path(path).is_file() else None
    if manifest is not None:
        _check_manifest(records, manifest)
    if decode:
        with progress(f"decoding {records.path.name}", len(records), enabled=show_progress) as advance:
            _decode_all(records, len(os.sched_getaffinity(0)), advance)
        if manifest is not None and content_sha256(records) != manifest.content_sha256:
            raise corrupt(records.path, "holds other images or labels than its manifest says (content hash)")
    return records
