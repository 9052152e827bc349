"""Images in the files of Hugging Face's `datasets`: Parquet shards as on the Hub, Arrow files as in its cache."""

import json
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.ipc  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from numpy.typing import NDArray

from repvgg.data.sources import ImageSource, Sample, sha256

SUFFIXES = (".parquet", ".arrow")


class HuggingFaceFiles(ImageSource):
    """The rows of all files that `files` names (a pattern such as `/hf/train-*.parquet`, a folder, or one file).

    A row has an image, `{bytes, path}` or plain bytes, and a whole number as label. Classes are named in the files
    where `datasets` has noted them; else `classes` names them, or says how many there are.
    """

    def __init__(
        self,
        files: str | Path,
        *,
        image_column: str = "image",
        label_column: str = "label",
        classes: Sequence[str] | int | None = None,
    ) -> None:
        self.image_column, self.label_column = image_column, label_column
        self.description = f"Hugging Face files {Path(files).absolute()}, columns {image_column} and {label_column}"
        self.files = _matching(files)
        groups: list[NDArray[np.int64]] = []
        labels: list[NDArray[np.int64]] = []
        noted: list[str] | None = None
        for number, path in enumerate(self.files):
            schema, sizes, file_labels = self._index(path)
            names = _class_names(schema, label_column)
            if number and names != noted:
                raise ValueError(f"{path} names other classes than {self.files[0]}: give the files of one data set")
            noted = names
            rows = [(number, group, size) for group, size in enumerate(sizes)]
            groups.append(np.array(rows, np.int64).reshape(-1, 3))
            labels.append(file_labels)
        self.labels = np.concatenate(labels)
        table = np.concatenate(groups)
        self._groups = table[table[:, 2] > 0]
        """Rows of (file, row group or record batch in it, its rows)."""
        self._starts = np.cumsum(self._groups[:, 2]) - self._groups[:, 2]
        self._open: tuple[int, Any] = (-1, None)
        if len(self.labels) == 0:
            raise ValueError(f"{self.description} hold no rows")
        self.classes = self._classes(classes, noted)
        # A chunk that ends with its row group spares the next worker the reading of it.
        self.chunk = int(np.clip(np.median(self._groups[:, 2]), self.chunk, 256))

    def _classes(self, given: Sequence[str] | int | None, noted: Sequence[str] | None) -> list[str]:
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0:
            raise ValueError(f"{self.description}: label {lowest}. A test split has no labels: name other files")
        if isinstance(given, int):
            given = [str(number) for number in range(given)]
        names = list(given or noted or ())
        if not names:
            raise ValueError(
                f"{self.description} do not name their classes (labels 0 … {highest}): set "
                f"source.classes={highest + 1}, or to a list of names"
            )
        if highest >= len(names):
            raise ValueError(f"{self.description}: label {highest}, but {len(names)} classes")
        return names

    def _index(self, path: Path) -> tuple[pa.Schema, list[int], NDArray[np.int64]]:
        """Schema, rows of each group and labels of one file."""
        try:
            if path.suffix == ".parquet":
                with pa.parquet.ParquetFile(path) as file:
                    schema = file.schema_arrow
                    self._require_columns(path, schema)
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                    column = file.read([self.label_column]).column(0)
            else:
                table = _arrow_table(path)
                schema = table.schema
                self._require_columns(path, schema)
                column = table.column(self.label_column)
                sizes = [len(chunk) for chunk in column.chunks]
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged or not {path.suffix[1:]}: {error}") from error
        except OSError as error:  # pyarrow's names no file
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not pa.types.is_integer(column.type) or column.null_count:
            raise ValueError(f"{path}: {self.label_column} must hold whole numbers everywhere, is {column.type}")
        return schema, sizes, column.to_numpy().astype(np.int64)

    def _require_columns(self, path: Path, schema: pa.Schema) -> None:
        for what, column in (("image", self.image_column), ("label", self.label_column)):
            if column not in schema.names:
                raise ValueError(
                    f"{path} has no column {column!r}: set source.{what}_column to one of {', '.join(schema.names)}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[group])
        image = self._images(group)[row].as_py()
        path = None
        if isinstance(image, dict):
            path, image = image.get("path"), image.get("bytes")
            if image is None and path is not None:  # datasets' cache of local files
                image = Path(path).read_bytes()
        name = f"{path or 'image'} (row {row} of group {self._groups[group, 1]} in {self._file(group)})"
        if not isinstance(image, bytes):
            raise ValueError(f"{name} has no bytes; {self.image_column!r} should hold {{bytes, path}} or bytes")
        return Sample(name, int(self.labels[index]), image)

    def _file(self, group: int) -> Path:
        return self.files[int(self._groups[group, 0])]

    def _images(self, group: int) -> Any:
        """The image column of one group; the last one read is kept, because neighbours come next."""
        if self._open[0] != group:
            self._open = (-1, None)  # let go of the old one first
            path, number = self._file(group), int(self._groups[group, 1])
            if path.suffix == ".parquet":
                with pa.parquet.ParquetFile(path) as file:
                    column = file.read_row_group(number, [self.image_column]).column(0)
            else:
                column = _arrow_table(path).column(self.image_column).chunk(number)
            self._open = (group, column)
        return self._open[1]

    def order(self, seed: int) -> NDArray[np.int64]:
        """Groups shuffled, and the rows within each: any row costs the reading of its whole group."""
        rng = np.random.default_rng(seed)
        groups = rng.permutation(len(self._groups))
        return np.concatenate([self._starts[g] + rng.permutation(self._groups[g, 2]) for g in groups])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": (-1, None)}

    def fingerprint(self) -> str:
        """Of the files' names and sizes, and the labels."""
        files = repr([(path.name, path.stat().st_size) for path in self.files])
        return sha256(files.encode(), self._groups.tobytes(), self.labels.tobytes())

    def total_bytes(self) -> int:
        """Of the files."""
        return sum(path.stat().st_size for path in self.files)


def _matching(files: str | Path) -> list[Path]:
    """Sorted; raise ValueError when there are none."""
    folder = Path(files)
    found = list(folder.iterdir()) if folder.is_dir() else [Path(name) for name in glob(str(files))]  # noqa: PTH207
    chosen = sorted(path for path in found if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not chosen:
        raise ValueError(
            f"{folder.absolute()}: no {' or '.join(SUFFIXES)} files there. Quote a pattern: "
            "source.train='/hf/train-*.parquet' source.val='/hf/validation-*.parquet'"
        )
    return chosen


def _arrow_table(path: Path) -> pa.Table:
    """Mapped, not read. `datasets` writes the stream format, others the file format, which begins with ARROW1."""
    mapped = pa.memory_map(str(path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """As `datasets` notes them in the schema: {"info": {"features": {column: {"names": […]}}}}."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return None
