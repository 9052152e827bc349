"""A loader begins in the middle of an epoch, and says which records a batch holds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repvgg.data.decode import FusedDecoder
from repvgg.data.loader import SafeLoader, make_loader
from repvgg.data.transforms import CenterCrop, PadCrop, RandomResizedCrop
from repvgg.data.verify import read_records

pytestmark = pytest.mark.timeout(120)
Batches = list[tuple[torch.Tensor, torch.Tensor]]
ONE_FILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loader(path: Path, **changes: Any) -> SafeLoader:
    options = {"transform": RandomResizedCrop(48), "batch_size": 8, "train": True, "seed": 4}
    return make_loader(path, **(options | changes))


def batches(loader: SafeLoader) -> Batches:
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 1, "world_size": 2, "batches_per_step": 2},
        {"rank": 2, "world_size": 3, "os_cache": False},
        {"train": False, "rank": 1, "world_size": 2},
    ],
)
def test_the_rest_of_an_epoch_is_that_of_the_whole_one_bit_for_bit(mixed: Path, options: dict[str, Any]) -> None:
    whole = loader(mixed, **options)
    whole.set_epoch(3)
    expected, later = batches(whole), batches(whole)
    resumed = loader(mixed, **options)
    for skipped in {0, 1, len(whole) // 2, len(whole) - 1, len(whole)}:
        resumed.set_epoch(3)
        resumed.skip(skipped)
        assert len(resumed) == len(whole) == len(expected)
        assert equal(batches(resumed), expected[skipped:])
    assert equal(batches(resumed), later), "only the one iteration is shorter"


@ONE_FILE
@given(epoch=st.integers(0, 10**6), rank=st.integers(0, 2), data=st.data())
def test_what_follows_a_skip_is_the_tail_of_the_order(square: Path, epoch: int, rank: int, data: st.DataObject) -> None:
    resumed = loader(square, transform=PadCrop(32, 4), batch_size=4, rank=rank, world_size=3)
    skipped = data.draw(st.integers(0, len(resumed)))
    resumed.set_epoch(epoch)
    resumed.skip(skipped)
    labels = read_records(square).labels
    seen = [list(batch.tolist()) for _, batch in resumed]
    assert seen == [labels[resumed.batch_records(epoch, k)].tolist() for k in range(skipped, len(resumed))]


def test_nothing_of_what_is_skipped_is_decoded(varied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    run = FusedDecoder._run

    def counted(self: FusedDecoder, jobs: Any, out: Any, ids: Any) -> None:
        decoded.extend(ids.tolist())
        run(self, jobs, out, ids)

    monkeypatch.setattr(FusedDecoder, "_run", counted)
    path = Path(shutil.copy(varied, tmp_path / "x.beton"))
    resumed = loader(path)
    records = read_records(path)
    with path.open("r+b") as file:  # the first five batches cannot be decoded
        for record in np.concatenate([resumed.batch_records(2, k) for k in range(5)]):
            file.seek(int(records.images["data_ptr"][record]))
            file.write(bytes(int(records.sizes[record])))
    resumed.set_epoch(2)
    resumed.skip(5)
    assert len(batches(resumed)) == 7
    assert decoded == np.concatenate([resumed.batch_records(2, k) for k in range(5, 12)]).tolist()
    resumed.set_epoch(2)
    with pytest.raises(ValueError, match=r"x\.beton: record \d+ does not decode"):
        batches(resumed)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_global_batch_is_the_same_set_on_any_number_of_ranks(square: Path, train: bool, accumulated: int) -> None:
    def shared(ranks: int, rank: int = 0) -> SafeLoader:
        return loader(
            square,
            transform=CenterCrop(32, 1.0),
            batch_size=24 // ranks,
            rank=rank,
            world_size=ranks,
            train=train,
            batches_per_step=accumulated,
        )

    labels = read_records(square).labels
    alone = shared(1)
    alone.set_epoch(5)
    expected = [batch.tolist() for _, batch in alone]
    assert len(expected) == (4 if train else 5)
    for ranks in (2, 3, 4):
        seen: list[list[int]] = [[] for _ in expected]
        for rank in range(ranks):
            part = shared(ranks, rank)
            part.set_epoch(5)
            for k, (_, batch) in enumerate(part):
                assert batch.tolist() == labels[part.batch_records(5, k)].tolist()
                assert np.array_equal(part.batch_records(5, k), shared(ranks).batch_records(5, k, rank))
                seen[k] += batch.tolist()
        for k, together in enumerate(seen):
            assert sorted(together) == sorted(expected[k])
            assert labels[shared(ranks).global_batch_records(5, k)].tolist() == expected[k]


def test_batches_beyond_the_epoch_are_refused(square: Path) -> None:
    two = loader(square, transform=PadCrop(32, 4), rank=1, world_size=2)
    assert len(two) == 6
    for skipped in (-1, 7):
        with pytest.raises(ValueError, match=rf"{skipped} batches cannot be skipped: this rank has 6 of .*beton"):
            two.skip(skipped)
    for batch in (-1, 6):
        for records in (two.batch_records, two.global_batch_records):
            with pytest.raises(ValueError, match=rf"no batch {batch}: this rank has 6"):
                records(0, batch)
