"""The body of `benchmark.py loader`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from repvgg.bench.commands import command_line
from repvgg.files import replacing

if TYPE_CHECKING:
    from repvgg.data.benchmark import Rate


def draw(rates: list[Rate], path: Path) -> None:
    """Bars of images per CPU-second, a panel for each split."""
    from repvgg.report.bars import Bar, write_bars

    names = {"fused": "this repository", "stock": "FFCV's own", "bare": "bare decoding"}
    panels = {}
    for split, title in (("train", "Training crops"), ("val", "Validation crops")):
        shown = [rate for rate in rates if rate.split in ("", split) and rate.what != "pil float32"]
        panels[title] = [
            Bar(
                f"{names[rate.what]}, {rate.storage}" if rate.what in names else "DataLoader + PIL, files",
                median(rate.rounds),
                min(rate.rounds),
                max(rate.rounds),
                ours=rate.what == "fused",
            )
            for rate in shown
        ]
    write_bars(panels, "images per CPU-second", path)


def loader(arguments: argparse.Namespace) -> str:
    """Images per CPU-second of the training and validation loaders against what they are compared with."""
    import torch

    from repvgg.data import benchmark
    from repvgg.learn.devices import device_name

    processor = device_name(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as scratch:
        photos, betons = Path(scratch) / "photos", Path(scratch) / "betons"
        if arguments.photos is None:
            benchmark.make_photos(photos, arguments.images)
        else:
            benchmark.link_photos(arguments.photos, photos, arguments.images)
        bench = benchmark.Bench(photos, betons, size=arguments.size, threads=arguments.threads)
        rates = benchmark.compare(bench, arguments.rounds)
        if arguments.output is not None:
            draw(rates, arguments.output.with_suffix(".png"))
        parts = [
            "# The loader, measured",
            f"`{command_line()}`",
            f"{benchmark.environment(bench, processor)}, n = {arguments.rounds} rounds in which the lines take turns.",
            benchmark.comparison_table(rates),
            f"Start-up in a fresh process, median of {arguments.rounds}:",
            benchmark.start_up_table(bench, arguments.rounds),
        ]
        if arguments.trade_off:
            parts += [
                "Ways to store the images. Distances to PIL's crop of the original file are mean absolute differences, "
                "in levels of 0 … 255:",
                benchmark.trade_off_table(bench, arguments.rounds),
            ]
    text = "\n\n".join(parts)
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write(f"{text}\n".encode())
    return text
