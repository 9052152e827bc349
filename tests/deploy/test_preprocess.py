"""Images as an exported file wants them: those of the validation loader, made with PIL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg.data.loader import make_loader
from repvgg.data.pictures import UnreadableImageError, find_images, open_image
from repvgg.data.sources import ImageFolder
from repvgg.data.transforms import CenterCrop
from repvgg.data.write import WriteOptions, write_beton
from repvgg.deploy.preprocess import Preprocessing, class_names
from support.images import photo_folder

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def preprocessing(crop: int = 224, ratio: float = 0.875, inside: bool = False) -> Preprocessing:
    return Preprocessing.of_validation(crop, ratio, MEAN, STD, inside=inside)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), classes=2, per_class=3)


@pytest.mark.parametrize(("crop", "ratio"), [(224, 0.875), (160, 1.0)])
def test_the_crop_is_the_validation_loaders(crop: int, ratio: float, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "val.beton"
    write_beton(ImageFolder(photos), path, options=WriteOptions(), progress=False)
    loader = make_loader(path, transform=CenterCrop(crop, ratio), batch_size=6, train=False)
    ((theirs, _),) = [(images.clone(), labels) for images, labels in loader]
    prepared = preprocessing(crop, ratio)
    ours = np.stack([prepared.cut(open_image(file)) for file in find_images([photos]).files]).transpose(0, 3, 1, 2)
    # The writer shuffles: each of theirs is one of ours. PIL rounds twice, the loader once.
    found = [np.abs(ours.astype(float) - image.astype(float)).mean((1, 2, 3)) for image in theirs.numpy()]
    assert sorted(int(distances.argmin()) for distances in found) == list(range(6))
    assert max(distances.min() for distances in found) < 0.2


@given(width=st.integers(1, 400), height=st.integers(1, 400), crop=st.integers(1, 64), ratio=st.floats(0.25, 1.0))
@settings(deadline=None, max_examples=50)
def test_the_geometry_is_the_validation_transforms(width: int, height: int, crop: int, ratio: float) -> None:
    """The box that the crop shows, read back from an image whose pixels are their own coordinates."""
    transform = CenterCrop(crop, ratio)
    box = transform.boxes(np.array([height]), np.array([width]), lambda k: np.zeros(1))
    prepared = preprocessing(crop, ratio)
    assert prepared.resize == round(crop / ratio)
    columns = np.broadcast_to(np.arange(width, dtype=np.float32) / 2, (height, width))
    rows = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None] / 2, (height, width))
    image = Image.merge("RGB", [Image.fromarray(plane.astype(np.uint8)) for plane in (columns, rows, columns)])
    shown = prepared.cut(image).astype(float)
    assert shown.shape == (crop, crop, 3)
    for axis, side, start, length in ((0, width, box.left, box.width), (1, height, box.top, box.height)):
        centre = (start[0] + length[0] / 2 - 0.5) / 2
        scale = length[0] / crop
        # A level is two pixels; uint8 cuts, PIL rounds, and at the edges the filter is cut off.
        margin = 1.5 + scale / 2 if crop > 1 else 1.5 + scale
        assert abs(shown[:, :, axis].mean() - centre) < margin, (side, centre)


def test_a_batch_is_normalised_where_the_file_does_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    raw = preprocessing(8, 1.0, inside=True).batch([pixels, pixels])
    assert raw.dtype == np.float32
    assert raw.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(raw[1], pixels.transpose(2, 0, 1))
    normalized = preprocessing(8, 1.0).batch([pixels])
    np.testing.assert_allclose(normalized[0, 1], (pixels[:, :, 1] - 116.28) / 57.12, rtol=1e-6, atol=1e-6)


@given(
    crop=st.integers(1, 512),
    ratio=st.floats(0.1, 1.0),
    mean=st.lists(st.floats(0, 255), min_size=1, max_size=4),
    inside=st.booleans(),
)
def test_metadata_say_everything(crop: int, ratio: float, mean: list[float], inside: bool) -> None:
    said = Preprocessing.of_validation(crop, ratio, mean, [value + 1 for value in mean], inside=inside)
    metadata = {**said.metadata(), "normalize": "inside" if inside else "outside"}
    assert Preprocessing.of_file(metadata) == said


@pytest.mark.parametrize("missing", ["resize", "crop", "mean", "std", "normalize"])
def test_a_file_that_does_not_say_is_refused(missing: str) -> None:
    metadata = {**preprocessing().metadata(), "normalize": "inside"}
    for changed in ({k: v for k, v in metadata.items() if k != missing}, {**metadata, missing: "?"}):
        with pytest.raises(ValueError, match=r"its metadata lack how images are prepared"):
            Preprocessing.of_file(changed)


def test_class_names() -> None:
    assert class_names({}) is None
    assert class_names({"classes": '["tench", "é"]'}) == ["tench", "é"]


def test_images_are_found_in_order_and_faulty_ones_named(photos: Path, tmp_path: Path) -> None:
    found = find_images([photos / "class_1", photos / "class_0" / "0002.jpg"]).files
    assert [str(file.relative_to(photos)) for file in found] == [
        *("class_1/0000.jpg", "class_1/0001.jpg", "class_1/0002.jpg", "class_0/0002.jpg")
    ]
    with pytest.raises(ValueError, match=r"none.jpg: there is no such file"):
        find_images([tmp_path / "none.jpg"])
    with pytest.raises(ValueError, match=r"holds no images \(.bmp"):
        find_images([tmp_path])
    whole = found[0].read_bytes()
    for name, content in {"text.jpg": b"text", "half.jpg": whole[: len(whole) // 2], "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImageError, match=f"{name} cannot be read as an image"):
            open_image(tmp_path / name)


def test_any_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 7)).save(path)
        assert preprocessing(8, 1.0).cut(open_image(path)).shape == (8, 8, 3)
