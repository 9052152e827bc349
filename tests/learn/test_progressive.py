"""Images that grow during the training."""

from __future__ import annotations

import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch._dynamo.testing import CompileCounter

from repvgg.data.transforms import CenterCrop, RandomResizedCrop
from repvgg.learn.datamodule import ImageDataModule
from repvgg.learn.progressive import ProgressiveResize
from support.networks import tiny
from support.training import classifier, datamodule, trainer, two_forms

WRITE = """
import sys
from repvgg.data.sources import ImageFolder
from repvgg.data.write import WriteOptions, write_beton
from support.images import photo_folder

photo_folder(sys.argv[1] + "/photos", classes=2, per_class=8, size=(120, 100))
photos = ImageFolder(sys.argv[1] + "/photos")
for split in ("train", "val"):
    write_beton(photos, f"{sys.argv[1]}/{split}.beton", options=WriteOptions(), progress=False)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 photographs of two classes, about 120×100 pixels."""
    directory = tmp_path_factory.mktemp("photos")
    subprocess.run([sys.executable, "-c", WRITE, str(directory)], check=True, timeout=120)
    return directory


def data(directory: Path) -> ImageDataModule:
    return ImageDataModule(
        train_file=str(directory / "train.beton"), val_file=str(directory / "val.beton"), num_classes=2,
        train_transform=RandomResizedCrop(64), val_transform=CenterCrop(64), mean=[120.0] * 3, std=[60.0] * 3,
        batch_size=4, seed=0,
    )  # fmt: skip


class Sizes(pl.Callback):
    """Of every epoch, the sizes of its training batches, and the validation's; and the first batch itself."""

    def __init__(self) -> None:
        self.train: list[set[int]] = []
        self.val: set[int] = set()
        self.first: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.train.append(set())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.train[-1] |= set(batch[0].shape[2:])
        if batch_idx == 0:
            self.first.append(batch[0].clone())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.val |= set(batch[0].shape[2:])


def resize() -> ProgressiveResize:
    return ProgressiveResize(32, 96, begin=0.25, finish=0.75)


def fit(directory: Path, photos: Path, *callbacks: pl.Callback, ckpt: str | None = None, **options) -> pl.Trainer:
    run = trainer(directory, [resize(), *callbacks], max_epochs=4, limit_train_batches=None, **options)
    module = classifier(tiny(num_classes=10, strides=(2, 2, 2, 2, 1)))
    run.fit(module, datamodule=data(photos), ckpt_path=ckpt, weights_only=True)
    return run


def test_ffcv_imagenets_ramp() -> None:
    """Its 88-epoch config: 160 px, from epoch 65 to 76 up to 192; and its 16-epoch one, with 11 and 13."""
    import numpy as np

    for epochs, begin, finish in ((88, 65, 76), (16, 11, 13)):
        ramp = ProgressiveResize(160, 192, begin / epochs, finish / epochs)
        for epoch in range(epochs):
            theirs = int(np.round(np.interp([epoch], [begin, finish], [160, 192]) / 32)[0]) * 32
            assert ramp.size(epoch, epochs) == theirs, epoch


@given(st.integers(1, 10), st.integers(1, 10), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
def test_sizes_are_multiples_that_go_one_way(start: int, end: int, a: float, b: float, epochs: int) -> None:
    ramp = ProgressiveResize(32 * start, 32 * end, min(a, b), max(a, b))
    sizes = [ramp.size(epoch, epochs) for epoch in range(epochs)]
    assert all(size % 32 == 0 and min(start, end) <= size // 32 <= max(start, end) for size in sizes)
    assert sizes == sorted(sizes, reverse=start > end)
    assert ramp.size(epochs, epochs) == 32 * end


@pytest.mark.parametrize("wrong", [{"start": 100}, {"end": 0}, {"begin": 0.9}, {"finish": 1.1}])
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.resize: "):
        ProgressiveResize(**{"start": 160, "end": 192, "begin": 0.75, "finish": 0.86, **wrong})


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_sizes_change_between_epochs_and_a_resumed_run_has_those_of_its_epochs(photos: Path, tmp_path: Path) -> None:
    def kept() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    whole, resumed = Sizes(), Sizes()
    run = fit(tmp_path, photos, whole, two_forms(), kept(), enable_checkpointing=True)
    assert whole.train == [{32}, {32}, {64}, {96}]
    assert whole.val == {64}
    assert run.callback_metrics["perf/train_px"] == 96
    fit(tmp_path, photos, resumed, two_forms(), kept(), ckpt=str(tmp_path / "epoch=1.ckpt"), enable_checkpointing=True)
    assert resumed.train == [{64}, {96}]
    assert all(torch.equal(a, b) for a, b in zip(whole.first[2:], resumed.first, strict=True))


@pytest.mark.slow
def test_a_size_is_compiled_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Classifier(compile=True) asks of torch.compile, with a counter in the compiler's place."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter))
    module = classifier(tiny(num_classes=10, strides=(2, 2, 2, 2, 1)), compile=True)
    counts = []

    class Back(ProgressiveResize):
        def size(self, epoch: int, epochs: int) -> int:
            return [32, 64, 32, 64, 96, 32][epoch]

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            counts.append(counter.frame_count)

    run = trainer(tmp_path, [Back(32, 96, 0, 1)], max_epochs=6, limit_train_batches=2, limit_val_batches=0)
    run.fit(module, datamodule=data(photos))
    assert counts == [1, 2, 2, 2, 3, 3]


def test_data_that_cannot_change_is_named(digits: Path, photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, [ProgressiveResize(64, 96, 0, 1)], limit_val_batches=0)
    with pytest.raises(ValueError, match="PadCrop cannot change its size"):
        run.fit(classifier(), datamodule=datamodule(digits))
    stock = data(photos)
    stock.loader_options["ops"] = "stock"
    run = trainer(tmp_path, [ProgressiveResize(32, 96, 0, 1)], limit_val_batches=0)
    with pytest.raises(ValueError, match="only ops='fused' can change the output size"):
        run.fit(classifier(tiny(num_classes=10)), datamodule=stock)
    loaders = torch.utils.data.DataLoader([(torch.zeros(3, 32, 32), 0)])
    with pytest.raises(ValueError, match=r"callbacks\.resize=null"):
        trainer(tmp_path, [resize()]).fit(classifier(), loaders, loaders)
