import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from repvgg.data.manifest import read_manifest
from repvgg.data.patches import patches
from repvgg.data.sources import InMemory, digits
from repvgg.data.transforms import CenterCrop, PadCrop, RandomResizedCrop
from repvgg.data.verify import read_records

ROOT = Path(__file__).parents[2]


def write_dataset(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/write_dataset.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["imagenet", "digits", "patches", "folder"])
def test_data_configs_say_all_there_is_to_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ROOT", "/somewhere")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("write_dataset", overrides=[f"data={name}", "++data.num_classes=10"]).data
    plain = OmegaConf.to_container(config, resolve=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        imagenet = compose("write_dataset").data
    assert list(plain) == list(imagenet), "the same keys in the same order"
    assert config.name == name
    assert config.train_file == f"/somewhere/data/{name}/train.beton"
    assert f"data={name}" in config.write_command
    assert all(0 < value < 255 for value in [*config.mean, *config.std])
    train, val = instantiate(config.train_transform), instantiate(config.val_transform)
    embedded = {"digits": PadCrop(32, 4), "patches": PadCrop(32, 4, flip=True)}
    if name in embedded:
        assert (train, val) == (embedded[name], CenterCrop(32, 1.0))
    else:
        assert (train, val) == (RandomResizedCrop(224), CenterCrop(224))
    assert (config.prepare is None) == (name not in embedded)


@pytest.mark.parametrize("make", [digits, patches])
def test_the_constants_of_embedded_data_are_those_of_the_images(make: Callable[..., InMemory]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("write_dataset", overrides=[f"data={make.__name__}"]).data
    source = make("train")
    images = np.stack([np.asarray(source[i].image) for i in range(len(source))])
    assert config.num_classes == len(source.classes)
    # JPEG, through which the constants were measured, moves them a little.
    assert np.allclose(images.mean(axis=(0, 1, 2)), config.mean, atol=1.0)
    assert np.allclose(images.std(axis=(0, 1, 2)), config.std, atol=1.0)


@pytest.mark.slow
def test_write_dataset_writes_two_folders_of_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (60, 40), "red").save(tmp_path / split / label / "a.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "cat" / "a.gif").touch()
    sources = [f"source.{split}={tmp_path / split}" for split in ("train", "val")]
    target = f"data.dir={tmp_path / 'out'}"
    done = write_dataset("data=folder", target, *sources, "write.max_resolution=30", "num_workers=1")
    assert done.returncode == 0, done.stderr
    assert "train.beton: 2 images of 2 classes; not read: 1 .gif, 1 hidden\n" in done.stdout
    assert "val.beton: 2 images of 2 classes\n" in done.stdout
    for split in ("train", "val"):
        manifest = read_manifest(tmp_path / "out" / f"{split}.beton")
        assert manifest.classes == ["cat", "dog"]
        assert read_records(tmp_path / "out" / f"{split}.beton").images["width"].tolist() == [30, 30]
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    refused = write_dataset("data=folder", target, *sources)
    assert refused.returncode == 2
    assert "in one only: dog, wolf" in refused.stderr


def test_write_dataset_says_what_is_missing(tmp_path: Path) -> None:
    before = set(ROOT.iterdir())
    for arguments, words in (
        ([], ["source.train and source.val", "data=imagenet"]),
        ([f"source.train={tmp_path / 'no'}", f"source.val={tmp_path}"], [f"{tmp_path / 'no'} is not a folder"]),
    ):
        refused = write_dataset(*arguments)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
        assert all(word in refused.stderr for word in words)
    assert set(ROOT.iterdir()) == before, "no output folders"
