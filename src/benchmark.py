"""Measure on the machine at hand: `python src/benchmark.py loader`. `--help` has the options."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from repvgg.cli import clear_errors
from repvgg.files import replacing

if TYPE_CHECKING:
    from repvgg.data.benchmark import Rate


def draw(rates: "list[Rate]", path: Path) -> None:
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
            f"`python src/benchmark.py {' '.join(sys.argv[1:])}`",
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
    return "\n\n".join(parts)


def main() -> None:
    """Run the chosen benchmark, print its Markdown, and write it to --output."""
    parser = argparse.ArgumentParser(description="Measure on the machine at hand.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = benchmarks.add_parser("loader", help=loader.__doc__, description=loader.__doc__)
    command.set_defaults(run=loader)
    command.add_argument(
        "--photos", type=Path, help="folder of class folders (default: parts of scikit-learn's two photos)"
    )
    command.add_argument("--images", type=int, default=1000, help="how many of them (default: 1000)")
    command.add_argument("--rounds", type=int, default=5, help="measurements of each line (default: 5)")
    command.add_argument("--size", type=int, default=224, help="side of the crops in pixels (default: 224)")
    command.add_argument(
        "--threads", type=int, default=1, help="threads or worker processes of each loader (default: 1)"
    )
    command.add_argument("--trade-off", action="store_true", help="also compare stored sizes and qualities")
    command.add_argument("--output", type=Path, help="Markdown file to write, with a picture beside it")
    arguments = parser.parse_args()
    for name in ("images", "rounds", "size", "threads"):
        if getattr(arguments, name) < 1:
            command.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    with clear_errors():
        text = arguments.run(arguments)
    print(text)
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write(f"{text}\n".encode())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: nothing is measured, nothing is left behind", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
