"""The bodies of `benchmark.py inference`, `train` and `convert`. Heavy imports come after the cheap checks."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.bench.lines import FILE_RUNTIMES, Line, Setting, inference_settings, require_float16, training_settings
from repvgg.cli import options

if TYPE_CHECKING:
    from repvgg.bench.programs import Work
    from repvgg.bench.run import Works

#: What lines need beyond the repository's own dependencies.
PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "int8": ("onnx", "onnxscript", "onnxruntime", "torchao"),
}
WANDB_MODES = ("online", "offline")


def require_models(models: Sequence[str]) -> list[str]:
    """Each once.

    Raises:
        ValueError: of a name that no file of conf/model has.
    """
    unknown = [model for model in models if model not in options("model")]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: choose from {', '.join(options('model'))}")
    return list(dict.fromkeys(models))


def require_directory(out: Path | None) -> None:
    """Raise ValueError where files cannot be put."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a directory")


def require_device(name: str | None) -> str:
    """cpu or cuda: what was asked for, else the GPU where there is one.

    Raises:
        ValueError: a GPU that is not there.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; measure the processor with --device cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def require_wandb(wandb: bool, out: Path | None) -> None:
    """Raise ValueError unless there is a place for W&B's files, and WANDB_MODE is one of two."""
    mode = os.environ.get("WANDB_MODE", WANDB_MODES[0])
    if wandb and mode not in WANDB_MODES:
        raise ValueError(
            f"WANDB_MODE={mode}: --wandb takes {' or '.join(WANDB_MODES)}; without --wandb there is no run"
        )
    if wandb and out is None:
        raise ValueError("--wandb keeps its files beside the others: add --out DIR")


def require_packages(settings: Sequence[Setting]) -> None:
    """Raise ValueError where a line needs what is not installed."""
    for wanted in dict.fromkeys(value for setting in settings for value in (setting.runtime, setting.precision)):
        missing = [package for package in PACKAGES.get(wanted, ()) if find_spec(package) is None]
        if missing:
            raise ValueError(f"{wanted} needs {', '.join(missing)}, not installed here: pip install -e '.[deploy]'")


def command_line() -> str:
    """As it was typed."""
    return shlex.join(["python", "src/benchmark.py", *sys.argv[1:]])


class Benchmark:
    """What the three have in common: cheap checks first, then the sides, and at the end the page."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.models = require_models(arguments.models)
        require_directory(arguments.out)
        require_wandb(arguments.wandb, arguments.out)
        if arguments.against_deploy is not None and not arguments.against:
            raise ValueError(f"--against-deploy {arguments.against_deploy} goes with --against module.path:callable")
        self.device = require_device(arguments.device)

        import torch

        from repvgg.bench.programs import Conditions
        from repvgg.bench.run import Protocol
        from repvgg.bench.sides import ours, peers
        from repvgg.learn.devices import set_tf32

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        set_tf32(False)  # float32 is float32
        torch.backends.cudnn.benchmark = True  # as in training
        self.sides = [ours(), *peers(arguments.against, arguments.against_deploy)]
        self.protocol = Protocol(arguments.rounds, arguments.warmup, arguments.batches, arguments.seed)
        self.conditions = Conditions(arguments.batch, arguments.resolution, torch.get_num_threads(), self.device)

    def run(self, name: str, title: str, works: Works, memory: str, notes: Sequence[str] = ()) -> str:
        """Measure, write, log; the page as Markdown.

        Args:
            name: the subcommand.
            title: of the page.
            works: of a variant.
            memory: what a line's memory is.
            notes: sentences on what else the numbers depend on.
        """
        from dataclasses import asdict

        import torch

        from repvgg.bench.machine import machine, versions
        from repvgg.bench.page import Page
        from repvgg.bench.run import compare
        from repvgg.bench.tracking import tracked
        from repvgg.learn.devices import slow_bf16

        arguments, device = self.arguments, torch.device(self.device)
        record: dict[str, Any] = {
            "command": command_line(),
            "machine": machine(device),
            "versions": versions(self.packages()),
            "protocol": {**asdict(self.protocol), **asdict(self.conditions), "tf32": False},
        }
        asked = {"--precisions": " ".join(p for p in getattr(arguments, "precisions", []) if p == "bfloat16")}
        if (slow := slow_bf16(asked, "cpu" if self.device == "cpu" else "gpu")) is not None:
            notes = [*notes, f"{slow}."]
        said = " ".join(["Networks are untrained.", *dict.fromkeys(notes)])
        conditions = f"{_machine(record)}; {self._calls(name)}{self.protocol}. {said}"
        print(conditions, file=sys.stderr, flush=True)
        with tracked(arguments.out if arguments.wandb else None, name, record) as log:
            results, left_out = compare(works, self.models, self.protocol, memory=arguments.memory)
            if not results:
                raise ValueError("nothing was measured: " + "; ".join(left_out))
            explained = memory if arguments.memory else ""
            page = Page(name, title, record, conditions, explained, results, left_out)
            if arguments.out is not None:
                log(page, page.write(arguments.out))
        return page.text

    def packages(self) -> list[str]:
        """Whose versions matter."""
        packages = ["timm"] if "timm" in self.arguments.against else []
        used = [*getattr(self.arguments, "runtimes", []), *getattr(self.arguments, "precisions", [])]
        return [*packages, *dict.fromkeys(package for name in used for package in PACKAGES.get(name, ()))]

    def _calls(self, name: str) -> str:
        if name == "convert":
            return ""
        return f"float32 without TF32, batch {self.conditions.batch}, {self.conditions.resolution} px, "


def _machine(record: dict[str, Any]) -> str:
    where, versions = record["machine"], record["versions"]
    names = [f"{name} {version}" for name, version in versions.items() if version is not None]
    return f"{where['device']}, {where['cores']} core(s), {where['threads']} thread(s); {', '.join(names)}"


def inference(arguments: argparse.Namespace) -> str:
    """Images per second, latency and memory of both forms, in precisions, runtimes and layouts."""
    if arguments.device == "cpu":
        require_float16(arguments.precisions, "cpu")
    benchmark = Benchmark(arguments)
    wanted = (arguments.forms, arguments.precisions, arguments.runtimes, arguments.layouts)
    settings, left_out = inference_settings(*wanted, benchmark.device)
    require_packages(settings)

    used = {value for setting in settings for value in (setting.runtime, setting.precision)}
    notes = [note for value, note in INFERENCE_NOTES.items() if value in used]

    from repvgg.bench.programs import Inference, write_file

    def works(model: str, directory: Path) -> tuple[list[Work], list[str]]:
        made: list[Work] = []
        missing = list(left_out)
        for setting in settings:
            for side in benchmark.sides:
                reason = side.lacks(model) or (side.lacks_deploy if setting.form == "deploy" else None)
                if reason is not None:
                    missing.append(reason)
                    continue
                work = Inference(Line(model, side.name, setting), side, benchmark.conditions)
                made.append(write_file(work, directory) if setting.runtime in FILE_RUNTIMES else work)
        return made, missing

    return benchmark.run("inference", "Inference, measured", works, f"{PEAK} weights and images. {AT_REST}", notes)


def train(arguments: argparse.Namespace) -> str:
    """Time and memory of training steps: forward, loss, backward, SGD with momentum."""
    benchmark = Benchmark(arguments)
    if arguments.unfused:
        from repvgg.bench.sides import ours_unfused

        benchmark.sides.append(ours_unfused())
    settings = training_settings(arguments.precisions, arguments.runtimes, arguments.layouts)

    from repvgg.bench.programs import Training, needs_sliced_inputs

    sliced = [s for s in settings if needs_sliced_inputs(s.runtime, s.layout, benchmark.device)]
    notes = [SLICED] if sliced and arguments.against else []

    def works(model: str, directory: Path) -> tuple[list[Work], list[str]]:
        missing = [reason for side in benchmark.sides if (reason := side.lacks(model))]
        made: list[Work] = [
            Training(Line(model, side.name, setting), side, benchmark.conditions)
            for setting in settings
            for side in benchmark.sides
            if side.lacks(model) is None
        ]
        return made, missing

    memory = f"{PEAK} weights, momenta and images; gradients are part of it. {AT_REST}"
    return benchmark.run("train", "Training steps, measured", works, memory, notes)


def convert(arguments: argparse.Namespace) -> str:
    """Time and memory of the conversion from train form to a new network in deploy form."""
    benchmark = Benchmark(arguments)

    from repvgg.bench.programs import Conversion

    def works(model: str, directory: Path) -> tuple[list[Work], list[str]]:
        reasons = {side.name: side.lacks(model) or side.lacks_deploy for side in benchmark.sides}
        made: list[Work] = [
            Conversion(Line(model, side.name, Setting()), side, benchmark.conditions)
            for side in benchmark.sides
            if reasons[side.name] is None
        ]
        return made, [reason for reason in reasons.values() if reason is not None]

    return benchmark.run(
        "convert", "Conversion, measured", works, f"{PEAK} the train form; the new network is part of it."
    )


PEAK = (
    "on a processor, how far a fresh process grows in resident memory (freed blocks are given back at once), and on a "
    "GPU how far torch's allocations do, above"
)
INFERENCE_NOTES = {
    "compile": "compile is torch.compile with frozen weights, for these shapes.",
    "int8": "int8 is static and per channel, calibrated with noise, on which its speed does not depend.",
    "onnxruntime": "Where a network is exported, BatchNorm is folded into its convolutions.",
    "openvino": "Where a network is exported, BatchNorm is folded into its convolutions.",
}
SLICED = (
    "Of the others, strided 1×1 convolutions of fewer than 16 input channels are given only the pixels that they read "
    "where torch 2.13 would crash in their backward; it is the same map."
)
AT_REST = (
    "Of torch it is measured after a first call, which may compile; ONNX Runtime and OpenVINO keep what they take at "
    "the first call, so of them it counts."
)
