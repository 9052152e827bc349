"""What is found before a training, at which cost, and what is remembered of it."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg.data import verify
from repvgg.data.decode import FusedDecoder
from repvgg.data.loader import SafeLoader, make_loader
from repvgg.data.manifest import manifest_path
from repvgg.data.sources import ImageSource, Sample
from repvgg.data.transforms import CenterCrop
from repvgg.data.verify import (
    METADATA,
    CorruptDatasetError,
    Records,
    check_beton,
    encoded,
    note_path,
    read_records,
    verify_beton,
)
from repvgg.data.write import WriteOptions, write_beton


@pytest.fixture
def copied(varied: Path, tmp_path: Path) -> Path:
    shutil.copy(manifest_path(varied), manifest_path(tmp_path / "x.beton"))
    return Path(shutil.copy(varied, tmp_path / "x.beton"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the records that are decoded from here on."""
    numbers: list[int] = []
    decode = verify._decode

    def counted(records: Records, chosen: np.ndarray, advance: Callable[[int], None]) -> None:
        numbers.extend(chosen.tolist())
        decode(records, chosen, advance)

    monkeypatch.setattr(verify, "_decode", counted)
    return numbers


def overwrite(path: Path, record: int, content: bytes, at: int = 0) -> None:
    """Keeps size and time, as a disk that fails does."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(int(read_records(path).images["data_ptr"][record]) + at)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def garble(path: Path, record: int) -> None:
    """Between the markers."""
    overwrite(path, record, bytes(int(read_records(path).sizes[record]) - 4), at=2)


def sample_of(monkeypatch: pytest.MonkeyPatch, path: Path, records: int) -> None:
    images = read_records(path).images
    pixels = int(images["width"].astype(np.int64) @ images["height"].astype(np.int64))
    monkeypatch.setattr(verify, "SAMPLE_PIXELS", -(-pixels * records // len(images)))


def test_all_images_of_a_small_file_are_decoded_and_hashed(copied: Path) -> None:
    check_beton(copied)
    garble(copied, 41)
    copied.touch()
    with pytest.raises(CorruptDatasetError, match=r"x\.beton: record 41 does not decode\. .*write_dataset\.py"):
        check_beton(copied)


def test_an_altered_image_that_decodes_is_found_by_its_hash(square: Path, tmp_path: Path) -> None:
    shutil.copy(manifest_path(square), manifest_path(tmp_path / "x.beton"))
    path = Path(shutil.copy(square, tmp_path / "x.beton"))
    overwrite(path, 9, b"\x01\x02\x03", at=100)
    with pytest.raises(CorruptDatasetError, match="content hash"):
        check_beton(path)
    check_beton(path, "tables")


def test_of_a_large_file_a_sample_is_decoded_at_every_start(
    copied: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_of(monkeypatch, copied, 11)
    check_beton(copied)
    assert decoded == list(range(0, 101, 10)), "the writer stores records in the order of their numbers"
    garble(copied, 41)
    check_beton(copied)
    assert len(decoded) == 22
    garble(copied, 40)
    with pytest.raises(CorruptDatasetError, match="record 40 does not decode"):
        check_beton(copied)


def test_full_finds_the_first_damage_that_no_sample_sees_and_tables_none(
    copied: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_of(monkeypatch, copied, 11)
    garble(copied, 41)
    garble(copied, 57)
    check_beton(copied, "tables")
    assert not decoded
    with pytest.raises(CorruptDatasetError, match="record 41 does not decode"):
        check_beton(copied, "full")
    assert len(decoded) == 101


def test_what_was_sound_is_not_decoded_again(copied: Path, decoded: list[int]) -> None:
    check_beton(copied)
    assert len(decoded) == 101
    check_beton(copied)
    check_beton(copied, "full")
    assert len(decoded) == 101
    verify_beton(copied, decode=True)
    assert len(decoded) == 202, "who asks for it gets it"


def test_verifying_is_remembered_by_the_next_training(copied: Path, decoded: list[int]) -> None:
    verify_beton(copied, decode=True)
    check_beton(copied)
    assert len(decoded) == 101


def touch(path: Path) -> None:
    path.touch()


def put_a_copy_in_its_place(path: Path) -> None:
    copy = Path(shutil.copy2(path, path.with_name("copy")))  # with its time
    assert copy.stat().st_mtime_ns == path.stat().st_mtime_ns
    copy.replace(path)


def break_the_note(path: Path) -> None:
    note_path(path).write_bytes(note_path(path).read_bytes()[:-4])


def no_note_can_be_written(path: Path) -> None:
    """As in a folder that is read-only, which root would not feel."""
    note_path(path).unlink()
    note_path(path).mkdir()


@pytest.mark.parametrize("change", [touch, put_a_copy_in_its_place, break_the_note, no_note_can_be_written])
def test_what_may_have_changed_is_decoded_again(
    copied: Path, decoded: list[int], change: Callable[[Path], None]
) -> None:
    check_beton(copied)
    change(copied)
    check_beton(copied)
    assert len(decoded) == 202


def test_a_file_that_changes_while_it_is_looked_at_is_not_remembered(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_decode", lambda *_: copied.touch())
    check_beton(copied)
    assert not note_path(copied).exists()


def test_damage_that_verifying_finds_is_not_forgotten(copied: Path) -> None:
    check_beton(copied)
    garble(copied, 3)
    check_beton(copied)  # neither size nor time has changed
    for look in (lambda: verify_beton(copied, decode=True), lambda: check_beton(copied)):
        with pytest.raises(CorruptDatasetError, match="record 3 does not decode"):
            look()


def test_there_are_three_checks(copied: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.check must be one of sample, full, tables, got 'all'"):
        check_beton(copied, "all")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    sides=st.lists(st.integers(1, 2**16 - 1), min_size=1, max_size=300),
    budget=st.integers(1, 10**9),
    seed=st.integers(0, 9),
)
def test_a_sample_is_spread_over_the_file_and_keeps_to_its_budget(sides: list[int], budget: int, seed: int) -> None:
    rows = np.zeros(len(sides), dtype=METADATA["f0"])
    rows["width"] = rows["height"] = sides
    place = np.random.default_rng(seed).permutation(len(sides))  # other writers store in another order
    rows["data_ptr"] = place * 10**6
    records = Records(Path("x"), rows, np.zeros(len(sides), np.int64), np.ones(len(sides), np.uint64))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "SAMPLE_PIXELS", budget)
        at = place[verify._sample(records)]
    pixels = sum(side**2 for side in sides)
    assert len(at) == min(len(sides), max(1, len(sides) * budget // pixels))
    assert at[0] == 0
    assert (np.diff(at) > 0).all()
    assert len(at) == 1 or (at[-1] == len(sides) - 1 and np.ptp(np.diff(at)) <= 1)


# What libjpeg only warns of


class CutShort(ImageSource):
    """An image of which the lower half is missing: decoders paint it gray, and warn."""

    classes = ("photo",)
    description = "cut short"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{index}.jpg", 0, self.content[: len(self.content) // (1 + (index == 1))] + b"\xff\xd9")

    def fingerprint(self) -> str:
        return "cut short"


def photograph(folder: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(folder / "modes" / "exif.jpg").convert("RGB").resize((300, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def opened(path: Path) -> SafeLoader:
    return make_loader(path, transform=CenterCrop(32, 1.0), batch_size=2, train=False)


def test_gray_instead_of_pixels_is_an_error_at_the_check_and_in_training(folder: Path, tmp_path: Path) -> None:
    content = photograph(folder)
    Image.open(io.BytesIO(content[: len(content) // 2] + b"\xff\xd9")).load()  # PIL says nothing
    path = tmp_path / "x.beton"
    write_beton(CutShort(content), path, options=WriteOptions(), num_workers=0, progress=False)
    check_beton(path)  # the writer has stored what decodes, anew
    record = next(encoded(read_records(path))).tobytes()
    overwrite(path, 0, record[:-600] + b"\xff\xd9" + record[-598:])
    for look in (lambda: check_beton(path), lambda: list(opened(path))):
        path.touch()
        with pytest.raises(CorruptDatasetError, match=r"x\.beton: record 0 does not decode"):
            look()


# While it is read


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_file_that_is_shortened_between_two_batches_is_an_error(
    copied: Path, os_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the loader's thread, at its third batch: while a batch is decoded, it would be the end of this process."""
    loader = make_loader(copied, transform=CenterCrop(32, 1.0), batch_size=10, train=True, os_cache=os_cache)
    size, looks = copied.stat().st_size, 0
    look = FusedDecoder._require_whole_file

    def shortened(decoder: FusedDecoder) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            os.truncate(copied, size // 2)
        look(decoder)

    monkeypatch.setattr(FusedDecoder, "_require_whole_file", shortened)
    batches = iter(loader)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(CorruptDatasetError, match=rf"x\.beton: was shortened from {size:,} to {size // 2:,} bytes"):
        next(batches)


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(copied: Path, tmp_path: Path) -> None:
    loader = opened(copied)
    expected = [labels.tolist() for _, labels in loader]
    batches = iter(loader)
    next(batches)
    (tmp_path / "other").write_bytes(b"another data set")
    (tmp_path / "other").replace(copied)
    assert [labels.tolist() for _, labels in batches] == expected[1:]
