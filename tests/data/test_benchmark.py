from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from repvgg.data.benchmark import (
    ORIGINALS,
    SMALL,
    Bench,
    PilImages,
    Rate,
    Split,
    comparison_table,
    cpu_seconds,
    decode_bare,
    link_photos,
    make_photos,
    measure,
    ratio,
    transform_of,
)
from support.images import photo_folder

COUNT = 12


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("bench")
    make_photos(directory / "photos", COUNT)
    return Bench(directory / "photos", directory, size=224, threads=1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_sides_of_the_comparison_show_the_same_crops(bench: Bench, split: Split) -> None:
    """Within PIL's rounding on the original bytes, so that nobody wins by doing less."""
    assert bench.distance(ORIGINALS, split) < 0.3
    assert 0.3 < bench.distance(SMALL, split) < 8


def test_every_contestant_yields_every_image(bench: Bench) -> None:
    assert decode_bare(bench.beton(ORIGINALS)) == COUNT
    assert bench.epoch(ORIGINALS, "train", "fused")() == COUNT
    assert bench.pil_epoch("val", normalise=True)() == COUNT


def test_the_original_bytes_are_what_is_stored(bench: Bench) -> None:
    assert bench.beton(ORIGINALS).stat().st_size > sum(file.stat().st_size for file in bench.files)


def test_pil_normalises_like_torchvision(bench: Bench) -> None:
    levels, normal = (PilImages(bench.files, transform_of("val", 64), normalise)[3][0] for normalise in (False, True))
    red = (levels[0].numpy() / 255 - 0.485) / 0.229
    assert np.allclose(normal[0].numpy(), red, atol=1e-6)


def test_child_processes_are_counted(bench: Bench) -> None:
    images = PilImages(bench.files * 20, transform_of("train", 224), normalise=True)
    before = cpu_seconds()
    for _ in DataLoader(images, batch_size=60, num_workers=1):
        pass
    assert cpu_seconds() - before > 0.2, "240 images of 500×375 take longer, all of it in the worker"


def test_ratios_are_taken_within_a_round() -> None:
    fast, slow = Rate("a", "train", "fused", [200.0, 20.0, 90.0]), Rate("a", "train", "stock", [100.0, 10.0, 30.0])
    assert ratio(fast, slow) == (2.0, 2.0, 3.0)
    calls: list[str] = []

    def work(name: str) -> int:
        calls.append(name)
        return sum(range(300_000))

    rates = measure({("s", "train", name): partial(work, name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "a", "b"]
    assert [len(rate.rounds) for rate in rates] == [2, 2]


def test_the_table_compares_with_bare_stock_and_pil() -> None:
    rates = [
        Rate("original bytes", "", "bare", [1000.0]),
        Rate("original bytes", "train", "fused", [800.0]),
        Rate("original bytes", "train", "stock", [400.0]),
        Rate("files", "train", "pil uint8", [200.0]),
    ]
    row = comparison_table(rates).splitlines()[3]
    assert [cell.split(" ")[0] for cell in row.split(" | ")[3:]] == ["800", "0.80", "2.00", "4.00"]


def test_images_are_taken_evenly_from_class_folders(tmp_path: Path) -> None:
    photo_folder(tmp_path / "classes", classes=3, per_class=4, size=(40, 30))
    link_photos(tmp_path / "classes", tmp_path / "links", 6)
    targets = [link.resolve() for link in sorted((tmp_path / "links").glob("*/*"))]
    assert len(targets) == 6
    assert {target.parent.name for target in targets} == {"class_0", "class_1", "class_2"}
