"""The `.wandb` files that W&B's client keeps of every run, online too: records, and the rows that were logged.

A `.wandb` file is a LevelDB log with a 7-byte header of its own: `:W&B`, the number 0xBEE1 and a version. Then blocks
of 32 KiB hold chunks: checksum (u32, CRC-32 of kind and data, without LevelDB's masking), length (u16), kind (u8:
whole, first, middle, last), data. Whole or joined, the data is one `wandb_internal_pb2.Record`. This was read off files
written by wandb 0.31, which no longer ships the reader of earlier versions.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
CHUNK = struct.Struct("<IHB")
BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
OFFLINE = "offline-"


def find(directory: str | Path, id: str = "*") -> list[Path]:
    """The `.wandb` files under a directory, of one run or of all, oldest first."""
    return sorted(Path(directory).rglob(f"run-{id}.wandb"), key=age)


def age(file: Path) -> tuple[str, Path]:
    """Sorts files, oldest first: W&B names their directories `run-TIME-ID` and `offline-run-TIME-ID`."""
    return file.parent.name.removeprefix(OFFLINE), file


def is_offline(file: Path) -> bool:
    """Whether the server was not to get the file's rows while they were logged."""
    return file.parent.name.startswith(OFFLINE)


def synced_mark(file: Path) -> Path:
    """What `wandb sync` leaves beside a file that the server has, and leaves alone from then on."""
    return file.with_name(f"{file.name}.synced")


def records(file: Path) -> Iterator[Any]:
    """The records of a file; an end torn by a kill is left out.

    Raises ValueError if it is not a W&B file, or if it is damaged elsewhere than at its end.
    """
    # Late: importing wandb takes longer than reading a run.
    from wandb.proto import wandb_internal_pb2

    for frame in _frames(file):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined,unused-ignore]
        record.ParseFromString(frame)
        yield record


def key(item: Any) -> tuple[str, ...]:
    """The names that lead to an item of a history, a config or a summary."""
    return tuple(item.nested_key) or (item.key,)


def update(target: dict[str, Any], change: Any) -> None:
    """Apply a config or summary record to the nested values so far."""
    for item in change.update:
        *parents, last = key(item)
        _descend(target, parents)[last] = json.loads(item.value_json)
    for item in change.remove:
        *parents, last = key(item)
        _descend(target, parents).pop(last, None)


def _descend(target: dict[str, Any], parents: Iterable[str]) -> dict[str, Any]:
    for key in parents:
        inner = target.get(key)
        if not isinstance(inner, dict):
            inner = target[key] = {}
        target = inner
    return target


def rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a file as they were given to `run.log`, with W&B's own `_step`, `_runtime` and `_timestamp`.

    Raises as `records`.
    """
    return [_row(record) for record in records(file) if record.WhichOneof("record_type") == "history"]


def _row(record: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in record.history.item:
        *parents, last = key(item)
        place = row
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return row


def _frames(file: Path) -> Iterator[bytes]:
    content = file.read_bytes()
    if content[: len(HEADER)] != HEADER:
        raise ValueError(
            f"{file} is not a W&B run file: it begins with {content[: len(HEADER)]!r}, not {HEADER!r}. "
            "W&B writes run-<id>.wandb into <WANDB_DIR>/wandb/offline-run-*/."
        )
    position, joined = len(HEADER), b""
    while position + CHUNK.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:  # the rest of a block that has no room for a chunk's head
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(content, position)
        data = content[position + CHUNK.size : position + CHUNK.size + length]
        if len(data) < length or kind == 0:  # torn, or space the file system had set aside
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            in_last_block = position // BLOCK == (len(content) - 1) // BLOCK
            if in_last_block or not any(content[position + CHUNK.size + length :]):  # torn while it was written
                return
            raise ValueError(f"{file} is damaged at byte {position} of {len(content)}: the checksum does not fit.")
        position += CHUNK.size + length
        joined = data if kind in (WHOLE, FIRST) else joined + data
        if kind in (WHOLE, LAST):
            yield joined
