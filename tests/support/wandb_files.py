"""`.wandb` files as W&B's client writes them, in no time: what `repvgg.wandb_file` reads, the other way round."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

from repvgg.wandb_file import BLOCK, CHUNK, FIRST, HEADER, LAST, MIDDLE, WHOLE


def write(
    directory: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    id: str = "x",
    started: datetime,
    exit_code: int | None = 0,
    online: bool = False,
) -> Path:
    """A run's file in the folder that the client would make for it; without ``exit_code``, of a killed run."""
    records: list[Any] = [pb.Record(run=pb.RunRecord(run_id=id, project="p"))]
    records[0].run.start_time.FromDatetime(started)
    for step, row in enumerate(rows):
        history = pb.HistoryRecord(step=pb.HistoryStep(num=step))
        for key, value in {**row, "_step": step}.items():
            history.item.append(pb.HistoryItem(nested_key=[key], value_json=json.dumps(value)))
        records.append(pb.Record(history=history))
    if exit_code is not None:
        records.append(pb.Record(exit=pb.RunExitRecord(exit_code=exit_code)))
    file = directory / f"{'' if online else 'offline-'}run-{started:%Y%m%d_%H%M%S}-{id}" / f"run-{id}.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(_log(record.SerializeToString() for record in records))
    return file


def _log(frames: Iterable[bytes]) -> bytes:
    content = bytearray(HEADER)
    for frame in frames:
        first = True
        while True:
            left = BLOCK - len(content) % BLOCK
            if left < CHUNK.size:
                content += bytes(left)
                continue
            part, frame = frame[: left - CHUNK.size], frame[left - CHUNK.size :]
            kind = (LAST if not first else WHOLE) if not frame else (FIRST if first else MIDDLE)
            content += CHUNK.pack(zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
            if not frame:
                break
    return bytes(content)
