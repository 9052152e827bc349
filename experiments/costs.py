"""What this repository's own machinery costs on the machine at hand: `python experiments/costs.py [--rounds 5]`.

Prints a Markdown table of medians, smallest and largest of n rounds. Things that are compared take turns within a
round, so that a machine that slows down is unfair to none.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402

from repvgg.data.transforms import CenterCrop, PadCrop  # noqa: E402
from repvgg.data.write import ensure_digits  # noqa: E402
from repvgg.learn.checkpoint import AtomicCheckpointIO, damage  # noqa: E402
from repvgg.learn.datamodule import ImageDataModule  # noqa: E402
from repvgg.learn.devices import device_name  # noqa: E402
from repvgg.learn.guard import LossGuard  # noqa: E402
from repvgg.learn.interrupt import Interruption  # noqa: E402
from repvgg.learn.logging import quiet_lightning  # noqa: E402
from repvgg.learn.module import Classifier  # noqa: E402
from repvgg.learn.throughput import Throughput  # noqa: E402
from repvgg.learn.two_forms import TwoFormValidation  # noqa: E402
from repvgg.model import ConvBN, Identity, RepVGG, to_deploy  # noqa: E402

FULL = [ConvBN, partial(ConvBN, kernel_size=1), Identity.where_it_fits]
A, B = (2, 4, 14, 1), (4, 6, 16, 1)
DIGITS = ROOT / "data" / "digits"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(*arguments: str) -> Callable[[], object]:
    """`python src/train.py` with `arguments`, output discarded."""
    return partial(
        subprocess.run,
        [sys.executable, "src/train.py", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        env={**os.environ, "PROJECT_ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "experiments")},
    )


class FirstStep(pl.Callback):
    """Ends the process when the first training step is done."""

    def on_train_batch_end(self, *arguments: object) -> None:
        """No farewells: they take time."""
        os._exit(0)


class SecondForward(pl.Callback):
    """A converted network on the batches of a validation, and nothing else: the least that looking at it can cost."""

    def __init__(self, deployed: torch.nn.Module) -> None:
        self.deployed = deployed

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        """The forward."""
        images = arguments[2][0]  # type: ignore[index]
        with torch.no_grad():
            self.deployed(images)


def datamodule(px: int = 32) -> ImageDataModule:
    """The embedded digits, 64 images a batch; validation images enlarged to ``px``."""
    files = {f"{split}_file": str(DIGITS / f"{split}.beton") for split in ("train", "val")}
    crops = {"train_transform": PadCrop(32, 4), "val_transform": CenterCrop(px, 1.0)}
    return ImageDataModule(**files, **crops, num_classes=10, mean=[79.0] * 3, std=[88.8] * 3, batch_size=64, seed=0)


def validation(callbacks: list[pl.Callback], px: int = 32, images: int = 360) -> Callable[[], object]:
    """One validation of RepVGG-A0 on ``images`` digits of ``px`` pixels."""
    sgd = partial(torch.optim.SGD, momentum=0.9)
    net = RepVGG(A, 0.75, 2.5, FULL, num_classes=10)
    module = Classifier(net, num_classes=10, optimizer=sgd, lr=0.1, lr_batch=64, batch_size=64)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False}
    options |= {"limit_val_batches": -(-images // 64)}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, use_distributed_sampler=False, **options)
    data = datamodule(px)
    return lambda: trainer.validate(module, datamodule=data, verbose=False)


def epoch(callbacks: Callable[[], list[pl.Callback]]) -> Callable[[], object]:
    """22 training steps of RepVGG-A0 on the digits, from the beginning each time."""

    def train() -> None:
        sgd = partial(torch.optim.SGD, momentum=0.9)
        net = RepVGG(A, 0.75, 2.5, FULL, num_classes=10)
        module = Classifier(net, num_classes=10, optimizer=sgd, lr=0.1, lr_batch=64, batch_size=64)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options |= {"enable_checkpointing": False, "limit_val_batches": 0, "max_epochs": 1}
        trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks(), use_distributed_sampler=False, **options)
        trainer.fit(module, datamodule=datamodule())

    return train


def a_checkpoint(net: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and momenta, as after training with SGD."""
    weights = net.state_dict()
    return {"state_dict": weights, "momenta": {name: torch.randn_like(p) for name, p in net.named_parameters()}}


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each line (default: 5)")
    rounds = parser.parse_args().rounds
    quiet_lightning()
    ensure_digits(DIGITS)
    untimed = TwoFormValidation(Throughput(resolution=32, every_n_epochs=0))
    second = SecondForward(to_deploy(RepVGG(A, 0.75, 2.5, FULL, num_classes=10).to(memory_format=torch.channels_last)))
    shapes = {"A0": (A, 0.75, 2.5), "B1": (B, 2, 4), "B3": (B, 3, 5)}
    nets = {name: RepVGG(*shape, FULL) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        digits = ["data=digits", "model=repvgg_a0", "trainer=cpu", "recipe=quick", "logger=csv"]
        one_step = [f"trainer.{limit}=1" for limit in ("max_epochs", "limit_train_batches", "limit_val_batches")]
        digits += [*one_step, "bench.every_n_epochs=0"]
        folders = (Path(scratch) / str(number) for number in itertools.count())
        checkpoint, file = a_checkpoint(nets["B1"]), Path(scratch) / "b1.ckpt"
        guarded = [LossGuard(scratch), Interruption()]

        def anew(*more: str) -> None:  # in a folder of its own, or it would be finished
            command(*digits, *more, f"hydra.run.dir={next(folders)}")()

        works = {
            "validation of A0 on 360 digits, train form alone": validation([]),
            "the same with the deploy form's (converted, same batches)": validation([untimed]),
            "validation of A0 on 192 images of 224 px, train form alone": validation([], 224, 192),
            "the same with a second forward, of the deploy form": validation([second], 224, 192),
            "the same with the callback: converted, both forms scored and compared": validation([untimed], 224, 192),
            **{f"conversion of {name}, float64 fold": partial(to_deploy, net) for name, net in nets.items()},
            "`train.py --help`": command("--help"),
            "`train.py`, ImageNet missing: the error": command(f"data.dir={scratch}/none"),
            "`train.py`, 8 GPUs missing: the error": command("data=digits", "trainer.devices=8"),
            "`train.py`, from the command to the end of the first training step": partial(
                anew, "+callbacks.leave._target_=costs.FirstStep"
            ),
            "`train.py` with 1 training, 1 validation and 1 test step": anew,
            "the same again: it is finished": command(*digits, f"hydra.run.dir={scratch}/0"),
            "22 steps of A0 on digits, no callbacks": epoch(list),
            "the same with the guard and the look at signals": epoch(lambda: guarded),
            "a checkpoint of B1 with momenta, written": lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, file),
            "the same, checked": lambda: damage(file),
        }
        for work in works.values():
            work()  # warm: caches of numba, files, thread pools
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(seconds(work))
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
    )
    print(f"torch {torch.__version__}, n = {rounds} rounds\n")
    print("| what | median [s] | smallest | largest |\n|---|--:|--:|--:|")
    for name, values in times.items():
        print(f"| {name} | {median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
