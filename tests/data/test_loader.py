import gc
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data.decode import FusedDecoder, LabelDecoder
from repvgg.data.draws import Draws
from repvgg.data.ffcv_setup import (
    Operation,
    RandomHorizontalFlip,
    Squeeze,
    State,
    ToDevice,
    ToTensor,
    ToTorchImage,
)
from repvgg.data.loader import SafeLoader, make_loader
from repvgg.data.sources import InMemory
from repvgg.data.transforms import CenterCrop, PadCrop, RandomResizedCrop
from repvgg.data.verify import JPG, CorruptDatasetError, Records, encoded, read_records
from support.commands import heavy

# isort: split
from ffcv.transforms import NormalizeImage  # after repvgg.data, which imports FFCV without its side effects

pytestmark = pytest.mark.timeout(120)
CROP = RandomResizedCrop(48)
WHOLE = CenterCrop(32, 1.0)


def batches(loader: SafeLoader, epoch: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if epoch is not None:
        loader.set_epoch(epoch)
    return [(images.clone(), labels.clone()) for images, labels in loader]


def joined(loader: SafeLoader, epoch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches(loader, epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def digest(loader: SafeLoader, epoch: int) -> str:
    images, labels = joined(loader, epoch)
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def training(path: Path, **changes: Any) -> SafeLoader:
    return make_loader(path, **({"transform": CROP, "batch_size": 10, "train": True, "seed": 4} | changes))


# What comes out


def test_batches_are_uint8_channels_last_and_the_last_one_may_be_a_single_image(square: Path) -> None:
    loader = make_loader(square, transform=WHOLE, batch_size=25, train=False)
    seen = batches(loader)
    assert len(seen) == len(loader) == 5
    assert [tuple(images.shape) for images, _ in seen] == [(25, 3, 32, 32)] * 4 + [(1, 3, 32, 32)]
    assert [tuple(labels.shape) for _, labels in seen] == [(25,)] * 4 + [(1,)]
    images, labels = next(iter(loader))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_uncropped_raw_images_come_out_exactly(squares: InMemory, square: Path) -> None:
    images, labels = joined(make_loader(square, transform=WHOLE, batch_size=7, train=False))
    assert sorted(labels.tolist()) == list(range(101))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), squares.images[labels.numpy()])


def test_padded_crops_are_shifted_copies_on_black(squares: InMemory, square: Path) -> None:
    padded = np.pad(squares.images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    images, labels = joined(training(square, transform=PadCrop(32, 3, flip=True)), 0)
    found = set()
    for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True):
        matches = {
            (top, left, flip)
            for top in range(7)
            for left in range(7)
            for flip in (1, -1)
            if np.array_equal(image[:, ::flip], padded[label, top : top + 32, left : left + 32])
        }
        assert len(matches) == 1
        found |= matches
    assert len(found) > 50


def pixels_of(records: Records, number: int) -> Image.Image:
    """A record as PIL decodes it."""
    content = next(islice(encoded(records), number, None))
    if records.images["mode"][number] == JPG:
        return Image.open(io.BytesIO(content.tobytes()))
    shape = int(records.images["height"][number]), int(records.images["width"][number]), 3
    return Image.fromarray(np.array(content).reshape(shape))


def test_training_crops_match_pils_on_every_kind_of_record(mixed: Path) -> None:
    images, _ = joined(make_loader(mixed, transform=CROP, batch_size=13, train=False, seed=8), 5)
    records = read_records(mixed)
    heights, widths = records.images["height"].astype(np.int64), records.images["width"].astype(np.int64)
    boxes = CROP.boxes(heights, widths, Draws(8, 5, np.arange(101)))
    assert 20 < boxes.mirrored.sum() < 80
    for i in range(101):
        top, left = int(boxes.top[i]), int(boxes.left[i])
        cut = pixels_of(records, i).crop((left, top, left + int(boxes.width[i]), top + int(boxes.height[i])))
        expected = np.asarray(cut.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
        if boxes.mirrored[i]:
            expected = expected[:, ::-1]
        assert np.abs(images[i].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize(("size", "ratio"), [(28, 0.875), (40, 0.8), (48, 1.0)])
def test_validation_crops_match_pils_resize_and_centre_crop(varied: Path, size: int, ratio: float) -> None:
    """torchvision's Resize(round(size / ratio)) and CenterCrop(size), written with PIL: within one level."""
    transform = CenterCrop(size, ratio)
    images, _ = joined(make_loader(varied, transform=transform, batch_size=20, train=False))
    records = read_records(varied)
    for i, image in enumerate(images):
        whole = pixels_of(records, i)
        shorter = round(size / ratio)
        width, height = (int(shorter * side / min(whole.size)) for side in whole.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = whole.resize((width, height), Image.Resampling.BILINEAR)
        expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1, (i, whole.size)


@pytest.mark.slow
def test_stock_operations_yield_the_same_shapes(square: Path) -> None:
    for transform in (PadCrop(32, 4), RandomResizedCrop(24)):
        # One thread: FFCV compiles its operations several times faster without parallel loops.
        loader = training(square, transform=transform, ops="stock", num_threads=1)
        images, labels = joined(loader)
        assert tuple(images.shape) == (100, 3, transform.size, transform.size)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert len(set(labels.tolist())) == 100


def test_both_ways_to_hold_a_file_give_the_same(mixed: Path) -> None:
    assert digest(training(mixed, os_cache=False), 2) == digest(training(mixed), 2)


# Reproducibility


def test_threads_batch_size_and_lookahead_do_not_matter(mixed: Path) -> None:
    order = {"train": False, "seed": 4}
    expected = digest(training(mixed, **order), 1)
    for changes in (
        {"num_threads": 1},
        {"num_threads": 2},
        {"batch_size": 7},
        {"batch_size": 101},
        {"batches_ahead": 1},
    ):
        assert digest(training(mixed, **(order | changes)), 1) == expected, changes


def test_more_threads_than_cores_decode_the_same(mixed: Path) -> None:
    """Not through make_loader, which clamps."""

    def with_threads(threads: int) -> str:
        decoder = FusedDecoder(CROP, path=mixed, seed=4, num_threads=threads)
        return digest(plain_loader(mixed, [decoder, ToTensor(), ToTorchImage()]), 1)

    assert with_threads(8) == with_threads(1)


def test_another_process_sees_the_same_and_keeps_its_torch_threads(mixed: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import torch; torch.set_num_threads(2)\n"
        "import test_loader\n"
        "print(test_loader.digest(test_loader.training(sys.argv[1], num_threads=1), 3), torch.get_num_threads())"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-W", "error", "-c", code, str(mixed), str(here.parents[1] / "src"), str(here)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [digest(training(mixed), 3), "2"]


def test_resuming_at_an_epoch_equals_the_uninterrupted_run(mixed: Path) -> None:
    through = training(mixed)
    uninterrupted = [joined(through) for _ in range(3)]
    resumed = training(mixed)
    resumed.set_epoch(1)
    for epoch in (1, 2):
        images, labels = joined(resumed)
        assert torch.equal(images, uninterrupted[epoch][0])
        assert torch.equal(labels, uninterrupted[epoch][1])


def test_epochs_and_seeds_differ(mixed: Path) -> None:
    loader = training(mixed)
    assert len({digest(loader, 0), digest(loader, 1), digest(training(mixed, seed=5), 0)}) == 3
    still = make_loader(mixed, transform=CROP, batch_size=10, train=False)  # the order is fixed: it is the crops
    assert not torch.equal(joined(still, 0)[0], joined(still, 1)[0])
    assert torch.equal(joined(still, 1)[0], joined(still, 1)[0])


def test_a_new_size_changes_the_next_epoch(mixed: Path) -> None:
    loader = training(mixed)
    joined(loader)
    loader.set_size(96)
    images, _ = joined(loader, 3)
    assert images.shape[-2:] == (96, 96)
    assert torch.equal(images, joined(training(mixed, transform=replace(CROP, size=96)), 3)[0])


# Sharing


def test_three_ranks_validate_101_images_once_each(square: Path) -> None:
    labels = [
        joined(make_loader(square, transform=WHOLE, batch_size=10, train=False, rank=rank, world_size=3))[1]
        for rank in range(3)
    ]
    assert [len(share) for share in labels] == [34, 34, 33]
    assert sorted(torch.cat(labels).tolist()) == list(range(101))


def test_ranks_train_on_disjoint_images_with_the_crops_of_one(square: Path) -> None:
    crop = PadCrop(32, 4, flip=True)
    ranks = [joined(training(square, transform=crop, rank=r, world_size=2), 1) for r in range(2)]
    alone = joined(training(square, transform=crop, batch_size=20), 1)
    assert all(len(labels) == 50 for _, labels in ranks)
    by_label = dict(zip(alone[1].tolist(), alone[0], strict=True))
    seen = [label for _, labels in ranks for label in labels.tolist()]
    assert sorted(seen) == sorted(by_label)
    for images, labels in ranks:
        for image, label in zip(images, labels.tolist(), strict=True):
            assert torch.equal(image, by_label[label])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 102}, "at most 101"),
        ({"batch_size": 51, "world_size": 2}, "at most 50"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"train": False, "world_size": 102}, "102 ranks.*101 images"),
        ({"batches_ahead": 0}, "batches_ahead"),
        ({"num_threads": 0}, "num_threads"),
        ({"ops": "fast"}, "'fused' or 'stock'"),
        ({"transform": PadCrop(24, 4)}, "exactly 24×24.*record 0 is 32×32"),
    ],
)
def test_values_are_checked(square: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training(square, **changes)


# What FFCV does not survive


def plain_loader(path: Path, image: list[Operation], **changes: Any) -> SafeLoader:
    pipelines = {"image": image, "label": [LabelDecoder(), ToTensor(), Squeeze(1)]}
    return SafeLoader(path, **({"pipelines": pipelines, "batch_size": 10, "train": False} | changes))


def decoder(path: Path) -> FusedDecoder:
    return FusedDecoder(WHOLE, path=path, seed=0, num_threads=2)


@pytest.mark.parametrize("late", [RandomHorizontalFlip(), NormalizeImage(np.zeros(3), np.ones(3), np.float32)])
def test_a_wrong_order_of_operations_is_an_error_not_a_loop(square: Path, late: Operation) -> None:
    with pytest.raises(ValueError, match=rf"{type(late).__name__} .* cannot follow ToTorchImage"):
        plain_loader(square, [decoder(square), ToTensor(), ToTorchImage(), late])


@pytest.mark.slow
def test_ffcvs_compiled_operations_can_follow_the_fused_decoder(square: Path) -> None:
    images, labels = joined(
        plain_loader(square, [decoder(square), RandomHorizontalFlip(1.0), ToTensor(), ToTorchImage()])
    )
    straight, _ = joined(plain_loader(square, [decoder(square), ToTensor(), ToTorchImage()]))
    assert torch.equal(images, straight.flip(-1))
    assert len(labels) == 101


class Failing(Operation):
    """Fails at the third batch."""

    calls = 0

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Callable[[Any, Any], Any]:
        def fail(batch: Any, _: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise FloatingPointError("third batch")
            return batch

        return fail


def test_an_exception_in_the_loader_thread_arrives(square: Path) -> None:
    loader = plain_loader(square, [decoder(square), ToTensor(), Failing(), ToTorchImage()])
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    with pytest.raises(FloatingPointError, match="third batch"):
        next(iterator)
    assert len(batches(loader)) == 11, "the loader works afterwards"


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_record_that_does_not_decode_is_named(varied: Path, tmp_path: Path, os_cache: bool) -> None:
    path = Path(shutil.copy(varied, tmp_path / "x.beton"))
    records = read_records(path)
    with path.open("r+b") as file:  # between the markers, so that the check at opening does not see it
        file.seek(int(records.images["data_ptr"][42]) + 2)
        file.write(bytes(int(records.sizes[42]) - 4))
    loader = make_loader(path, transform=CROP, batch_size=10, train=False, os_cache=os_cache)
    with pytest.raises(CorruptDatasetError, match=r"x\.beton: record 42 does not decode"):
        joined(loader)


def test_a_damaged_file_is_refused_before_it_is_opened(varied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(varied, tmp_path / "x.beton"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 24)
    with pytest.raises(CorruptDatasetError):
        make_loader(path, transform=CROP, batch_size=10, train=False)


@pytest.mark.parametrize("os_cache", [True, False])
def test_stopping_early_leaves_no_thread_and_no_memory(square: Path, os_cache: bool) -> None:
    # Two: a pool of as many threads as a large machine has cores is filled only by and by.
    loader = training(square, transform=RandomResizedCrop(128), batch_size=50, os_cache=os_cache, num_threads=2)

    def break_after_one() -> int:
        for _ in loader:
            break
        return threading.active_count()

    threads = break_after_one()  # the decoder's pool stays with the loader
    resident = rss()
    assert {break_after_one() for _ in range(20)} == {threads}
    ring = 5 * 50 * 3 * 128**2  # bytes: FFCV leaks one per break
    assert rss() - resident < 6 * ring


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_loader_that_is_dropped_takes_its_threads_along(square: Path) -> None:
    gc.collect()
    before = threading.active_count()
    loader = training(square)
    iterator = iter(loader)
    next(iterator)
    del iterator, loader
    gc.collect()  # FFCV's loaders refer to themselves
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_new_iteration_replaces_the_old_one(square: Path) -> None:
    loader = training(square)
    old = iter(loader)
    next(old)
    assert len(list(loader)) == 10
    with pytest.raises(RuntimeError, match="newer one"):
        next(old)


def test_two_loaders_run_at_once(square: Path) -> None:
    train, val = training(square, num_threads=2), make_loader(square, transform=WHOLE, batch_size=5, train=False)
    expected = [labels.tolist() for _, labels in batches(val)]
    for _ in train:
        assert [labels.tolist() for _, labels in batches(val)] == expected


def test_iterating_in_inference_mode(square: Path) -> None:
    operations = [decoder(square), ToTensor(), ToDevice(torch.device("cpu")), ToTorchImage()]
    loader = plain_loader(square, operations)
    with torch.inference_mode():
        images, _ = joined(loader)
    assert torch.equal(images, joined(loader)[0])


@pytest.mark.parametrize("ops", ["fused", heavy("stock")])
def test_torchs_thread_count_is_left_alone(square: Path, ops: Any) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loader = training(square, transform=WHOLE, ops=ops, num_threads=3 - threads)
            assert torch.get_num_threads() == threads
            joined(loader)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_too_many_threads_are_clamped_with_a_warning(
    square: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with caplog.at_level(logging.WARNING):
        loader = training(square, num_threads=64)
    assert loader.num_workers == 1
    assert "num_threads=64" in caplog.text
    assert len(batches(loader)) == 10


@pytest.mark.slow
def test_numbas_workqueue_threads_are_refused_for_two_stock_loaders(
    square: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    first, second = (training(square, transform=WHOLE, ops="stock", num_threads=2) for _ in range(2))
    running = iter(first)
    next(running)
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    with pytest.raises(RuntimeError, match="ops='fused'"):
        next(iter(second))
    running.close()  # type: ignore[attr-defined]
    assert len(batches(second)) == 10
