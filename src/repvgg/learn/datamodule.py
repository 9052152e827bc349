"""From `.beton` files to normalised batches on the device, for every rank its share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from repvgg.data.loader import Batch, SafeLoader, make_loader
from repvgg.data.manifest import number_of_classes, read_manifest
from repvgg.data.verify import Check, check_beton, require_check
from repvgg.learn.augment import RandAugment, batch_generator, mixup


class ImageDataModule(pl.LightningDataModule):
    """Training and validation loaders over two `.beton` files.

    Args:
        train_file, val_file: written by ``src/write_dataset.py`` or by ``prepare``.
        num_classes: must be the number in the files' manifests.
        train_transform, val_transform: crops of :mod:`repvgg.data.transforms`.
        rand_augment: of the training images, before they are normalised.
        mixup: α of :func:`repvgg.learn.augment.mixup`; 0 for none.
        mean, std: per channel, in units of the uint8 image (0 to 255).
        batch_size: images per batch of one device.
        seed: of order, crops, flips and augmentation.
        channels_last: memory format of the batches.
        prepare: writes the files where they are made at run time; called once per machine.
        ops: "fused", or "stock" for FFCV's own operations.
        num_threads: of the loader, per rank; None shares the allowed cores among the ranks of a machine.
        batches_ahead: batches decoded in advance.
        os_cache: keep the file in the page cache (more than the file's size of memory), or read it as it goes.
        check: how much of the files is decoded before the training: "sample", "full" or "tables".

    Batches:
        images N × 3 × H × W in the network's dtype, normalised; labels N, int64, or with mixup, while training, shares
        N × num_classes.

    Raises:
        ValueError: a negative ``mixup``, an unknown ``check``.
    """

    def __init__(
        self,
        *,
        train_file: str,
        val_file: str,
        num_classes: int,
        train_transform: Any,
        val_transform: Any,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        channels_last: bool = True,
        prepare: Callable[[], object] | None = None,
        ops: str = "fused",
        num_threads: int | None = None,
        batches_ahead: int = 3,
        os_cache: bool = True,
        rand_augment: RandAugment | None = None,
        mixup: float = 0.0,
        check: Check = "sample",
    ) -> None:
        super().__init__()
        require_check(check)
        if mixup < 0:
            raise ValueError(f"recipe.mixup={mixup} is the α of a Beta distribution: positive, or 0 for no mixup")
        self.files = {"train": Path(train_file), "val": Path(val_file)}
        self.transforms = {"train": train_transform, "val": val_transform}
        self.num_classes = num_classes
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
        self.fill = list(mean)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
        self.batch_size, self.seed, self.channels_last, self.prepare = batch_size, seed, channels_last, prepare
        self.loader_options: dict[str, Any] = {"ops": ops, "batches_ahead": batches_ahead, "os_cache": os_cache}
        self.num_threads = num_threads
        self.rand_augment, self.mixup = rand_augment, mixup
        self.check: Check = check
        self._checked: set[Path] = set()
        self._loaders: dict[str, SafeLoader] = {}

    def prepare_data(self) -> None:
        """Write what is made at run time, and look for damage before anything is trained.

        Lightning calls this on one rank per machine and lets the others wait, as long as it takes.

        Raises:
            CorruptDatasetError: with file and record.
        """
        if self.prepare is not None:
            self.prepare()
        for path in dict.fromkeys(self.files.values()):
            if path not in self._checked:  # Lightning prepares the test again
                check_beton(path, self.check, show_progress=True)
                self._checked.add(path)

    def setup(self, stage: str) -> None:
        """Compare the files' classes with the network's before anything is trained."""
        number_of_classes(self.files, self.num_classes)

    def class_names(self) -> dict[str, list[str]]:
        """What the manifest calls the classes; see :attr:`repvgg.data.manifest.Manifest.names`."""
        return read_manifest(self.files["val"]).names

    def train_dataloader(self) -> SafeLoader:
        """This rank's share, in an order and with crops that seed and epoch fix."""
        return self._loader("train")

    def val_dataloader(self) -> SafeLoader:
        """Every image exactly once over all ranks."""
        return self._loader("val")

    def test_dataloader(self) -> SafeLoader:
        """The validation images: ImageNet's labelled test set is its validation set."""
        return self._loader("val")

    def set_train_size(self, size: int) -> None:
        """Training images of ``size`` pixels from the next epoch on; nothing is loaded or compiled again for it.

        Raises:
            ValueError: ops="stock", which cannot.
        """
        self.transforms["train"] = replace(self.transforms["train"], size=size)
        if "train" in self._loaders:
            self._loaders["train"].set_size(size)

    def _loader(self, split: str) -> SafeLoader:
        if split not in self._loaders:  # one loader per run: each new one leaves some memory behind
            trainer = self.trainer
            assert trainer is not None
            ranks = trainer.num_devices
            threads = self.num_threads or max(1, len(os.sched_getaffinity(0)) // ranks)
            loader = make_loader(
                self.files[split],
                transform=self.transforms[split],
                batch_size=self.batch_size,
                train=split == "train",
                seed=self.seed,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                num_threads=threads,
                device=trainer.strategy.root_device,
                batches_per_step=trainer.accumulate_grad_batches,
                reshuffle=not trainer.overfit_batches,  # type: ignore[attr-defined]
                **self.loader_options,
            )
            if split == "train":  # Lightning tells a training loader's sampler which epoch comes next
                loader.sampler = loader
            self._loaders[split] = loader
        return self._loaders[split]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 to normalised numbers of the network's dtype, on the device: a quarter of float32's bytes go there.

        Training batches are augmented before that; validation, test and sanity check see the images as they are.
        """
        images, labels = batch
        trainer = self.trainer
        assert trainer is not None
        dtype = next(trainer.lightning_module.parameters()).dtype  # not float32 with precision=64-true, bf16-true
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        rng = None
        if trainer.training and (self.rand_augment is not None or self.mixup):
            number = trainer.fit_loop.epoch_loop.batch_idx + 1  # counted up after the transfer
            rng = batch_generator(self.seed, trainer.global_rank, trainer.current_epoch, number)
        if rng is not None and self.rand_augment is not None:
            images = self.rand_augment(images, rng, fill=self.fill)
        # A copy, too: the loader's tensor is a ring buffer's slot that the next batch may overwrite.
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(torch.float32, memory_format=memory_format, copy=True)
        labels = labels.clone()
        if rng is not None and self.mixup:
            images, labels = mixup(images, labels, self.num_classes, self.mixup, rng)
        return images.sub_(self.mean).div_(self.std).to(dtype), labels
