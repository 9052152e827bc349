"""Measure on the machine at hand: `python src/benchmark.py inference`, `train`, `convert`, `speed` or `loader`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from repvgg.bench.commands import convert, inference, train
from repvgg.bench.lines import FORMS, LAYOUTS, PRECISIONS, RUNTIMES, TORCH_RUNTIMES
from repvgg.bench.loader import loader
from repvgg.bench.speed import speed
from repvgg.cli import clear_errors, interruptible, options, prepare_environment

EXAMPLES = """\
examples
  python src/benchmark.py inference --models repvgg_a0 --batch 32 --against timm --out inference
  python src/benchmark.py inference --models repvgg_b1 --forms deploy --precisions float32 bfloat16 int8 \\
      --runtimes eager compile onnxruntime openvino --batch 8 --warmup 1 --batches 5 --rounds 7
  python src/benchmark.py train --models repvgg_a0 --batch 16 --precisions float32 bfloat16 --against timm
  python src/benchmark.py convert --against timm

any other implementation
  --against mine:build times mine.build("repvgg_a0"), a torch.nn.Module in train form; mine.py is looked for in the
  current directory. Its deploy form comes from build.deploy(net), if that is there, or from --against-deploy
  mine:deploy: a new network, the given one left as it is. For the authors' own repository, checked out as RepVGG:

    import runpy, sys; sys.path.append("RepVGG")
    authors = runpy.run_path("RepVGG/repvgg.py")  # not `import repvgg`, which is this package
    def build(model): return authors["create_RepVGG_" + model.removeprefix("repvgg_").capitalize()](deploy=False)
    deploy = authors["repvgg_model_convert"]
"""


def main() -> None:
    """Run the chosen benchmark and print its Markdown."""
    parser = argparse.ArgumentParser(description="Measure on the machine at hand.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def add(
        name: str, run: Callable[[argparse.Namespace], str], at_least_1: tuple[str, ...]
    ) -> argparse.ArgumentParser:
        epilog = EXAMPLES if run in (inference, train, convert) else None
        command = benchmarks.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, parser=command, at_least_1=at_least_1)
        return command

    command = add("inference", inference, ("batch", "resolution", "rounds", "batches", "threads"))
    choose(command, "forms", FORMS, FORMS, "of the network")
    choose(command, "precisions", PRECISIONS, PRECISIONS[:1], "of weights and images; float16 needs a GPU")
    choose(command, "runtimes", RUNTIMES, RUNTIMES[:1], "eager and compile are torch's")
    choose(command, "layouts", LAYOUTS, LAYOUTS[:1], "memory format of torch's networks and images")
    compared(command, batch=128, warmup=50, batches=50, rounds=3)

    command = add("train", train, ("batch", "resolution", "rounds", "batches", "threads"))
    choose(command, "precisions", PRECISIONS[:2], PRECISIONS[:1], "bfloat16 is autocast")
    choose(command, "runtimes", TORCH_RUNTIMES, TORCH_RUNTIMES[:1], "torch.compile or not")
    choose(command, "layouts", LAYOUTS, LAYOUTS[:1], "memory format of networks and images")
    command.add_argument("--unfused", action="store_true", help="also this repository's blocks, layer by layer")
    compared(command, batch=32, warmup=2, batches=10, rounds=5)

    command = add("convert", convert, ("rounds", "batches", "threads"))
    compared(command, warmup=1, batches=3, rounds=5)
    command.set_defaults(batch=1, resolution=64)

    command = add("speed", speed, ("batch", "batches", "rounds", "resolution"))
    measured(command, batch=128, warmup=50, batches=50, rounds=3)
    layout = command.add_mutually_exclusive_group()
    layout.add_argument("--channels-last", action="store_true", help="memory format of networks and images")
    layout.add_argument("--contiguous", dest="channels_last", action="store_false", help="the other one (default)")
    command.add_argument("--out", type=Path, metavar="DIR", help="write speed.json, speed.md and speed.png there")

    command = add("loader", loader, ("images", "rounds", "size", "threads"))
    command.add_argument(
        "--photos", type=Path, help="folder of class folders (default: parts of scikit-learn's two photos)"
    )
    number(command, "images", 1000, "how many of them")
    number(command, "rounds", 5, "measurements of each line")
    number(command, "size", 224, "side of the crops in pixels")
    number(command, "threads", 1, "threads or worker processes of each loader")
    command.add_argument("--trade-off", action="store_true", help="also compare stored sizes and qualities")
    command.add_argument("--output", type=Path, help="Markdown file to write, with a picture beside it")

    arguments = parser.parse_args()
    for name in arguments.at_least_1:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            arguments.parser.error(f"--{name} must be at least 1, got {value}")
    if getattr(arguments, "warmup", 0) < 0:
        arguments.parser.error(f"--warmup must be at least 0, got {arguments.warmup}")
    with interruptible(what_is_left(arguments)), clear_errors():
        text = arguments.run(arguments)
    print(text)


def what_is_left(arguments: argparse.Namespace) -> str:
    """After Ctrl-C: pages are written at the end alone, a W&B run is there from the beginning."""
    if getattr(arguments, "wandb", False):
        return f"nothing is measured; {arguments.out} holds a W&B run that says it was stopped"
    return "nothing is measured, nothing is left behind"


def number(command: argparse.ArgumentParser, name: str, default: int | None, what: str) -> None:
    """An option that takes a whole number."""
    command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def choose(
    command: argparse.ArgumentParser, name: str, choices: tuple[str, ...], default: tuple[str, ...], what: str
) -> None:
    """An option that takes some of ``choices``."""
    command.add_argument(
        f"--{name}",
        nargs="+",
        choices=choices,
        default=list(default),
        metavar=name.upper().removesuffix("S"),
        help=f"{what}: {', '.join(choices)} (default: {' '.join(default)})",
    )


def measured(
    command: argparse.ArgumentParser, *, warmup: int, batches: int, rounds: int, batch: int | None = None
) -> None:
    """Which variants, where, how often."""
    command.add_argument(
        "--models", nargs="+", metavar="MODEL", default=options("model"), help="of conf/model (default: all)"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    if batch is not None:
        number(command, "batch", batch, "images per call")
        number(command, "resolution", 224, "side of the images in pixels")
    number(command, "warmup", warmup, "calls at the beginning of every turn that are not timed")
    number(command, "batches", batches, "timed calls of every turn")
    number(command, "rounds", rounds, "turns of every line")


def compared(
    command: argparse.ArgumentParser, *, warmup: int, batches: int, rounds: int, batch: int | None = None
) -> None:
    """The same, beside other implementations."""
    measured(command, batch=batch, warmup=warmup, batches=batches, rounds=rounds)
    command.add_argument("--threads", type=int, metavar="N", help="of torch and other runtimes (default: torch's)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of turns (default: 0)")
    command.add_argument(
        "--against", nargs="+", default=[], metavar="PEER", help="timm, or module.path:callable: see below"
    )
    command.add_argument("--against-deploy", metavar="PEER", help="module.path:callable that converts: see below")
    command.add_argument(
        "--no-memory", dest="memory", action="store_false", help="do not measure it: saves a process for every line"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="write the page, every time as JSON, and a picture")
    command.add_argument(
        "--wandb", action="store_true", help="also a W&B run of job type bench; WANDB_MODE=offline keeps it in DIR"
    )


if __name__ == "__main__":
    prepare_environment()
    main()
