"""The deploy form in int8: post-training quantization, static and per channel, with calibration images.

Weights are int8, symmetric, with one scale for each output channel; the inputs of convolutions and of the linear head
are uint8 with one scale and zero point for each tensor; biases, sums and the logits stay in higher precision.

    quantized = quantize(to_deploy(net), batches, backend="torch")
    logits = quantized(images)
    for layer in noise(to_deploy(net), quantized, images): ...

``onnxruntime`` runs in integers on a CPU. ``torch`` (torchao's PT2E) runs its reference graph, in which every quantized
tensor is dequantized before a float operation: on any device, with the accuracy of integer arithmetic that never
saturates, and at no more than float's speed. Compiled (x86 only) it runs in integers too. Without VNNI, integer kernels
of both saturate: oneDNN's, kept from VNNI, gave logits 14 % off where rounding gives 2 % (a small network of noise).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import platform
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from repvgg.deploy.export import export_onnx
from repvgg.deploy.int8_options import require_int8
from repvgg.deploy.runtimes import load_program
from repvgg.files import replacing
from repvgg.model import copied, relative

log = logging.getLogger(__name__)

Backend = Literal["onnxruntime", "torch"]


@dataclass(frozen=True)
class Layer:
    """What a convolution or linear layer of a quantized network computes with: dequantized weight, and output."""

    weight: Tensor
    output: Tensor


class Int8Network(nn.Module, ABC):
    """N × C × H × W, of any float dtype and device, to logits N × classes in float32 on that device.

    It has neither parameters nor a state_dict, so that no cast of the module around it reaches its scales. The images'
    size must be the calibration's.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Logits; autocast does not reach inside."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._run(images.float())

    @abstractmethod
    def _run(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def layers(self, images: Tensor) -> dict[str, Layer]:
        """Every quantized layer, by the name of the module that it comes from, before its activation."""


@torch.no_grad()
def quantize(
    net: nn.Module,
    calibration: Iterable[Tensor],
    *,
    backend: Backend,
    method: str | None = None,
    per_channel: bool = True,
    compiled: bool = False,
) -> Int8Network:
    """A network in int8 that does what ``net`` does. ``net`` and the random generators stay as they are.

    The same network and images give the same bits.

    Args:
        net: a deploy form, in any dtype and on any device; quantized from its float32 values on the CPU.
        calibration: batches N × C × H × W as the network is fed, all of one size; a few hundred images in all.
        backend: what quantizes, and runs what comes out.
        method: how the ranges of activations are found, see :data:`repvgg.deploy.int8_options.METHODS`.
        per_channel: False gives each weight tensor a single scale, for comparison.
        compiled: of ``torch``, on an x86 CPU: Inductor makes integer kernels of the graph, at the first call for each
            batch size.

    Raises:
        ValueError: an unknown backend or method, a missing package, or no calibration images.
    """
    method = require_int8(backend, method, key="backend")
    if compiled and backend != "torch":
        raise ValueError(f"compiled=True is torch's: backend={backend} compiles by itself")
    batches = [batch.detach().to("cpu", torch.float32) for batch in calibration]
    images = sum(len(batch) for batch in batches)
    if not images:
        raise ValueError("int8 needs images to calibrate with, and there are none")
    source = copied(net).to("cpu", torch.float32).eval().requires_grad_(False)
    with _generators_kept():
        if backend == "torch":
            return _quantize_torch(source, batches, method, per_channel=per_channel, compiled=compiled)
        return _quantize_onnxruntime(source, batches, method, per_channel=per_channel)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """torch's CPU generator is where it was; export and calibration draw nothing else."""
    with torch.random.fork_rng(devices=[]):
        yield


#: Loggers, and the least that they may say meanwhile: onnx's tools report every pass; torch's exporter, that there is
#: no torchvision; torchao 0.18, on import, extensions for GPUs that this torch cannot load and a missing triton, and
#: torch then that torchao registers its constants in an outdated way.
_TALKATIVE = {
    "onnx_ir": logging.WARNING,
    "onnxruntime": logging.WARNING,
    "onnxscript": logging.WARNING,
    "torch.onnx._internal.exporter._registration": logging.ERROR,
    "torch.utils._pytree": logging.ERROR,
    "torchao": logging.ERROR,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say of themselves."""
    loggers = {logging.getLogger(name): level for name, level in _TALKATIVE.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints progress
            # torch 2.13's own use of its own outdated parts
            warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


# --- torch ----------------------------------------------------------------------------------------------------------


class TorchInt8(Int8Network):
    """A graph of Q/DQ operations as torchao's PT2E makes it."""

    def __init__(self, graph: fx.GraphModule, *, compiled: bool = False) -> None:
        super().__init__()
        # In a tuple, where Module.to() and state_dict() do not find it.
        self._graph = (graph,)
        self._device = torch.device("cpu")
        if compiled:
            _warn_without_vnni("compiled torch")
        self._compiled = _compiled(graph) if compiled else None

    def _run(self, images: Tensor) -> Tensor:
        self._bring_to(images.device)
        logits: Tensor = (self._compiled or self._graph[0])(images)
        return logits

    def _bring_to(self, device: torch.device) -> None:
        if device != self._device:
            if self._compiled is not None:
                raise ValueError(f"int8 is compiled for x86 CPUs, and the images are on {device}: take compiled=False")
            self._graph[0].to(device)
            self._device = device

    @torch.no_grad()
    def layers(self, images: Tensor) -> dict[str, Layer]:
        """See the base class."""
        self._bring_to(images.device)
        tap = _Tap(self._graph[0])
        tap.run(images.float())
        return tap.layers


class _Tap(fx.Interpreter):
    """Runs a graph and keeps what its convolutions and linear layers see and give."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.layers: dict[str, Layer] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the base class's."""
        result = super().run_node(n)
        if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            args, _ = self.fetch_args_kwargs_from_env(n)
            module, _ = list(n.meta["nn_module_stack"].values())[-1]
            self.layers[module] = Layer(args[1], result)
        return result


def _quantize_torch(
    net: nn.Module, batches: Sequence[Tensor], method: str, *, per_channel: bool, compiled: bool
) -> TorchInt8:
    import torch.fx.experimental._config as symbolic_shapes

    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

        # Two images, since a batch of one would be taken for a constant; as in repvgg.deploy.export.
        example = batches[0][:1].repeat(2, 1, 1, 1)
        with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            exported = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        quantizer = X86InductorQuantizer().set_global(_scheme(method, per_channel=per_channel))
        prepared = prepare_pt2e(exported, quantizer)
        for batch in batches:
            prepared(batch)
        return TorchInt8(convert_pt2e(prepared), compiled=compiled)


def _scheme(method: str, *, per_channel: bool) -> Any:
    """X86InductorQuantizer's own, with the ranges of activations by ``method``.

    And without its floor of 2⁻¹² for a scale: a channel whose weights stay below 2⁻¹² · 127 would get only some of the
    256 steps.
    """
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig

    eps = torch.finfo(torch.float32).eps
    observer = {"minmax": MinMaxObserver, "histogram": HistogramObserver}[method]
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observer.with_args(eps=eps),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,  # of output channels
        observer_or_fake_quant_ctr=(PerChannelMinMaxObserver if per_channel else MinMaxObserver).with_args(eps=eps),
    )
    return QuantizationConfig(activation, activation, weight, None)


def _compiled(graph: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    """Inductor's integer kernels; only a frozen graph has its quantized weights prepared for them."""
    compiled = torch.compile(graph, dynamic=False)

    def call(images: Tensor) -> Tensor:
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True), warnings.catch_warnings():
            # Inductor 2.13's own copying of a zero point
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
            logits: Tensor = compiled(images)
        return logits

    return call


# --- onnxruntime ----------------------------------------------------------------------------------------------------


class OnnxRuntimeInt8(Int8Network):
    """An int8 ONNX file, run by onnxruntime on the CPU, on as many threads as torch has; ``file`` is its content."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.read_bytes()
        self._program = load_program(path, "onnxruntime", threads=torch.get_num_threads())

    def _run(self, images: Tensor) -> Tensor:
        return self._program(images).to(images.device)

    def layers(self, images: Tensor) -> dict[str, Layer]:
        """See the base class; computed by the file's definition, in float, whatever kernels the CPU has."""
        import onnx
        import onnxruntime

        model = onnx.load_from_string(self.file)
        quantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        taps = {
            _module_name(quantized[node.input[1]]): (node.input[1], node.output[0])
            for node in model.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in quantized
        }
        known = {value.name for value in model.graph.output}
        for name in (name for tap in taps.values() for name in tap if name not in known):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [name for tap in taps.values() for name in tap]
        values = session.run(names, {session.get_inputs()[0].name: images.float().cpu().numpy()})
        found = dict(zip(names, map(torch.from_numpy, values), strict=True))
        return {layer: Layer(found[weight], found[output]) for layer, (weight, output) in taps.items()}


def _module_name(initializer: str) -> str:
    """``stem.conv`` of ``stem.conv.weight_quantized``."""
    return initializer.removesuffix("_quantized").removesuffix(".weight")


def _quantize_onnxruntime(
    net: nn.Module, batches: Sequence[Tensor], method: str, *, per_channel: bool
) -> OnnxRuntimeInt8:
    _, channels, height, width = batches[0].shape
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "float.onnx", Path(directory) / "int8.onnx"
        with _quiet():
            export_onnx(net, source, input_size=(channels, height, width))
        quantize_onnx(source, target, batches, method=method, per_channel=per_channel)
        return OnnxRuntimeInt8(target)


def quantize_onnx(
    source: Path,
    target: Path,
    calibration: Iterable[Tensor],
    *,
    method: str | None = None,
    per_channel: bool = True,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the int8 form of an ONNX file of one input and float weights.

    Convolutions and linear layers are quantized (QDQ), and the logits stay float. The same file and images give the
    same bytes.

    Args:
        source: of :func:`repvgg.deploy.export.export_onnx`; its metadata are kept.
        target: replaced when the new file is whole.
        calibration: batches as the file's input wants them, in the dtype that it has.
        method, per_channel: see :func:`quantize`.
        metadata: added to the source's.

    Raises:
        ValueError: an unknown method, a missing package, or no calibration images.
    """
    method = require_int8("onnxruntime", method, key="backend")
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = [batch.detach().cpu().numpy() for batch in calibration]
    if not batches:
        raise ValueError("int8 needs images to calibrate with, and there are none")
    _warn_without_vnni("onnxruntime")
    original = onnx.load(source)
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory() as directory, _quiet():
        prepared, quantized = Path(directory) / "prepared.onnx", Path(directory) / "int8.onnx"
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            quantized,
            _Batches(original.graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Gemm", "MatMul"],
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[method],
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],  # the logits
                "CalibStridedMinMax": 1,  # batch by batch: histograms would keep every activation of all images
            },
        )
        made = onnx.load(quantized)
    onnx.helper.set_model_props(made, {entry.key: entry.value for entry in original.metadata_props} | (metadata or {}))
    with replacing(Path(target)) as file:
        file.write(made.SerializeToString(deterministic=True))


class _Batches:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, name: str, batches: Sequence[Any]) -> None:
        self.name, self.batches = name, batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Of the batches that come next."""
        self._next = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        """None after the last."""
        batch = next(self._next, None)
        return None if batch is None else {self.name: batch}


def sums_saturate() -> bool:
    """Whether integer kernels add two products of uint8 and int8 in 16 bits here (vpmaddubsw): x86 without any VNNI."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    able = torch.cpu.get_capabilities()
    return x86 and not (able.get("avx512_vnni", False) or able.get("avx_vnni", False))


def _warn_without_vnni(what: str) -> None:
    if sums_saturate():
        log.warning(
            f"this CPU has no VNNI: int8 sums of {what} may saturate on it, which costs accuracy that others do not "
            "lose. The backend torch, uncompiled, computes without saturation"
        )


# --- where it hurts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNoise:
    """Signal to quantization noise of one layer, 20 · log10(‖float‖ / ‖float − int8‖) in dB; inf where they are equal.

    Attributes:
        name: of the module.
        weight_db: of its weight.
        output_db: of its output before the activation, with what all layers before it have added.
        channel_range: the largest |weight| of a channel over the median of the channels' largest: with one scale for
            the whole tensor, the typical channel would get 127 / channel_range steps.
    """

    name: str
    weight_db: float
    output_db: float
    channel_range: float


@torch.no_grad()
def noise(net: nn.Module, quantized: Int8Network, images: Tensor) -> list[LayerNoise]:
    """Every quantized layer of a network beside the float one, in the order in which they run.

    Args:
        net: what was quantized; it is only read.
        quantized: of :func:`quantize`.
        images: one batch, N × C × H × W.
    """
    source = copied(net).to(images.device, torch.float32).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    modules = {n: m for n, m in source.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    source(images.float())
    layers = quantized.layers(images)
    found = []
    for name in outputs:  # in the order of the forward pass
        if name in layers:
            weight = modules[name].weight
            largest = weight.flatten(1).abs().amax(1)
            found.append(
                LayerNoise(
                    name,
                    _decibels(weight, layers[name].weight),
                    _decibels(outputs[name], layers[name].output),
                    float(relative(largest.max(), largest.median())),
                )
            )
    return found


def _decibels(signal: Tensor, noisy: Tensor) -> float:
    signal, noisy = signal.double(), noisy.to(signal.device, torch.float64)
    ratio = signal.square().sum() / (signal - noisy).square().sum()
    return math.inf if torch.equal(signal, noisy) else 10 * float(ratio.log10())
