"""Reading W&B runs back from their `.wandb` files, without an account and without a server.

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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
CHUNK = struct.Struct("<IHB")
BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """One run as its file has it.

    `config` and `summary` are nested where the run logged nested values; a key such as `val/top1` stays one key. A
    metric declared with `define_metric(summary="max")` has the summary `{"max": value}`. `history` has one row per
    logged step in the order of the file, nested values in columns `a.b`, and W&B's own `_step`, `_runtime` and
    `_timestamp`. `started` is UTC. `finished` is False for a run that was killed, or is still running: its last seconds
    may be missing.
    """

    id: str
    name: str
    group: str
    job_type: str
    project: str
    config: dict[str, Any]
    history: pd.DataFrame
    summary: dict[str, Any]
    finished: bool
    exit_code: int | None
    started: datetime | None


def find_offline_runs(directory: str | Path) -> list[Path]:
    """The `.wandb` files under a directory, oldest run first (W&B begins their directories with the time)."""
    return sorted(Path(directory).rglob("run-*.wandb"), key=lambda file: (file.parent.name, file))


def read_offline_run(path: str | Path, *, history: bool = True) -> OfflineRun:
    """Reads a `.wandb` file, or the one in a run directory; without its history, which takes longest, if so asked.

    Raises ValueError if it is not a W&B file, or if it is damaged elsewhere than at its end. An end torn by a kill
    is left out.
    """
    # Late: importing wandb takes longer than reading a run.
    import pandas as pd
    from wandb.proto import wandb_internal_pb2

    file = _single_file(Path(path))
    parts = _Parts(id=file.stem.removeprefix("run-"), with_history=history)
    for frame in _frames(file):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined,unused-ignore]
        record.ParseFromString(frame)
        parts.add(record)
    return OfflineRun(
        id=parts.id,
        name=parts.name,
        group=parts.group,
        job_type=parts.job_type,
        project=parts.project,
        config={key: value for key, value in parts.config.items() if key != "_wandb"},
        history=pd.DataFrame(parts.history),
        summary={key: value for key, value in parts.summary.items() if key != "_wandb"},
        finished=parts.finished,
        exit_code=parts.exit_code,
        started=parts.started,
    )


@dataclass
class _Parts:
    id: str
    with_history: bool
    name: str = ""
    group: str = ""
    job_type: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    exit_code: int | None = None
    started: datetime | None = None

    def add(self, record: Any) -> None:
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                self.id = run.run_id
                self.name, self.group, self.job_type = run.display_name, run.run_group, run.job_type
                self.project = run.project
                if run.HasField("start_time"):
                    self.started = run.start_time.ToDatetime(UTC)
                _update(self.config, run.config)
                _update(self.summary, run.summary)
            case "config":
                _update(self.config, record.config)
            case "summary":
                _update(self.summary, record.summary)
            case "history" if self.with_history:
                row = {".".join(_key(item)): json.loads(item.value_json) for item in record.history.item}
                self.history.append(row)
            case "exit":
                self.finished = True
                self.exit_code = record.exit.exit_code


def _key(item: Any) -> tuple[str, ...]:
    return tuple(item.nested_key) or (item.key,)


def _update(target: dict[str, Any], change: Any) -> None:
    for item in change.update:
        *parents, last = _key(item)
        _descend(target, parents)[last] = json.loads(item.value_json)
    for item in change.remove:
        *parents, last = _key(item)
        _descend(target, parents).pop(last, None)


def _descend(target: dict[str, Any], parents: Iterable[str]) -> dict[str, Any]:
    for key in parents:
        inner = target.get(key)
        if not isinstance(inner, dict):
            inner = target[key] = {}
        target = inner
    return target


def _single_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("run-*.wandb"))
    if len(files) != 1:
        raise ValueError(
            f"{path} holds {len(files)} files run-*.wandb; a W&B run directory holds one. "
            "find_offline_runs lists the runs below a directory."
        )
    return files[0]


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
