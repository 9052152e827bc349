"""A .beton file while it is written: `X.beton.partial`, and a journal beside it of what it holds.

Records are appended in order. The journal is JSON lines: first the request, then one line per sample. A line is
written only after the bytes it describes are on disk, so whatever stops the writing, a kill or a crash of the machine,
the file up to the last whole line is good, and the same request continues there.

Layout: see `verify`. Image data begins where it would if every sample became a record, so that addresses do not
depend on how many are left out.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from repvgg.data.encode import PAGE_BYTES, Bad, Encoded, StoredAs
from repvgg.data.ffcv_setup import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType
from repvgg.data.verify import FIELD_TYPE_IDS, FIELDS, JPG, METADATA, METADATA_START, RAW, add_content

log = logging.getLogger(__name__)

SYNC_RECORDS = 4096
SYNC_S = 10.0
"""What may be lost in a crash: this many records, or what was written in this time."""


class PartialBeton:
    """Open, or begin, the partial file of `target`; `samples` is how many the source has.

    What is there is continued if it was written for the same `request` (plain JSON values), else begun anew.
    Without `keep_skipped`, it continues before the first sample that was left out.
    """

    def __init__(self, target: Path, request: dict[str, Any], samples: int, *, keep_skipped: bool) -> None:
        self.path = target.with_name(target.name + ".partial")
        self.journal_path = self.path.with_name(self.path.name + ".journal")
        self.rows = np.zeros(samples, METADATA)
        self.sizes = np.zeros(samples, np.uint64)
        self.stored_as = np.zeros(len(StoredAs), np.int64)
        """How many records there are of each kind."""
        self.skipped: list[dict[str, str]] = []
        self.damaged: list[str] = []
        self.digest = hashlib.sha256()
        self.records = 0
        data_start = METADATA_START + self.rows.nbytes
        self._end = -(-data_start // PAGE_BYTES) * PAGE_BYTES
        self._lines: list[str] = []
        self._synced = time.monotonic()
        first_line = json.dumps({**request, "samples": samples}, sort_keys=True) + "\n"
        kept = self._read(first_line, keep_skipped=keep_skipped)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._journal = os.open(self.journal_path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._journal, kept)
        os.ftruncate(self._file, self._end if self.records else 0)
        if not kept:
            self._lines.append(first_line)
            self.sync()

    @property
    def done(self) -> int:
        """Samples dealt with, stored or left out."""
        return self.records + len(self.skipped)

    def add(self, outcome: Encoded | Bad) -> None:
        """Append a record, or note that a sample is left out."""
        if isinstance(outcome, Bad):
            line: list[Any] = [outcome.name, outcome.reason]
        else:
            _pwrite(self._file, outcome.content, self._place(len(outcome.content)))
            line = [*outcome[:4], len(outcome.content), zlib.crc32(outcome.content), outcome.damaged]
        self._count(outcome)
        self._lines.append(json.dumps(line) + "\n")
        if len(self._lines) >= SYNC_RECORDS or time.monotonic() - self._synced >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Bring the data to disk, then the lines about it."""
        os.fsync(self._file)
        text = "".join(self._lines).encode()
        _pwrite(self._journal, text, os.fstat(self._journal).st_size)
        os.fsync(self._journal)
        self._lines.clear()
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Write the tables: from here on it is a whole .beton file."""
        rows, sizes = self.rows[: self.records], self.sizes[: self.records]
        table = np.zeros(self.records, ALLOC_TABLE_TYPE)
        table["sample_id"], table["ptr"], table["size"] = np.arange(self.records), rows["f0"]["data_ptr"], sizes
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(FIELDS), PAGE_BYTES
        header["num_samples"], header["alloc_table_ptr"] = self.records, self._end
        descriptors = np.zeros(len(FIELDS), FieldDescType)
        descriptors["type_id"] = FIELD_TYPE_IDS
        for descriptor, name in zip(descriptors, FIELDS, strict=True):
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        _pwrite(self._file, table.tobytes(), self._end)
        _pwrite(self._file, header.tobytes() + descriptors.tobytes() + rows.tobytes(), 0)
        os.fsync(self._file)

    def remove(self) -> None:
        """Remove both files, or what is left of them."""
        for path in (self.path, self.journal_path):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None and self._lines:
                self.sync()
        except OSError as second:  # a full disk, mostly: what was synced before is kept
            log.warning("%s: %s", self.path, second)
        finally:
            os.close(self._file)
            os.close(self._journal)

    def _place(self, size: int) -> int:
        """Where a record of `size` bytes goes: after the last one, but not across the end of a page."""
        room = -self._end % PAGE_BYTES
        return self._end + room if size > room else self._end

    def _count(self, outcome: Encoded | Bad) -> None:
        """Keep the books for what has been written."""
        if isinstance(outcome, Bad):
            self.skipped.append({"name": outcome.name, "reason": outcome.reason})
            return
        mode = RAW if outcome.stored_as == StoredAs.RAW else JPG
        address = self._place(len(outcome.content))
        image = self.rows["f0"][self.records : self.records + 1]
        image["mode"], image["height"], image["width"], image["data_ptr"] = mode, outcome.height, outcome.width, address
        self.rows["f1"][self.records] = outcome.label
        self.sizes[self.records] = len(outcome.content)
        self._end = address + len(outcome.content)
        self.stored_as[outcome.stored_as] += 1
        if outcome.damaged is not None:
            self.damaged.append(outcome.damaged)
        add_content(self.digest, outcome.label, mode, outcome.height, outcome.width, outcome.content)
        self.records += 1

    def _read(self, first_line: str, *, keep_skipped: bool) -> int:
        """Take over what an earlier writing left; return how many bytes of its journal hold."""
        if not (self.path.is_file() and self.journal_path.is_file()):
            return 0
        with self.journal_path.open("rb") as journal, self.path.open("rb") as data:
            found = journal.readline().decode(errors="replace")
            if found != first_line:
                log.warning("%s was begun for %s: beginning anew", self.path, _difference(found, first_line))
                return 0
            log.info("%s: reading back what is there", self.path)
            kept = journal.tell()
            for line in journal:
                outcome = self._outcome(line, data.fileno())
                if outcome is None or (isinstance(outcome, Bad) and not keep_skipped) or self.done == len(self.rows):
                    break
                self._count(outcome)
                kept += len(line)
        log.info("%s: continuing after %d of %d images", self.path, self.done, len(self.rows))
        return kept

    def _outcome(self, line: bytes, data: int) -> Encoded | Bad | None:
        """What a journal line says; None when it was not written to its end, or the data is not what it says."""
        try:
            row = json.loads(line) if line.endswith(b"\n") else []
        except ValueError:
            return None
        if len(row) == 2:
            return Bad(row[0], row[1], skippable=True)
        if len(row) != 7:
            return None
        stored_as, height, width, label, size, checksum, damaged = row
        content = os.pread(data, size, self._place(size))
        if len(content) != size or zlib.crc32(content) != checksum:
            return None
        return Encoded(StoredAs(stored_as), height, width, label, content, damaged)


def _pwrite(descriptor: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _difference(found: str, wanted: str) -> str:
    """Names the values in which two first lines differ."""
    try:
        old, new = json.loads(found), json.loads(wanted)
        return ", ".join(f"{key} {old.get(key)!r}" for key in new if old.get(key) != new[key]) or "something else"
    except (ValueError, AttributeError):
        return "something unreadable"
