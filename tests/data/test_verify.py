import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repvgg.data.ffcv_setup import HeaderType
from repvgg.data.manifest import DatasetMissingError, manifest_path
from repvgg.data.verify import METADATA, CorruptDatasetError, read_records, verify_beton

ALLOC_POINTER = HeaderType.fields["alloc_table_ptr"][1]
Damage = Callable[[Path], None]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def killed_writer(path: Path) -> None:
    overwrite(path, ALLOC_POINTER, bytes(8))


def shorter_table(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 24)


def foreign_table(path: Path) -> None:
    overwrite(path, path.stat().st_size - 16, bytes(8))  # the last row's address


def other_version(path: Path) -> None:
    overwrite(path, 0, b"\x09")


def zeroed_image(path: Path) -> None:
    records = read_records(path)
    overwrite(path, int(records.images["data_ptr"][7]), bytes(int(records.sizes[7])))


def zeroed_width(path: Path) -> None:
    metadata = read_records(path)
    start = int(np.fromfile(path, dtype=HeaderType, count=1)[0]["num_fields"]) * 1041 + HeaderType.itemsize
    assert metadata.images["width"][0] > 0
    raw = path.read_bytes()
    row = raw.find(metadata.images[:1].tobytes()[:13], start - 100)
    overwrite(path, row + METADATA["f0"].fields["width"][1], bytes(2))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "bytes"),
        (empty, "only 0 bytes"),
        (killed_writer, "no allocation table"),
        (shorter_table, "101 samples"),
        (foreign_table, "record .* allocation table does not list"),
        (other_version, "version 9"),
        (zeroed_image, "record 7 is no JPEG"),
        (zeroed_width, "record 0 has no width"),
    ],
)
def test_damage_is_found_and_named(varied: Path, tmp_path: Path, damage: Damage, words: str) -> None:
    path = Path(shutil.copy(varied, tmp_path / "x.beton"))
    verify_beton(path, decode=True)
    damage(path)
    with pytest.raises(CorruptDatasetError, match=words) as error:
        verify_beton(path)
    assert str(path) in str(error.value)
    assert "write_dataset.py" in str(error.value)


def test_a_garbled_image_is_found_by_decoding(varied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(varied, tmp_path / "x.beton"))
    records = read_records(path)
    overwrite(path, int(records.images["data_ptr"][5]) + 2, bytes(int(records.sizes[5]) - 4))
    verify_beton(path)
    with pytest.raises(CorruptDatasetError, match="record 5 does not decode"):
        verify_beton(path, decode=True)


def test_a_flipped_pixel_is_found_by_the_content_hash(square: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(square, tmp_path / "x.beton"))
    shutil.copy(manifest_path(square), manifest_path(path))
    verify_beton(path, decode=True)
    records = read_records(path)
    pointer = int(records.images["data_ptr"][9]) + 100
    overwrite(path, pointer, bytes([path.read_bytes()[pointer] ^ 1]))
    verify_beton(path)
    with pytest.raises(CorruptDatasetError, match="content hash"):
        verify_beton(path, decode=True)


def test_a_manifest_of_another_file_is_found(varied: Path, square: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(square, tmp_path / "x.beton"))
    shutil.copy(manifest_path(varied), manifest_path(path))
    with pytest.raises(CorruptDatasetError, match="label"):
        verify_beton(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r"none\.beton does not exist"):
        verify_beton(tmp_path / "none.beton")
