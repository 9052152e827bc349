"""Speeds of several networks: who is measured how often, and what they are measured with."""

from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch import nn

from repvgg.learn import speed
from repvgg.learn.throughput import Throughput
from repvgg.model import memory_format_of
from support.networks import tiny

SMALL = Throughput(32, batch=2, warmup=1, batches=3)
MEASURE = MappingProxyType({"rounds": 2, "device": torch.device("cpu")})


def test_every_form_of_every_network_is_timed_in_every_round() -> None:
    seconds = speed.measure({"full": tiny, "plain": partial(tiny, "plain")}, SMALL, **MEASURE)
    assert list(seconds) == ["full", "plain"]
    for forms in seconds.values():
        assert list(forms) == ["train_form", "deploy"]
        assert [[len(times) for times in rounds] for rounds in forms.values()] == [[3, 3], [3, 3]]
        assert all(time > 0 for rounds in forms.values() for times in rounds for time in times)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_networks_take_turns_in_the_layout_asked_for(layout: torch.memory_format, monkeypatch) -> None:
    seen: list[list[int]] = []

    def seconds(self: Throughput, models: list[nn.Module], in_channels: int = 3) -> list[list[float]]:
        assert not any(model.training for model in models)
        assert [memory_format_of(model) for model in models] == [layout, layout]
        seen.append([sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in models])
        return [[1.0], [2.0]]

    monkeypatch.setattr(Throughput, "seconds", seconds)
    nets = {"full": tiny, "plain": partial(tiny, "plain")}
    measured = speed.measure(nets, SMALL, **MEASURE, memory_format=layout)
    full, plain = ([sum(isinstance(m, nn.BatchNorm2d) for m in net().modules()), 0] for net in nets.values())
    assert seen == [full, plain, full, plain]  # a round is everyone once; a deploy form has no BatchNorm
    assert measured["plain"] == {"train_form": [[1.0], [1.0]], "deploy": [[2.0], [2.0]]}


def test_a_network_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(*_: object) -> list[list[float]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Throughput, "seconds", seconds)
    with pytest.raises(ValueError, match="large with 2 images of 32 px does not fit into the memory of cpu: lower"):
        speed.measure({"large": tiny}, SMALL, **MEASURE)
