"""Real .beton files of a few dozen images, cut from the photographs that scikit-learn ships."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from repvgg.data.sources import ImageFolder, InMemory
from repvgg.data.write import WriteOptions, write_beton

COUNT = 101  # prime: no number of ranks or batch size divides it
SIDE = 32


def patch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    photo = load_sample_image(("china.jpg", "flower.jpg")[int(rng.integers(2))])
    top = int(rng.integers(photo.shape[0] - height + 1))
    left = int(rng.integers(photo.shape[1] - width + 1))
    return photo[top : top + height, left : left + width]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 101 images of many shapes; in class `modes` every PIL mode that photographs come in."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    modes = root / "modes"
    modes.mkdir()
    image = Image.fromarray(patch(rng, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    image.save(modes / "exif.jpg", exif=exif)
    image.save(modes / "rgb.png")
    image.convert("L").save(modes / "gray.png")
    image.convert("L").save(modes / "gray.JPEG")
    image.convert("1").save(modes / "bilevel.png")
    image.convert("LA").save(modes / "gray_alpha.png")
    image.convert("CMYK").save(modes / "cmyk.jpg")
    image.convert("P").save(modes / "palette.png")
    image.convert("P").save(modes / "palette_transparent.png", transparency=3)
    image.convert("RGBA").save(modes / "rgba.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(modes / "gray16.png")
    for number in range(COUNT - len(list(modes.iterdir()))):
        height, width = (int(side) for side in rng.integers(20, 150, size=2))
        target = root / f"class_{number % 2}" / "deeper" / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch(rng, height, width)).save(target)
    return root


@pytest.fixture(scope="session")
def varied(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as JPEG records."""
    path = tmp_path_factory.mktemp("varied") / "train.beton"
    write_beton(ImageFolder(folder), path, options=WriteOptions(jpeg_quality=95), seed=3, progress=False)
    return path


@pytest.fixture(scope="session")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as half JPEG, half raw records of at most 64 px."""
    path = tmp_path_factory.mktemp("mixed") / "train.beton"
    options = WriteOptions(write_mode="proportion", max_resolution=64)
    write_beton(ImageFolder(folder), path, options=options, num_workers=2, progress=False)
    return path


@pytest.fixture(scope="session")
def squares() -> InMemory:
    rng = np.random.default_rng(1)
    return InMemory(
        images=np.stack([patch(rng, SIDE, SIDE) for _ in range(COUNT)]),
        labels=np.arange(COUNT, dtype=np.int64),  # so that a label tells which image it is
        classes=[str(i) for i in range(COUNT)],
        description="squares",
    )


@pytest.fixture(scope="session")
def square(squares: InMemory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 raw records of 32×32 px; the label is the number in `squares`."""
    path = tmp_path_factory.mktemp("square") / "train.beton"
    write_beton(squares, path, options=WriteOptions(write_mode="raw"), progress=False)
    return path


@pytest.fixture
def faulty_sources(monkeypatch: pytest.MonkeyPatch) -> object:
    """The module beside this file, importable by name in the writing process too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import faulty_sources

    yield faulty_sources
    sys.modules.pop("faulty_sources", None)
