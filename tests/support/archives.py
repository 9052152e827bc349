"""A folder of class folders, packed as ImageNet and the Hub are: small archives of the same inner structure."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from scipy.io import savemat

Files = list[tuple[str, int, bytes]]


def files_of(folder: Path) -> Files:
    """Name, label and bytes of each file, in sorted order."""
    classes = sorted(entry.name for entry in folder.iterdir())
    return [(p.name, label, p.read_bytes()) for label, c in enumerate(classes) for p in sorted((folder / c).iterdir())]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def train_tar(path: Path, folder: Path) -> Path:
    """A tar archive of one tar archive per class, in the order of the download: not sorted."""
    with tarfile.open(path, "w") as outer:
        for directory in sorted(folder.iterdir(), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for file in sorted(directory.iterdir()):
                    _add(archive, f"{directory.name}_{file.name}", file.read_bytes())
            _add(outer, f"{directory.name}.tar", inner.getvalue())
    return path


def val_tar(path: Path, files: Files) -> Path:
    """A flat tar archive; image 1, 2, … in the order of ``files``."""
    with tarfile.open(path, "w") as archive:
        for number, (_, _, content) in reversed(list(enumerate(files, 1))):
            _add(archive, f"ILSVRC2012_val_{number:08}.JPEG", content)
    return path


def devkit(path: Path, wnids: list[str], val_labels: list[int], train_images: list[int]) -> Path:
    """meta.mat and the ground truth. Numbers run against the order of the WNIDs; a group of classes comes last."""
    count = len(wnids)
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    dtype = [(name, object) for name in (*names, "num_train_images")]
    rows = [
        (count - label, wnid, f"words of {wnid}", "gloss", 0, [], 0, train_images[label])
        for label, wnid in reversed(list(enumerate(wnids)))
    ]
    rows.append((count + 1, "n00000001", "a group", "gloss", 2, [1, 2], 1, 0))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})
    truth = "".join(f"{count - label}\n" for label in val_labels)
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        _add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return path


def table(files: Files, classes: list[str] | None) -> pa.Table:
    """As `datasets` writes it: an image column of {bytes, path}, and the classes' names in the schema."""
    images = [{"bytes": content, "path": name} for name, _, content in files]
    columns = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([label for _, label, _ in files], pa.int64()),
    }
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    note = json.dumps({"info": {"features": features}})
    return pa.table(columns).replace_schema_metadata({"huggingface": note} if classes else None)


def shards(folder: Path, files: Files, classes: list[str] | None, *, split: str, kind: str) -> str:
    """Two files of groups of 5 rows; returns the pattern that names them. ``kind``: parquet, stream or file."""
    folder.mkdir(exist_ok=True)
    suffix = "parquet" if kind == "parquet" else "arrow"
    for number, part in enumerate((files[:12], files[12:])):
        path = folder / f"{split}-{number:05}-of-00002.{suffix}"
        content = table(part, classes)
        if kind == "parquet":
            pa.parquet.write_table(content, path, row_group_size=5)
        else:
            new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with new(str(path), content.schema) as writer:
                writer.write_table(content, max_chunksize=5)
    return str(folder / f"{split}-*.{suffix}")
