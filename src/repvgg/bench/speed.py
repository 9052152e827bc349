"""The body of `benchmark.py speed`: Table 4's column."""

from __future__ import annotations

import argparse
import functools
import platform
import sys
from statistics import median

from repvgg.bench.commands import command_line, require_device, require_directory, require_models


def speed(arguments: argparse.Namespace) -> str:
    """Images per second of both forms of the variants by the paper's protocol (Table 4), beside the paper's."""
    models = require_models(arguments.models)
    require_directory(arguments.out)

    import torch

    from repvgg.bench.machine import machine, versions
    from repvgg.bench.sides import our_net
    from repvgg.learn.devices import device_name, set_tf32
    from repvgg.learn.speed import measure
    from repvgg.learn.throughput import Throughput
    from repvgg.report import speed as report

    device = torch.device(require_device(arguments.device))
    set_tf32(False)  # the paper's fp32
    torch.backends.cudnn.benchmark = True  # as in training
    throughput = Throughput(
        arguments.resolution, batch=arguments.batch, warmup=arguments.warmup, batches=arguments.batches
    )
    layout = "channels_last" if arguments.channels_last else "contiguous"
    line = (
        f"{device_name(device)}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch "
        f"{torch.__version__}; float32 without TF32, {layout}, batch {throughput.batch}, {throughput.resolution} px, "
        f"{throughput.warmup} batches to warm up and {throughput.batches} timed, median of these; n = "
        f"{arguments.rounds} rounds in which {len(models)} variants and their forms take turns"
    )
    print(line, file=sys.stderr, flush=True)
    seconds = measure(
        {model: functools.partial(our_net, model) for model in models},
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
    command = command_line()
    text = report.page(command, line, speeds)
    if arguments.out is not None:
        record = {
            "command": command,
            "machine": machine(device),
            "versions": versions(),
            "protocol": {
                **{name: getattr(throughput, name) for name in ("resolution", "batch", "dtype", "warmup", "batches")},
                **{"rounds": arguments.rounds, "memory_format": layout, "tf32": False},
            },
            "images_per_s": rates,
            "seconds_per_batch": seconds,
        }
        report.write(arguments.out, speeds, text, record)
    return text
