"""What a line does when its turn comes: a forward, a training step, or a conversion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.bench.lines import FILE_RUNTIMES, Line
from repvgg.bench.rounds import Program
from repvgg.bench.sides import Side, require_one_function
from repvgg.learn.optim import parameter_groups, scaled_lr

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What :func:`repvgg.deploy.runtimes.load_program` calls them; an int8 file says itself where it is int8.
PROGRAM_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
#: Of the paper (section 4.1): of a speed only matters that they are not zero.
LR, LR_BATCH, MOMENTUM, WEIGHT_DECAY = 0.1, 256, 0.9, 1e-4
#: Batches that an int8 network is calibrated with. Speed does not depend on what they show.
CALIBRATION_BATCHES, CALIBRATION_IMAGES = 2, 8


@dataclass(frozen=True)
class Conditions:
    """What is the same for all lines.

    Attributes:
        batch: images per call.
        resolution: height and width of the images, px.
        threads: of torch and of every runtime.
        device: cpu or cuda.
    """

    batch: int
    resolution: int
    threads: int
    device: str

    def images(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        """Normal noise, N × 3 × H × W; torch's global generator stays where it is."""
        shape = (self.batch, 3, self.resolution, self.resolution)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return images.to(self.device, dtype).contiguous(memory_format=memory_format(layout))

    def finish(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def memory_format(layout: str) -> torch.memory_format:
    """Of its name."""
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


@dataclass(frozen=True)
class Work(ABC):
    """How a line's program is made; it can be pickled, and made again in a fresh process."""

    line: Line
    side: Side
    conditions: Conditions

    #: Whether what is there at rest is known only after a first call: see :mod:`repvgg.bench.memory`.
    rests_after_first = True

    @property
    def images_per_call(self) -> int:
        """0 where a call is not about images."""
        return self.conditions.batch

    @abstractmethod
    def prepare(self) -> Program:
        """Build all that is needed; nothing of it is timed."""

    def built(self) -> nn.Module:
        """The network in train form, as its side builds it."""
        net: nn.Module = self.side.build(self.line.model)
        return net

    def in_context(self, call: Callable[[], Any]) -> Program:
        """``call`` in its side's context, until the device has finished it."""

        def run() -> Any:
            with self.side.context():
                result = call()
            self.conditions.finish()
            return result

        return Program(run)


# --- inference ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference(Work):
    """One forward.

    Attributes:
        file: the exported network, of a runtime that reads one.
    """

    file: Path | None = None

    @property
    def rests_after_first(self) -> bool:  # type: ignore[override]
        """Runtimes keep the memory of their first call; torch gives it back, and compiling takes more."""
        return self.line.setting.runtime not in FILE_RUNTIMES

    def net(self) -> nn.Module:
        """The form that the line asks for, in eval mode."""
        net = self.built().eval()
        if self.line.setting.form == "train_form":
            return net
        return deployed(self.side, net)

    def prepare(self) -> Program:
        """See the base class."""
        setting, conditions = self.line.setting, self.conditions
        if self.file is not None:
            from repvgg.deploy.runtimes import load_program

            program = load_program(
                self.file,
                setting.runtime,
                threads=conditions.threads,
                precision=PROGRAM_PRECISIONS[setting.precision],
            )
            return self.in_context(partial(program, conditions.images()))
        with self.side.context():
            net = self.net()
        call: Callable[[Tensor], Any]
        if setting.precision == "int8":
            from repvgg.deploy.int8 import quantize

            call = quantize(net, calibration(conditions), backend="torch", compiled=True)
            images = conditions.images(layout=setting.layout)
        else:
            dtype = DTYPES[setting.precision]
            net = net.to(conditions.device, dtype)
            net = net.to(memory_format=memory_format(setting.layout))  # type: ignore[call-overload]
            # Weights are constants here: frozen, they are laid out for the kernels once, and BatchNorm is folded.
            call = (
                torch.compile(net, dynamic=False, options={"freezing": True}) if setting.runtime == "compile" else net
            )
            images = conditions.images(dtype, setting.layout)
        return self.in_context(torch.inference_mode()(partial(call, images)))


def calibration(conditions: Conditions) -> list[Tensor]:
    """Batches of noise of the size that is measured."""
    few = Conditions(CALIBRATION_IMAGES, conditions.resolution, conditions.threads, "cpu")
    return [few.images() for _ in range(CALIBRATION_BATCHES)]


def write_file(work: Inference, directory: Path) -> Inference:
    """The same work with its form's ONNX file, in int8 where the line is; a file that is there is taken as it is."""
    from repvgg.deploy.export import export_onnx

    setting, size = work.line.setting, work.conditions.resolution
    name = f"{work.line.model}-{work.side.name}-{setting.form}".replace(":", "-").replace(" ", "_")
    file = directory / f"{name}.onnx"
    if not file.exists():
        with work.side.context():
            export_onnx(work.net(), file, input_size=(3, size, size))
    if setting.precision != "int8":
        return replace(work, file=file)
    quantized = directory / f"{name}-int8.onnx"
    if not quantized.exists():
        from repvgg.deploy.int8 import quantize_onnx

        quantize_onnx(file, quantized, calibration(work.conditions))
    return replace(work, file=quantized)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training(Work):
    """One step: forward, loss, backward, SGD with momentum, as in :class:`repvgg.learn.module.Classifier`."""

    def prepare(self) -> Program:
        """See the base class."""
        setting, conditions = self.line.setting, self.conditions
        with self.side.context():
            net = self.built().train().to(conditions.device)
        net = net.to(memory_format=memory_format(setting.layout))  # type: ignore[call-overload]
        if needs_sliced_inputs(setting.runtime, setting.layout, conditions.device) and not self.side.is_ours:
            slice_inputs(net)
        lr = scaled_lr(LR, LR_BATCH, conditions.batch)
        optimizer = torch.optim.SGD(parameter_groups(net, WEIGHT_DECAY), lr=lr, momentum=MOMENTUM)
        images = conditions.images(layout=setting.layout)
        labels = torch.arange(conditions.batch, device=conditions.device) % 1000
        if setting.runtime == "compile":
            net.compile(dynamic=False)

        def autocast() -> AbstractContextManager[Any]:
            if setting.precision == "float32":
                return nullcontext()
            return torch.autocast(conditions.device, DTYPES[setting.precision])

        def step() -> Tensor:
            with autocast():
                loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad(set_to_none=True)  # between forward and backward, as Lightning does
            loss.backward()
            optimizer.step()
            return loss.detach()

        return replace(self.in_context(step), rest=optimizer.zero_grad)


def needs_sliced_inputs(runtime: str, layout: str, device: str) -> bool:
    """Whether torch 2.13 may crash in the backward of a strided 1×1 convolution.

    On a processor, channels_last, with few input channels and a large map it writes outside of its memory; a compiled
    network is laid out channels_last whatever was asked for.
    """
    return device == "cpu" and (runtime == "compile" or layout == "channels_last")


def slice_inputs(net: nn.Module) -> int:
    """Let strided 1×1 convolutions of few channels read only the pixels that count: the same map, without the crash.

    Returns:
        how many convolutions of ``net``.
    """
    count = 0
    for conv in net.modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or conv.padding not in (0, (0, 0)):
            continue
        vertical, horizontal = conv.stride
        if conv.in_channels < 16 and max(conv.stride) > 1:
            conv.register_forward_pre_hook(partial(_every, vertical=vertical, horizontal=horizontal))
            conv.stride = (1, 1)
            count += 1
    return count


def _every(module: nn.Module, inputs: tuple[Tensor], *, vertical: int, horizontal: int) -> Tensor:
    return inputs[0][:, :, ::vertical, ::horizontal]


# --- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion(Work):
    """The deploy form of a network in train form, which stays as it is."""

    rests_after_first = False

    @property
    def images_per_call(self) -> int:
        """None."""
        return 0

    def prepare(self) -> Program:
        """See the base class."""
        net = self.built().eval().to(self.conditions.device)
        deployed(self.side, net)
        assert self.side.deploy is not None
        return self.in_context(partial(self.side.deploy, net))


def deployed(side: Side, net: nn.Module) -> nn.Module:
    """The deploy form; another's is checked to be one, since the speed of anything else says nothing.

    Raises:
        ValueError: the two forms are not one function.
    """
    assert side.deploy is not None
    deploy = side.deploy(net).eval()
    if not side.is_ours:
        require_one_function(side, net, deploy)
    return deploy
