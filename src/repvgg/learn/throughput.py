"""Images per second of two forms of one network, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from repvgg.model import memory_format_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Throughput:
    """How inference is timed; the defaults are the paper's protocol (section 4.1).

    Attributes:
        resolution: height and width of the images, px.
        batch: images per forward.
        dtype: of weights and images: float32, bfloat16 or float16.
        warmup: forwards before the clock starts.
        batches: timed forwards; the median counts.
        every_n_epochs: how often a validation measures; 0 never.

    Raises:
        ValueError: a value that is out of range, or an unknown dtype.
    """

    resolution: int
    batch: int = 128
    dtype: str = "float32"
    warmup: int = 50
    batches: int = 50
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"bench.dtype={self.dtype}: choose one of {', '.join(DTYPES)}")
        for name in ("resolution", "batch", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench.{name}={getattr(self, name)} must be at least 1")

    def is_due(self, epoch: int) -> bool:
        """Whether the validation after ``epoch`` (from 0) measures."""
        return self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0

    def compare(self, train_form: nn.Module, deploy: nn.Module, in_channels: int = 3) -> dict[str, float]:
        """Both forms' throughput, how many times as fast the deploy form is, and how far the rounds agree on that.

        A round is one timed forward of each. `bench/spread` is half of what lies between the 10th and the 90th
        percentile of the rounds' own speed-ups, as a share of their median: 0.05 is ±5 %. It is not there of one
        round. A speed-up that is nearer to 1 says nothing: something else used the machine, or both are as fast.
        """
        seconds = self.seconds([train_form, deploy], in_channels)
        train_rate, deploy_rate = (self.batch / median(times) for times in seconds)
        measured = {
            "bench/train_form/images_per_s": train_rate,
            "bench/deploy/images_per_s": deploy_rate,
            "bench/speedup": deploy_rate / train_rate,
        }
        ups = [train / fused for train, fused in zip(*seconds, strict=True)]
        if len(ups) > 1:
            tenths = quantiles(ups, n=10, method="inclusive")
            measured["bench/spread"] = (tenths[-1] - tenths[0]) / 2 / median(ups)
        return measured

    @torch.inference_mode()
    def seconds(self, models: Sequence[nn.Module], in_channels: int = 3) -> list[list[float]]:
        """The time of each model's every timed forward, on the device that it is on.

        The models take turns batch by batch, so that a machine that slows down is unfair to none. The images come
        from a generator of their own: torch's global one stays where training left it.

        Args:
            models: in eval mode; moved to ``dtype``. Pass copies.
            in_channels: of the images.
        """
        device = next(models[0].parameters()).device
        dtype = DTYPES[self.dtype]
        shape = (self.batch, in_channels, self.resolution, self.resolution)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        images = images.contiguous(memory_format=memory_format_of(models[0]))
        models = [model.to(dtype) for model in models]
        seconds: list[list[float]] = [[] for _ in models]
        for i in range(self.warmup + self.batches):
            for model, times in zip(models, seconds, strict=True):
                elapsed = _timed(model, images)
                if i >= self.warmup:
                    times.append(elapsed)
        return seconds


def _timed(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward, until the device has finished it."""
    synchronize = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    model(images)
    synchronize()
    return time.perf_counter() - start
