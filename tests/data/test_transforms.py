import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest

from repvgg.data.draws import Draws
from repvgg.data.order import train_order, val_order
from repvgg.data.transforms import CenterCrop, PadCrop, RandomResizedCrop, Transform

sides = st.integers(1, 65535)


def one(transform: Transform, height: int, width: int, seed: int = 0) -> tuple[int, int, int, int]:
    boxes = transform.boxes(np.array([height]), np.array([width]), Draws(seed, 0, np.array([0])))
    return int(boxes.top[0]), int(boxes.left[0]), int(boxes.height[0]), int(boxes.width[0])


@given(height=sides, width=sides, seed=st.integers(0, 2**63), scale=st.floats(1e-4, 1), ratio=st.floats(0.1, 1))
def test_random_crops_lie_inside_the_image(height: int, width: int, seed: int, scale: float, ratio: float) -> None:
    crop = RandomResizedCrop(8, scale=(scale, 1.0), ratio=(ratio, 1 / ratio))
    top, left, h, w = one(crop, height, width, seed)
    assert 0 <= top < top + h <= height
    assert 0 <= left < left + w <= width


@given(height=sides, width=sides, ratio=st.floats(0.05, 1))
def test_centre_crops_are_centred_and_inside_the_image(height: int, width: int, ratio: float) -> None:
    boxes = CenterCrop(8, ratio).boxes(np.array([height]), np.array([width]), Draws(0, 0, np.array([0])))
    resized = round(8 / ratio)
    for start, length, side in ((boxes.top, boxes.height, height), (boxes.left, boxes.width, width)):
        scale = side / (resized * side // min(height, width))
        assert length[0] == pytest.approx(8 * scale)
        assert start[0] >= 0
        assert start[0] + length[0] <= side * (1 + 1e-12)
        assert abs(2 * start[0] + length[0] - side) <= scale * (1 + 1e-9)
    assert not boxes.cut_first


def test_the_papers_evaluation_crop_of_a_typical_image() -> None:
    """500×375: resized to 341×256, cut to 224×224 at (58, 16)."""
    boxes = CenterCrop(224).boxes(np.array([375]), np.array([500]), Draws(0, 0, np.array([0])))
    assert (boxes.top[0], boxes.height[0]) == pytest.approx((16 * 375 / 256, 224 * 375 / 256))
    assert (boxes.left[0], boxes.width[0]) == pytest.approx((58 * 500 / 341, 224 * 500 / 341))


def test_padded_crops_shift_uniformly_by_at_most_the_padding() -> None:
    count = 20_000
    side = np.full(count, 32)
    boxes = PadCrop(32, 4).boxes(side, side, Draws(0, 0, np.arange(count)))
    for shift in (boxes.top, boxes.left):
        assert set(shift.tolist()) == set(range(-4, 5))
        assert np.bincount(shift + 4).min() > count / 9 * 0.9
    assert abs(np.corrcoef(boxes.top, boxes.left)[0, 1]) < 0.03
    assert not boxes.mirrored.any()
    flipped = PadCrop(32, 4, flip=True).boxes(side, side, Draws(0, 0, np.arange(count)))
    assert 0.48 < flipped.mirrored.mean() < 0.52


def sampled_by_the_book(rng: np.random.Generator, height: int, width: int) -> tuple[float, float, float]:
    """torchvision's law, one image at a time: (area fraction, log ratio, centre of the box / width)."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            return h * w / (height * width), math.log(w / h), (left + w / 2) / width
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return h * w / (height * width), math.log(w / h), ((width - w) // 2 + w / 2) / width


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 200)])
def test_random_crops_follow_torchvisions_law(height: int, width: int) -> None:
    count = 4000
    rng = np.random.default_rng(0)
    expected = np.array([sampled_by_the_book(rng, height, width) for _ in range(count)])
    full = np.full(count, height), np.full(count, width)
    boxes = RandomResizedCrop(224).boxes(*full, Draws(5, 2, np.arange(count)))
    area = boxes.height * boxes.width / (height * width)
    assert ks_2samp(area, expected[:, 0]).pvalue > 1e-3
    assert ks_2samp(np.log(boxes.width / boxes.height), expected[:, 1]).pvalue > 1e-3
    assert ks_2samp((boxes.left + boxes.width / 2) / width, expected[:, 2]).pvalue > 1e-3
    assert 0.47 < boxes.mirrored.mean() < 0.53


@pytest.mark.parametrize(("height", "width", "box"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))])
def test_extreme_shapes_fall_back_to_the_largest_centred_box(
    height: int, width: int, box: tuple[int, int, int, int]
) -> None:
    crop = RandomResizedCrop(8, scale=(0.9, 1.0))
    assert one(crop, height, width) == box


def test_full_scale_takes_the_whole_square() -> None:
    assert one(RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1)), 50, 50) == (0, 0, 50, 50)


def test_draws_are_uniform_and_independent_of_company() -> None:
    ids = np.arange(20_000)
    draws = Draws(seed=1, epoch=2, sample_ids=ids)
    for number in (0, 1, 22):
        assert kstest(draws(number), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws(0), draws(1))[0, 1]) < 0.03
    assert abs(np.corrcoef(draws(0)[:-1], draws(0)[1:])[0, 1]) < 0.03
    assert np.array_equal(Draws(1, 2, ids[777:778])(3), draws(3)[777:778])
    assert not (Draws(1, 3, ids)(0) == draws(0)).any()
    assert not (Draws(2, 2, ids)(0) == draws(0)).any()
    assert not (Draws(2, 1, ids)(0) == draws(0)).any()
    assert draws(0).min() >= 0
    assert draws(0).max() < 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomResizedCrop(0), "size"),
        (lambda: RandomResizedCrop(224, scale=(0.0, 1.0)), "scale"),
        (lambda: RandomResizedCrop(224, scale=(0.5, 1.1)), "scale"),
        (lambda: RandomResizedCrop(224, ratio=(1.3, 0.7)), "ratio"),
        (lambda: RandomResizedCrop(224, ratio=(1.0,)), "ratio"),
        (lambda: PadCrop(32.5, 4), "size"),
        (lambda: PadCrop(32, -1), "padding"),
        (lambda: CenterCrop(224, 0.0), "ratio"),
        (lambda: CenterCrop(224, 256 / 224), "ratio"),
    ],
)
def test_values_are_checked(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_lists_from_yaml_become_tuples() -> None:
    assert RandomResizedCrop(8, scale=[0.5, 1]) == RandomResizedCrop(8, scale=(0.5, 1.0))  # type: ignore[arg-type]


@settings(max_examples=200)
@given(samples=st.integers(1, 500), world=st.integers(1, 9))
def test_validation_sees_every_image_once(samples: int, world: int) -> None:
    shares = [val_order(samples, rank=rank, world_size=world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=200)
@given(
    samples=st.integers(1, 500),
    world=st.integers(1, 5),
    batch=st.integers(1, 40),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**32),
)
def test_training_shares_are_disjoint_whole_batches(
    samples: int, world: int, batch: int, epoch: int, seed: int
) -> None:
    def share(rank: int, world_size: int, batch_size: int) -> np.ndarray:
        return train_order(samples, batch_size=batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)

    shares = [share(rank, world, batch) for rank in range(world)]
    steps = samples // (batch * world)
    assert {len(s) for s in shares} == {steps * batch}
    seen = np.concatenate(shares)
    assert len(set(seen.tolist())) == len(seen)
    together = share(0, 1, batch * world)
    for step in range(steps):  # a step is the same set of images, shared or not
        apart = np.concatenate([s[step * batch : (step + 1) * batch] for s in shares])
        assert sorted(apart) == sorted(together[step * batch * world : (step + 1) * batch * world])


def test_dropped_images_and_order_change_with_the_epoch_and_the_seed() -> None:
    orders = [train_order(101, batch_size=10, seed=s, epoch=e).tolist() for s, e in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({frozenset(order) for order in orders}) == 3
