"""Speeds of several networks: who is measured how often, and what they are measured with."""

from functools import partial
from statistics import median
from types import MappingProxyType

import pytest
import torch
from torch import nn

from repvgg.learn import speed
from repvgg.learn.run import conclusion
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


@pytest.mark.parametrize(
    ("deploy", "spread"),
    [
        ([1.0] * 11, 0.0),
        # Speed-ups of 2, 2.1, … 3: the 10th percentile is 2.1, the 90th 2.9, the median 2.5.
        ([2 / (2 + i / 10) for i in range(11)], (2.9 - 2.1) / 2 / 2.5),
        # One round in eleven that something else slowed down changes neither.
        ([1.0] * 10 + [5.0], 0.0),
        ([1.0], None),
    ],
)
def test_the_spread_is_that_of_the_rounds_own_speed_ups(
    deploy: list[float], spread: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Throughput, "seconds", lambda *_: [[2.0] * len(deploy), deploy])
    measured = SMALL.compare(nn.Identity(), nn.Identity())
    assert measured["bench/train_form/images_per_s"] == 1
    assert measured["bench/speedup"] == measured["bench/deploy/images_per_s"] == pytest.approx(2 / median(deploy))
    assert measured.get("bench/spread") == (None if spread is None else pytest.approx(spread))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"bench/speedup": 0.95, "bench/spread": 0.25}, "(×0.95, within the ±25% by which its rounds differ)"),
        ({"bench/speedup": 1.2, "bench/spread": 0.25}, "(×1.20, within the ±25% by which its rounds differ)"),
        ({"bench/speedup": 2.0, "bench/spread": 0.25}, "(×2.00)."),
        ({"bench/speedup": 0.95}, "(×0.95)."),
    ],
)
def test_the_last_line_says_where_a_speed_up_says_nothing(more: dict[str, float], says: str) -> None:
    speeds = {"bench/train_form/images_per_s": 1000.0, "bench/deploy/images_per_s": 950.0}
    assert f"1,000 → 950 images/s {says}" in conclusion("B0-s0", "finished", {**speeds, **more}, "/runs/x")
