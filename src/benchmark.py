"""Measure on the machine at hand: `python src/benchmark.py loader`, or `speed`. `--help` has the options."""

import argparse
import functools
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from repvgg.cli import ROOT, clear_errors, interruptible, options, prepare_environment
from repvgg.files import replacing

if TYPE_CHECKING:
    from torch import nn

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
    text = "\n\n".join(parts)
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            file.write(f"{text}\n".encode())
    return text


def build(model: str) -> "nn.Module":
    """The network of a variant as `train.py model=…` would train it, in train form."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=[f"model={model}", "ablation=full", "data=imagenet"])
    net: nn.Module = instantiate(config.net, num_classes=1000)
    return net


def speed(arguments: argparse.Namespace) -> str:
    """Images per second of both forms of the variants by the paper's protocol (Table 4), beside the paper's."""
    unknown = [model for model in arguments.models if model not in options("model")]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: choose from {', '.join(options('model'))}")
    if arguments.warmup < 0:
        raise ValueError(f"--warmup must be at least 0, got {arguments.warmup}")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is a file: name a directory")

    import torch

    from repvgg.learn.devices import device_name, set_tf32
    from repvgg.learn.speed import measure
    from repvgg.learn.throughput import Throughput
    from repvgg.report import speed as report

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; measure the processor with --device cpu")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    set_tf32(False)  # the paper's fp32
    torch.backends.cudnn.benchmark = True  # as in training
    throughput = Throughput(
        arguments.resolution, batch=arguments.batch, warmup=arguments.warmup, batches=arguments.batches
    )
    models = list(dict.fromkeys(arguments.models))
    layout = "channels_last" if arguments.channels_last else "contiguous"
    line = (
        f"{device_name(device)}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch "
        f"{torch.__version__}; float32 without TF32, {layout}, batch {throughput.batch}, {throughput.resolution} px, "
        f"{throughput.warmup} batches to warm up and {throughput.batches} timed, median of these; n = "
        f"{arguments.rounds} rounds in which {len(models)} variants and their forms take turns"
    )
    print(line, file=sys.stderr, flush=True)
    seconds = measure(
        {model: functools.partial(build, model) for model in models},
        throughput,
        rounds=arguments.rounds,
        device=device,
        memory_format=torch.channels_last if arguments.channels_last else torch.contiguous_format,
    )

    rates = {
        model: {form: [throughput.batch / median(times) for times in rounds] for form, rounds in forms.items()}
        for model, forms in seconds.items()
    }
    speeds = [report.Speed(model, **forms) for model, forms in rates.items()]
    command = f"python src/benchmark.py {' '.join(sys.argv[1:])}"
    text = report.page(command, line, speeds)
    if arguments.out is not None:
        record = {
            "command": command,
            "machine": {
                "device": device_name(device),
                "processor": device_name(torch.device("cpu")),
                "cores": len(os.sched_getaffinity(0)),
                "threads": torch.get_num_threads(),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            },
            "protocol": {
                **{name: getattr(throughput, name) for name in ("resolution", "batch", "dtype", "warmup", "batches")},
                **{"rounds": arguments.rounds, "memory_format": layout, "tf32": False},
            },
            "images_per_s": rates,
            "seconds_per_batch": seconds,
        }
        report.write(arguments.out, speeds, text, record)
    return text


def main() -> None:
    """Run the chosen benchmark, print its Markdown, and write it to --output."""
    parser = argparse.ArgumentParser(description="Measure on the machine at hand.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = benchmarks.add_parser("loader", help=loader.__doc__, description=loader.__doc__)
    command.set_defaults(run=loader, parser=command, at_least_1=("images", "rounds", "size", "threads"))
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

    command = benchmarks.add_parser("speed", help=speed.__doc__, description=speed.__doc__)
    command.set_defaults(run=speed, parser=command, at_least_1=("batch", "batches", "rounds", "resolution"))
    command.add_argument(
        "--models", nargs="+", metavar="MODEL", default=options("model"), help="of conf/model (default: all)"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--batch", type=int, default=128, help="images per forward (default: 128)")
    command.add_argument("--batches", type=int, default=50, help="timed forwards per round (default: 50)")
    command.add_argument("--warmup", type=int, default=50, help="forwards before them (default: 50)")
    command.add_argument("--rounds", type=int, default=3, help="measurements of each form (default: 3)")
    command.add_argument("--resolution", type=int, default=224, help="side of the images in pixels (default: 224)")
    layout = command.add_mutually_exclusive_group()
    layout.add_argument("--channels-last", action="store_true", help="memory format of networks and images")
    layout.add_argument("--contiguous", dest="channels_last", action="store_false", help="the other one (default)")
    command.add_argument("--out", type=Path, metavar="DIR", help="write speed.json, speed.md and speed.png there")

    arguments = parser.parse_args()
    for name in arguments.at_least_1:
        if getattr(arguments, name) < 1:
            arguments.parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    with clear_errors():
        text = arguments.run(arguments)
    print(text)


if __name__ == "__main__":
    prepare_environment()
    with interruptible("nothing is measured, nothing is left behind"):
        main()
