"""What the loader costs: images per CPU-second against bare decoding, FFCV's own operations and a PIL DataLoader.

Everything is measured on one set of photographs in one process, taking turns, so that a machine that slows down is
unfair to none. CPU time, not wall time: multiply by the cores that a GPU gets. Child processes are counted.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from repvgg.data.draws import Draws
from repvgg.data.ffcv_setup import libffcv
from repvgg.data.loader import make_loader
from repvgg.data.sources import ImageFolder
from repvgg.data.transforms import CenterCrop, RandomResizedCrop, Transform
from repvgg.data.verify import JPG, encoded, read_records
from repvgg.data.write import WriteOptions, write_beton

Split = Literal["train", "val"]
Ops = Literal["fused", "stock"]
SPLITS: tuple[Split, ...] = ("train", "val")
OPS: tuple[Ops, ...] = ("fused", "stock")
BATCH = 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_photos(directory: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 95) -> None:
    """`count` JPEG photographs of about `size` (width, height): parts of the two that scikit-learn ships.

    One folder each, so that a label says which image it is.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for number in track(range(count), "photographs"):
        photo = photos[number % len(photos)]
        width, height = (round(side * rng.uniform(0.9, 1.1)) for side in size)
        scale = rng.uniform(0.75, 1) * min(photo.width / width, photo.height / height)
        left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        target = directory / f"{number:05}" / "photo.jpg"
        target.parent.mkdir(parents=True)
        photo.resize((width, height), Image.Resampling.BICUBIC, box=box).save(target, quality=quality)


def link_photos(source: Path, directory: Path, count: int) -> None:
    """The same layout from `count` images, evenly spread over a folder of class folders."""
    images = ImageFolder(source)
    for number, index in enumerate(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)):
        path = source / images.name(int(index))
        target = directory / f"{number:05}" / path.name
        target.parent.mkdir(parents=True)
        target.symlink_to(path.absolute())


def transform_of(split: Split, size: int) -> Transform:
    """ImageNet's training or validation crop."""
    return RandomResizedCrop(size) if split == "train" else CenterCrop(size)


def pil_crop(original: Image.Image, transform: Transform, height: int, width: int, number: int) -> NDArray[np.uint8]:
    """What `transform` shows of image `number` when stored as height × width, cut from `original` and resized by PIL.

    size × size × 3. A validation crop does not depend on the stored size.
    """
    if isinstance(transform, CenterCrop):
        height, width = original.height, original.width
    boxes = transform.boxes(np.array([height]), np.array([width]), Draws(0, 0, np.array([number])))
    y, x = original.height / height, original.width / width
    top, left, bottom, right = (
        float(edge[0]) for edge in (boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width)
    )
    box = (left * x, top * y, min(right * x, original.width), min(bottom * y, original.height))
    if boxes.cut_first and x == y == 1:
        original, box = (
            original.crop((int(left), int(top), int(right), int(bottom))),
            (0, 0, right - left, bottom - top),
        )
    resized = np.asarray(original.resize((transform.size,) * 2, Image.Resampling.BILINEAR, box=box))
    return resized[:, ::-1] if boxes.mirrored[0] else resized


class PilImages(Dataset[tuple[torch.Tensor, int]]):
    """What a torch DataLoader does without FFCV: open, crop, resize (antialiased bilinear), mirror, to a tensor.

    The boxes are those of our own loader, so both do the same work. `normalise` gives float32 as torchvision's
    ToTensor and Normalize, otherwise uint8.
    """

    def __init__(self, files: list[Path], transform: Transform, normalise: bool) -> None:
        self.files, self.transform, self.normalise = files, transform, normalise

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        crop = pil_crop(image, self.transform, image.height, image.width, index)
        pixels = torch.from_numpy(crop.transpose(2, 0, 1).copy())
        if not self.normalise:
            return pixels, index
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        return pixels.float().div_(255).sub_(mean).div_(std), index


def cpu_seconds() -> float:
    """CPU time of this process, its threads, and those children that have ended."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def decode_bare(path: Path) -> int:
    """libjpeg-turbo on every record, whole images, nothing else."""
    records = read_records(path)
    largest = int((records.images["height"].astype(np.int64) * records.images["width"]).max())
    pixels = np.empty(largest * 3, dtype=np.uint8)
    for image, content in zip(records.images, encoded(records), strict=True):
        if image["mode"] == JPG:
            height, width = int(image["height"]), int(image["width"])
            status = libffcv.imdecode(content, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
            assert status == 0
    return len(records)


def exhaust(batches: Any) -> int:
    """One epoch; how many images came."""
    return sum(len(labels) for _, labels in batches)


@dataclass(frozen=True)
class Storage:
    """One way to store the photographs."""

    name: str
    options: WriteOptions


ORIGINALS = Storage("original bytes", WriteOptions())
BALANCED = Storage("short side 320", WriteOptions(short_side=320))
SMALL = Storage("short side 256", WriteOptions(short_side=256))


def trade_off() -> list[Storage]:
    """Short sides and qualities worth comparing."""
    return [
        ORIGINALS,
        *(
            Storage(f"short side {side}, quality {quality}", WriteOptions(short_side=side, jpeg_quality=quality))
            for side, quality in [(320, 90), (288, 90), (256, 95), (256, 90), (256, 80), (224, 90)]
        ),
    ]


class Bench:
    """Photographs, written in several ways into `directory`, and what is measured on them."""

    def __init__(self, photos: Path, directory: Path, *, size: int, threads: int) -> None:
        self.source = ImageFolder(photos)
        self.files = sorted(photos.glob("*/*"))  # as the labels
        self.directory, self.size, self.threads = directory, size, threads

    def beton(self, storage: Storage) -> Path:
        """The file, written at the first call."""
        options = "_".join(map(str, astuple(storage.options)))  # two names may mean the same file
        path = self.directory / f"{options}.beton"
        if not path.is_file():
            write_beton(self.source, path, options=storage.options, progress=False)
        return path

    def epoch(self, storage: Storage, split: Split, ops: Ops) -> Callable[[], int]:
        """A function that reads one epoch, warm."""
        loader = make_loader(
            self.beton(storage),
            transform=transform_of(split, self.size),
            batch_size=min(BATCH, len(self.files)),
            train=split == "train",
            num_threads=self.threads,
            ops=ops,
        )
        run = partial(exhaust, loader)
        run()
        return run

    def pil_epoch(self, split: Split, normalise: bool) -> Callable[[], int]:
        """The same from the image files, with PIL in `threads` worker processes."""
        images = PilImages(self.files, transform_of(split, self.size), normalise)
        loader = DataLoader(images, batch_size=BATCH, shuffle=split == "train", num_workers=self.threads)
        return partial(exhaust, loader)

    def distance(self, storage: Storage, split: Split) -> float:
        """Mean absolute difference, in levels of 0 … 255, to PIL's crops of the original files.

        Training crops are compared as the network sees them: the box is drawn for the stored image's size, PIL cuts
        the same part of the original.
        """
        path = self.beton(storage)
        transform = transform_of(split, self.size)
        loader = make_loader(path, transform=transform, batch_size=1, train=False, num_threads=1)
        records = read_records(path)
        differences = []
        for record, (images, labels) in enumerate(loader):
            height, width = (int(records.images[side][record]) for side in ("height", "width"))
            with Image.open(self.files[int(labels[0])]) as file:
                expected = pil_crop(file.convert("RGB"), transform, height, width, record)
            differences.append(np.abs(images[0].permute(1, 2, 0).numpy().astype(float) - expected).mean())
        return float(np.mean(differences))


@dataclass(frozen=True)
class Rate:
    """Images per CPU-second of one contestant, one value per round."""

    storage: str
    split: str
    what: str
    rounds: list[float]


def measure(contestants: dict[tuple[str, str, str], Callable[[], int]], rounds: int) -> list[Rate]:
    """Let everyone run one epoch per round, in turn."""
    rates: dict[tuple[str, str, str], list[float]] = {key: [] for key in contestants}
    for _, (key, run) in track([(r, item) for r in range(rounds) for item in contestants.items()], "measuring"):
        start = cpu_seconds()
        images = run()
        rates[key].append(images / (cpu_seconds() - start))
    return [Rate(*key, values) for key, values in rates.items()]


def ratio(of: Rate, to: Rate) -> tuple[float, float, float]:
    """Median, smallest and largest ratio within a round."""
    values = [a / b for a, b in zip(of.rounds, to.rounds, strict=True)]
    return median(values), min(values), max(values)


START_UP = """\
import json, time
began = time.perf_counter()
import torch
torch_s = time.perf_counter() - began
from repvgg.data.loader import make_loader
from repvgg.data.transforms import RandomResizedCrop
imported = time.perf_counter()
loader = make_loader({path!r}, transform=RandomResizedCrop({size}), batch_size={batch}, train=True, ops={ops!r})
for batch in loader:
    break
print(json.dumps({{"torch": torch_s, "room": imported - began - torch_s, "first": time.perf_counter() - imported}}))
"""


def start_up(path: Path, size: int, batch: int, ops: str) -> dict[str, float]:
    """Seconds of a fresh process: import of torch, of this room, and from there to the first batch."""
    code = START_UP.format(path=str(path), size=size, batch=batch, ops=ops)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def compare(bench: Bench, rounds: int) -> list[Rate]:
    """Both splits, three ways to store: bare decoding, ours, FFCV's own, and PIL on the original files."""
    contestants: dict[tuple[str, str, str], Callable[[], int]] = {}
    for storage in (ORIGINALS, BALANCED, SMALL):
        contestants[storage.name, "", "bare"] = partial(decode_bare, bench.beton(storage))
        for split in SPLITS:
            for ops in OPS:
                contestants[storage.name, split, ops] = bench.epoch(storage, split, ops)
    for split in SPLITS:
        contestants["files", split, "pil uint8"] = bench.pil_epoch(split, normalise=False)
        contestants["files", split, "pil float32"] = bench.pil_epoch(split, normalise=True)
    return measure(contestants, rounds)


def comparison_table(rates: list[Rate]) -> str:
    """Markdown: images per CPU-second, and ratios within a round as median (smallest … largest)."""
    by_key = {(rate.storage, rate.split, rate.what): rate for rate in rates}
    lines = [
        "| crops | stored as | loader | images/CPU-s | to bare decoding | to FFCV's own | to PIL, uint8 |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    names = {"fused": "this repository", "stock": "FFCV's own operations", "bare": "bare libjpeg-turbo, whole images"}
    names |= {"pil uint8": "DataLoader + PIL, uint8", "pil float32": "DataLoader + PIL, normalised float32"}
    for rate in rates:
        peers = (
            None if rate.what == "bare" else by_key.get((rate.storage, "", "bare")),
            by_key.get((rate.storage, rate.split, "stock")) if rate.what == "fused" else None,
            by_key["files", rate.split, "pil uint8"] if rate.split and rate.what != "pil uint8" else None,
        )
        cells = ["{:.2f} ({:.2f} … {:.2f})".format(*ratio(rate, peer)) if peer else "" for peer in peers]
        speed = f"{median(rate.rounds):,.0f}"
        lines.append(f"| {' | '.join([rate.split or 'none', rate.storage, names[rate.what], speed, *cells])} |")
    return "\n".join(lines)


def trade_off_table(bench: Bench, rounds: int) -> str:
    """Markdown: what each way to store costs in bytes, what it gains in speed, and how far its crops are from PIL's."""
    storages = trade_off()
    rates = measure(
        {
            (storage.name, split, "fused"): bench.epoch(storage, split, "fused")
            for storage in storages
            for split in SPLITS
        },
        rounds,
    )
    by_key = {(rate.storage, rate.split): median(rate.rounds) for rate in rates}
    lines = [
        "| stored as | KB/image | train, images/CPU-s | val, images/CPU-s | train crop to PIL's | val crop to PIL's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for storage in storages:
        kilobytes = float(read_records(bench.beton(storage)).sizes.mean()) / 1e3
        distances = " | ".join(f"{bench.distance(storage, split):.2f}" for split in SPLITS)
        speeds = " | ".join(f"{by_key[storage.name, split]:,.0f}" for split in SPLITS)
        lines.append(f"| {storage.name} | {kilobytes:.0f} | {speeds} | {distances} |")
    return "\n".join(lines)


def start_up_table(bench: Bench, rounds: int) -> str:
    """Markdown: seconds until the first batch in a fresh process, median."""
    lines = ["| operations | import torch | import this room | then to the first batch |", "|---|--:|--:|--:|"]
    taken: dict[str, list[dict[str, float]]] = {ops: [] for ops in OPS}
    for _, ops in track([(r, ops) for r in range(rounds) for ops in OPS], "start-ups"):
        taken[ops].append(start_up(bench.beton(ORIGINALS), bench.size, min(BATCH, len(bench.files)), ops))
    for name, values in taken.items():
        cells = " | ".join(f"{median(value[part] for value in values):.2f} s" for part in ("torch", "room", "first"))
        lines.append(f"| `ops={name}` | {cells} |")
    return "\n".join(lines)


def environment(bench: Bench, processor: str) -> str:
    """One line: what the numbers depend on."""
    kilobytes = float(np.mean([path.stat().st_size for path in bench.files])) / 1e3
    with Image.open(bench.files[0]) as image:
        first = f"{image.width}×{image.height}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ffcv", "numba", "pillow", "numpy"))
    return (
        f"{len(bench.files)} photographs of {kilobytes:.0f} KB in the mean (the first is {first}), "
        f"crops of {bench.size} px, {bench.threads} thread(s) each, {processor}, "
        f"{len(os.sched_getaffinity(0))} cores allowed, Python {platform.python_version()}, {versions}"
    )
