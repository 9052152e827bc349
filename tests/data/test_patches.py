import re
from pathlib import Path

import numpy as np
import pytest

from repvgg.data import patches as module
from repvgg.data.patches import CELL, PER_CLASS, describe_patches, patches
from repvgg.data.sources import InMemory
from repvgg.data.write import ensure_patches


def test_every_photograph_gives_as_many_patches() -> None:
    train, val = patches("train"), patches("val")
    assert len(train.classes) == 19
    assert list(train.classes) == list(val.classes)
    for source, count in ((train, 100), (val, 60)):
        assert np.bincount(source.labels).tolist() == [count] * 19
        assert source.images.shape == (19 * count, 32, 32)
        assert source.images.dtype == np.uint8
    assert np.array_equal(patches("val").images, val.images)
    assert not np.array_equal(patches("val", seed=1).images, val.images)


def test_no_pixel_is_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose values are the numbers of their cells, so that a patch says where it is from."""
    rows, columns = 5, 7
    numbers = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    margin = np.pad(np.kron(numbers, np.ones((CELL, CELL), np.uint8)), ((0, 13), (0, 40)), constant_values=255)
    monkeypatch.setattr(module, "_photographs", lambda: {"one": margin, "two": margin})
    used = {}
    for split in ("train", "val"):
        source = patches(split)  # type: ignore[arg-type]
        for label in (0, 1):
            of_label = source.images[source.labels == label]
            assert (of_label == of_label[:, :1, :1]).all(), "a patch lies in one cell"
            used[split, label] = set(of_label[:, 0, 0].tolist())
    for label in (0, 1):
        assert used["train", label].isdisjoint(used["val", label])
        assert used["train", label] | used["val", label] == set(range(rows * columns))
    assert used["val", 0] != used["val", 1], "every photograph is divided on its own"


def test_wrong_requests_say_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"'train' or 'val', got 'test'"):
        patches("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("1 … 64, got 65")):
        patches("train", image_size=65)


def test_ensure_patches_asks_for_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, tuple[str, int]] = {}

    def write(source: InMemory, path: Path, *_: object, **__: object) -> None:
        written[path.name] = (source.description, len(source))

    monkeypatch.setattr("repvgg.data.write._write", write)
    ensure_patches(tmp_path, image_size=16)
    expected = {f"{s}.beton": (describe_patches(s, 16, 0), 19 * count) for s, count in PER_CLASS.items()}
    assert written == expected
