"""Augmentation: every operation against PIL, what is drawn, and mixup with its loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from pytorch_lightning.callbacks import ModelCheckpoint

from repvgg.learn import augment
from repvgg.learn.augment import TIMM_INCREASING, RandAugment, batch_generator, mixup
from support.images import photo
from support.training import classifier, datamodule, trainer

FILL = (124, 116, 104)
SIZE = 96
ALL_ONE_VALUE, TWO_VALUES = Image.new("RGB", (SIZE, SIZE), (7, 8, 9)), Image.new("RGB", (SIZE, SIZE), (0, 255, 255))
TWO_VALUES.paste((200, 10, 254), (0, 0, 40, 96))


def images() -> list[Image.Image]:
    """Parts of two photographs, dull ones, and such as have one or two values a channel."""
    rng = np.random.default_rng(0)
    photos = [photo(rng, (SIZE, SIZE), label) for label in range(6)]
    dull = [Image.eval(p, lambda v: 60 + v // 4) for p in photos[:2]]
    return [*photos, *dull, ALL_ONE_VALUE, TWO_VALUES]


def batch(pictures: list[Image.Image]) -> torch.Tensor:
    """N × 3 × H × W in channels_last strides, as the loader gives them."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL)


NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
LOOKED_UP = {  # exact
    "auto_contrast": ([0.0], lambda image, _: ImageOps.autocontrast(image)),
    "equalize": ([0.0], lambda image, _: ImageOps.equalize(image)),
    "invert": ([0.0], lambda image, _: ImageOps.invert(image)),
    "posterize": ([4.0, 2.6, 1.2, 1.0], lambda image, bits: ImageOps.posterize(image, int(np.ceil(bits)))),
    "solarize": ([256.0, 128.0, 76.8, 0.0], ImageOps.solarize),
    "solarize_add": (
        [0.0, 77.6, 110.0],
        lambda image, amount: image.point([min(v + int(amount), 255) if v < 128 else v for v in range(256)] * 3),
    ),
    "color": ([-0.9, -0.63, 0.0, 0.45, 0.9], lambda image, v: ImageEnhance.Color(image).enhance(1 + v)),
    "contrast": ([-0.9, -0.63, 0.0, 0.45, 0.9], lambda image, v: ImageEnhance.Contrast(image).enhance(1 + v)),
    "brightness": ([-0.9, -0.63, 0.0, 0.45, 0.9], lambda image, v: ImageEnhance.Brightness(image).enhance(1 + v)),
    "sharpness": ([-0.9, -0.63, 0.0, 0.45, 0.9], lambda image, v: ImageEnhance.Sharpness(image).enhance(1 + v)),
}
NEAREST_PIXEL = {
    "rotate": ([-30.0, 0.0, 13.7, 30.0], lambda image, v: image.rotate(v, NEAREST, fillcolor=FILL)),
    "translate_x": ([-0.45, 0.0, 0.113], lambda image, v: affine(image, (1, 0, v * SIZE, 0, 1, 0), NEAREST)),
    "translate_y": ([-0.45, 0.0, 0.113], lambda image, v: affine(image, (1, 0, 0, 0, 1, v * SIZE), NEAREST)),
}
SMOOTH = {
    "shear_x": ([-0.3, 0.0, 0.21], lambda image, v: affine(image, (1, v, 0, 0, 1, 0), BILINEAR)),
    "shear_y": ([-0.3, 0.0, 0.21], lambda image, v: affine(image, (1, 0, 0, v, 1, 0), BILINEAR)),
}


def difference(name: str, argument: float, oracle) -> torch.Tensor:
    pictures = images()
    operation = getattr(augment, name)
    arguments = torch.full((len(pictures),), argument)
    before = batch(pictures)
    ours = operation(before, arguments, torch.tensor(FILL, dtype=torch.uint8))
    assert ours.dtype == torch.uint8
    assert torch.equal(before, batch(pictures))  # the loader's buffer is not written to
    return (ours.int() - batch([oracle(p, argument) for p in pictures]).int()).abs()


def cases(table: dict) -> list:
    return [pytest.param(n, a, oracle, id=f"{n} {a:g}") for n, (values, oracle) in table.items() for a in values]


@pytest.mark.parametrize(("name", "argument", "oracle"), cases(LOOKED_UP))
def test_values_change_exactly_as_in_pil(name: str, argument: float, oracle) -> None:
    assert difference(name, argument, oracle).max() == 0


@pytest.mark.parametrize(("name", "argument", "oracle"), cases(NEAREST_PIXEL))
def test_pixels_move_as_in_pil(name: str, argument: float, oracle) -> None:
    """Exactly, but for pixels whose place is within 2⁻¹⁶ of an edge: PIL counts in fixed point."""
    assert (difference(name, argument, oracle) > 0).double().mean() < 1e-3


@pytest.mark.parametrize(("name", "argument", "oracle"), cases(SMOOTH))
def test_shears_are_within_a_level_of_pil(name: str, argument: float, oracle) -> None:
    apart = difference(name, argument, oracle)
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.01


def test_posterize_to_no_bits_is_black() -> None:  # which PIL refuses; magnitude 10 asks for it
    assert not augment.posterize(batch(images()), torch.zeros(10), torch.tensor(FILL)).any()


def test_every_operation_has_its_oracle() -> None:
    names = [operation.apply.__name__ for operation in TIMM_INCREASING]
    assert sorted(names) == sorted([*LOOKED_UP, *NEAREST_PIXEL, *SMOOTH])


def test_ranges_are_mmpretrains() -> None:
    ranges = {o.apply.__name__: (o.low, o.high, o.signed) for o in TIMM_INCREASING}
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert ranges[name] == (0, 0.9, True)
    assert ranges["shear_x"] == ranges["shear_y"] == (0, 0.3, True)
    assert ranges["translate_x"] == ranges["translate_y"] == (0, 0.45, True)
    assert ranges["rotate"] == (0, 30, True)
    assert (ranges["posterize"], ranges["solarize"]) == ((4, 0, False), (256, 0, False))
    assert ranges["solarize_add"] == (0, 110, False)


def test_each_image_has_operations_of_its_own() -> None:
    """Drawn as told: all 15 equally often, half of them applied, N(7, 0.5) cut at 10, and half negated."""
    number, arguments = RandAugment(magnitude=7, std=0.5)._draw(60_000, np.random.default_rng(0))
    counts = Counter(number.tolist())
    assert counts[15] / 60_000 == pytest.approx(0.5, abs=0.01)
    assert all(counts[i] / 30_000 == pytest.approx(1 / 15, abs=0.01) for i in range(15))
    degrees = arguments[number == 3]
    assert (degrees < 0).mean() == pytest.approx(0.5, abs=0.05)
    assert np.abs(degrees).mean() == pytest.approx(21, abs=0.2)
    assert np.abs(degrees).std() == pytest.approx(1.5, abs=0.1)
    assert arguments[number == 5].mean() == pytest.approx(256 * 0.3, abs=2)  # solarize falls with the magnitude
    assert np.abs(RandAugment(magnitude=10, std=3)._draw(1000, np.random.default_rng(0))[1][:]).max() <= 256


def test_the_batch_equals_one_image_after_the_other() -> None:
    """Grouping by operation keeps rows apart: each image alone, with its own operations in their order."""
    pictures = images()
    policy = RandAugment(operations=3, probability=1.0)
    together = policy(batch(pictures), np.random.default_rng(5), FILL)
    rng = np.random.default_rng(5)
    draws = [policy._draw(len(pictures), rng) for _ in range(3)]
    for i, picture in enumerate(pictures):
        alone = batch([picture])
        for number, arguments in draws:
            operation = TIMM_INCREASING[number[i]]
            alone = operation.apply(alone, torch.tensor(arguments[i : i + 1]), torch.tensor(FILL, dtype=torch.uint8))
        assert torch.equal(together[i], alone[0])


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe\.rand_augment\.magnitude=11 must lie in 0 … 10"):
        RandAugment(magnitude=11)
    with pytest.raises(ValueError, match=r"probability=2 must"):
        RandAugment(probability=2)
    with pytest.raises(ValueError, match="uint8"):
        RandAugment()(torch.zeros(1, 3, 8, 8), np.random.default_rng(0), FILL)
    with pytest.raises(ValueError, match=r"recipe\.mixup=-1 is the α"):
        datamodule(Path(), mixup=-1)


@given(st.tuples(*[st.integers(0, 5)] * 4), st.tuples(*[st.integers(0, 5)] * 4))
@settings(max_examples=50, deadline=None)
def test_batches_draw_alike_only_when_all_four_numbers_are(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    draws = [batch_generator(*numbers).random(4).tolist() for numbers in (a, b)]
    assert (draws[0] == draws[1]) == (a == b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_and_its_loss_equal_the_formulas(smoothing: float) -> None:
    """Against the plainest float64: −Σ over classes of the smoothed share times the log-probability."""
    rng = np.random.default_rng(3)
    x, labels = torch.from_numpy(rng.random((8, 3, 4, 4))), torch.from_numpy(rng.integers(10, size=8))
    share, partner = (g := np.random.default_rng(1)).beta(0.2, 0.2), g.permutation(8)
    mixed, targets = mixup(x, labels, 10, 0.2, np.random.default_rng(1))
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner], rtol=1e-12, atol=1e-12)
    expected = np.zeros((8, 10))
    for i in range(8):
        expected[i, labels[i]] += share
        expected[i, labels[partner[i]]] += 1 - share
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-12)

    module = classifier(label_smoothing=smoothing).double()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module._trainer = type("Run", (), {"optimizers": [torch.optim.SGD(module.parameters(), lr=0.1)]})()  # type: ignore[assignment]
    images = torch.from_numpy(rng.standard_normal((8, 3, 32, 32)))
    loss = module.training_step((images, targets), 0)
    logits = module.net(images).detach().numpy()  # the same batch: BatchNorm in training mode
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    smoothed = (1 - smoothing) * expected + smoothing / 10
    assert loss.item() == pytest.approx(-(smoothed * log_probabilities).sum(1).mean(), rel=1e-9)
    right = (logits.argmax(1) == expected.argmax(1)).mean()  # the class with the larger share
    assert module.train_scores["top1"].compute().item() == pytest.approx(right, abs=1e-6)


def test_one_share_a_batch_from_the_beta_distribution() -> None:
    eye = torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)
    shares = []
    for seed in range(2000):
        mixed, _ = mixup(eye, torch.arange(4), 4, 0.2, np.random.default_rng(seed))
        own = mixed.flatten(1).diagonal()
        moved = own < 1
        if moved.any():
            assert own[moved].max() == pytest.approx(own[moved].min().item())
            shares.append(own[moved][0].item())
    # Beta(α, α): mean ½, variance 1 / (4 (2 α + 1))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 1.4), rel=0.05)


class Seen(pl.Callback):
    """What the network was given, and the state of torch's generator afterwards."""

    def __init__(self) -> None:
        self.train: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.val: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.train.append((batch[0].clone(), batch[1].clone()))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        assert not batch[1].is_floating_point()
        self.val.append(batch[0].clone())


def fit(directory: Path, digits: Path, *callbacks: pl.Callback, ckpt: str | None = None, **options) -> Seen:
    seen = Seen()
    options = {"rand_augment": RandAugment(), "mixup": 0.2, **options}
    run = trainer(
        directory, [seen, *callbacks], max_epochs=2, limit_train_batches=3, limit_val_batches=2,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    run.fit(classifier(), datamodule=datamodule(digits, **options), ckpt_path=ckpt, weights_only=True)
    return seen


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(digits: Path, tmp_path: Path) -> None:
    def kept() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    torch.manual_seed(11)
    whole = fit(tmp_path, digits, kept())
    torch.manual_seed(12)
    resumed = fit(tmp_path, digits, kept(), ckpt=str(tmp_path / "epoch=0.ckpt"))
    assert len(whole.train) == 6
    assert len(resumed.train) == 3
    for (a, shares_a), (b, shares_b) in zip(whole.train[3:], resumed.train, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(shares_a, shares_b)
    assert not torch.equal(whole.train[0][0], whole.train[3][0])


def test_augments_training_batches_alone_and_leaves_torchs_generator(digits: Path, tmp_path: Path) -> None:
    states = []
    for options in ({}, {"rand_augment": None, "mixup": 0.0}):
        seen = fit(tmp_path, digits, **options)
        states.append((seen, torch.get_rng_state()))
    (augmented, with_it), (plain, without) = states
    assert torch.equal(with_it, without)
    assert all(torch.equal(a, b) for a, b in zip(augmented.val, plain.val, strict=True))
    assert all(labels.shape == (64, 10) for _, labels in augmented.train)
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(augmented.train, plain.train, strict=True))


def test_ranks_draw_differently(digits: Path, tmp_path: Path) -> None:
    """The same batch on two ranks, as the data module sees them."""
    run = trainer(tmp_path, [], limit_train_batches=1, limit_val_batches=0)
    data = datamodule(digits, rand_augment=RandAugment(), mixup=0.2)
    run.fit(classifier(), datamodule=data)
    run.training = True
    pixels, labels = batch(images()), torch.arange(10)
    given = [data.on_after_batch_transfer((pixels, labels), 0) for _ in range(2)]
    assert torch.equal(given[0][0], given[1][0])
    data.trainer = _Rank(run, 1)  # type: ignore[assignment]
    other = data.on_after_batch_transfer((pixels, labels), 0)
    assert not torch.equal(given[0][0], other[0])
    assert not torch.equal(given[0][1], other[1])


class _Rank:
    """A trainer that says it is another rank."""

    def __init__(self, run: pl.Trainer, rank: int) -> None:
        self.run, self.global_rank = run, rank

    def __getattr__(self, name: str):
        return getattr(self.run, name)
