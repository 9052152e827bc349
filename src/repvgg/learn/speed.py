"""Images per second of the train and deploy forms of several networks, in turn (the speeds of Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from repvgg.learn.throughput import Throughput
from repvgg.model import to_deploy

FORMS = ("train_form", "deploy")

#: Of every network, of both forms, of every round: the seconds of each timed batch.
Seconds = dict[str, dict[str, list[list[float]]]]


def measure(
    nets: Mapping[str, Callable[[], nn.Module]],
    throughput: Throughput,
    *,
    rounds: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Seconds:
    """Time both forms of every network, once per round.

    In a round the networks take turns, and the two forms of one network do so batch by batch, so that a machine that
    slows down is unfair to none. One network at a time is built, converted and on the device.

    Args:
        nets: makes each network in its train form; untrained ones will do.
        throughput: what is timed; every round warms up anew.
        rounds: at least 1.
        device: where.
        memory_format: of networks and images.

    Raises:
        ValueError: a network that does not fit into the device's memory.
    """
    seconds: Seconds = {name: {form: [] for form in FORMS} for name in nets}
    turns = [name for _ in range(rounds) for name in nets]
    for name in track(turns, "measuring", console=Console(stderr=True)):
        try:
            net = nets[name]().eval().to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
            measured = throughput.seconds([net, to_deploy(net)])
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{name} with {throughput.batch} images of {throughput.resolution} px does not fit into the memory of "
                f"{device}: lower --batch, or leave it out with --models"
            ) from error
        for form, times in zip(FORMS, measured, strict=True):
            seconds[name][form].append(times)
    return seconds
