"""A network as a file that other programs run: ONNX, and torch.export's `.pt2`."""

from __future__ import annotations

import ast
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from repvgg.deploy.runtimes import METADATA_FILE, missing_package
from repvgg.files import replacing
from repvgg.model import copied

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

#: Of ONNX's default operators: what the exporter writes without converting, and every current runtime reads.
OPSET = 18
#: The oldest that has every operator of these networks in the same form, up to :func:`_lower`.
OLDEST_OPSET = 11
#: protobuf's own limit on one message, and so on a file of weights and graph.
LARGEST_ONNX = 2**31 - 2**24


class _Normalize(nn.Module):
    """Stored pixels to what the network was trained on."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # Subtracted and divided as in training, in this order: the same bits. Folding both into the first convolution
        # would not be the same at the borders, where the zeros of its padding mean the average colour.
        return (images - self.mean) / self.std


class _Deployed(nn.Module):
    """``net`` on ``images``, after ``normalize``."""

    def __init__(self, net: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalize(images))
        return logits


def export_onnx(
    net: nn.Module,
    path: Path,
    *,
    input_size: tuple[int, int, int],
    dynamic_size: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metadata: Mapping[str, str] = {},
    opset: int = OPSET,
) -> None:
    """Write ``net`` as ONNX: ``images`` N × C × H × W, float32, to ``logits`` N × classes.

    Nodes and tensors have the names of modules and state dict (``stages.0.1.conv``, ``stages.0.1.conv.weight``). In a
    train form, the BatchNorm after a convolution is folded into it, as every runtime would. The same network gives
    the same bytes; nothing of this machine is in them.

    Args:
        net: in eval mode, on any device; left as it is.
        path: what is there is replaced when the new file is whole.
        input_size: C, H, W.
        dynamic_size: any H and W instead of these; N is always free.
        mean, std: per channel, in units of stored pixels (0 to 255): the file takes raw pixels and normalises them
            itself. Both or neither.
        metadata: goes into the model's metadata, with ``input_size``, ``dynamic_size`` and ``normalize``
            (see :mod:`repvgg.deploy.preprocess`).
        opset: version of ONNX's operators, from :data:`OLDEST_OPSET` to :data:`OPSET`. Runtimes read files of their
            own version and of older ones. The file's IR version is the oldest of that opset.

    Raises:
        ValueError: a network in training mode, only one of ``mean`` and ``std``, or values that do not fit the
            channels; a network above protobuf's 2 GiB; an opset that lacks an operator of the network; a package that
            is not installed.
    """
    if not OLDEST_OPSET <= opset <= OPSET:
        raise ValueError(f"opset={opset}: choose from {OLDEST_OPSET} to {OPSET}")
    try:
        import onnx
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ImportError as error:
        raise missing_package("ONNX files", error) from error

    described = _described(input_size, dynamic_size, mean, std, metadata)
    size = sum(tensor.numel() * 4 for tensor in net.state_dict().values())
    if size > LARGEST_ONNX:
        raise ValueError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file (2 GiB): export a .pt2")
    program = _captured(net, input_size, dynamic_size, mean, std)
    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False
        )
    assert exported is not None
    proto = exported.model_proto
    _strip(proto)
    _rename(proto)
    _name_dimensions(proto, dynamic_size)
    try:
        _lower(proto, opset)
        if not dynamic_size:
            proto = onnx.shape_inference.infer_shapes(proto)  # what a viewer shows on every edge
        onnx.helper.set_model_props(proto, described)
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, onnx.defs.SchemaError) as error:
        what = str(error).strip().partition("\n")[0]
        raise ValueError(f"opset={opset} cannot say what this network computes ({what}); opset={OPSET} can") from error
    with replacing(path) as file:
        file.write(proto.SerializeToString(deterministic=True))


def export_pt2(
    net: nn.Module,
    path: Path,
    *,
    input_size: tuple[int, int, int],
    dynamic_size: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metadata: Mapping[str, str] = {},
) -> None:
    """Write ``net`` as a ``.pt2`` of torch.export, which torch runs without this repository's code.

    Arguments, input, output, metadata and errors are those of :func:`export_onnx`. The file holds no pickle. With a
    fixed size its weights keep their memory format, and with it its speed.
    """
    described = _described(input_size, dynamic_size, mean, std, metadata)
    program = _captured(net, input_size, dynamic_size, mean, std)
    program.example_inputs = None  # would be a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # of this machine
    extra = {METADATA_FILE: json.dumps(described, indent=1, ensure_ascii=False)}
    with replacing(path) as file, _quiet():
        torch.export.save(program, file, extra_files=extra)


def _described(
    input_size: tuple[int, int, int],
    dynamic_size: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """The file's metadata, sorted."""
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size={tuple(input_size)} must be channels, height and width, each at least 1")
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean} and std={std}: give both, or neither")
    described = {
        **metadata,
        "input_size": json.dumps(list(input_size)),
        "dynamic_size": json.dumps(dynamic_size),
        "normalize": "outside" if mean is None else "inside",
    }
    if mean is not None and std is not None:
        if not len(mean) == len(std) == input_size[0] or min(std) <= 0:
            raise ValueError(
                f"mean={list(mean)} and std={list(std)} must be {input_size[0]} numbers each, one per channel, and std "
                "positive"
            )
        described |= {"mean": json.dumps(list(mean)), "std": json.dumps(list(std))}
    return dict(sorted(described.items()))


def _captured(
    net: nn.Module,
    input_size: tuple[int, int, int],
    dynamic_size: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ExportedProgram:
    """The graph of a float32 copy on the CPU."""
    import torch.fx.experimental._config as symbolic_shapes
    from torch.export import Dim

    training = next((name for name, module in net.named_modules() if module.training), None)
    if training is not None:
        where = f" (its '{training}')" if training else ""
        raise ValueError(f"{type(net).__name__}{where} is in training mode: call .eval() before the export")
    normalize = nn.Identity() if mean is None or std is None else _Normalize(mean, std)
    deployed = _Deployed(copied(net).to("cpu", torch.float32), normalize).eval()
    if dynamic_size:  # of channels_last the tracer asks whether a side is 1, and then keeps to the answer
        deployed = deployed.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    sizes: dict[int, Dim] = {0: Dim("batch", min=1)}
    if dynamic_size:
        sizes |= {2: Dim("height", min=1), 3: Dim("width", min=1)}
    # Size-oblivious: otherwise a size that is 1 somewhere, as 32 pixels are after five strides, could be no other.
    # Deferred asserts: of a train form, that the two ways to write ⌈H/2⌉ agree is not for the tracer to prove.
    with _quiet(), torch.no_grad(), cast(Any, symbolic_shapes).patch(backed_size_oblivious=True):
        return torch.export.export(
            deployed,
            (torch.zeros(2, *input_size),),
            dynamic_shapes=(sizes,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the diary of the exporter, and without warnings of torch 2.13 about itself.

    Of its own use of its own pytree; of weights in channels_last, which it takes for parts of others and stores whole
    all the same; and of torchvision's operators, which no network here has.
    """
    levels = {
        "onnx_ir": logging.WARNING,
        "onnxscript": logging.WARNING,
        "torch.onnx._internal.exporter._registration": logging.ERROR,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            warnings.filterwarnings("ignore", "No complete tensor found in the group!", UserWarning)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter notes for its own developers, except where a node comes from; rename() needs that."""
    graph = proto.graph
    for holder in (proto, graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        holder.doc_string = ""
        kept = [prop for prop in holder.metadata_props if prop.key == _SCOPES]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
    del graph.value_info[:]


_SCOPES = "pkg.torch.onnx.name_scopes"


def _rename(proto: onnx.ModelProto) -> None:
    """Nodes and their outputs take their module's name, tensors that of the state dict."""
    import onnx

    graph = proto.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name.startswith("val_"):  # a constant of an operator
            users = ((node, list(node.input).index(tensor.name)) for node in graph.node if tensor.name in node.input)
            node, position = next(users)
            schema = onnx.defs.get_schema(node.op_type, OPSET)
            names[tensor.name] = _unused(f"{node.op_type}.{schema.inputs[position].name}", names)
        else:  # "_bias" is the exporter's, of a BatchNorm that it has folded
            names[tensor.name] = tensor.name.removeprefix("net.").replace(".weight_bias", ".bias")
        tensor.name = names[tensor.name]

    modules = [_module_of(node, names) for node in graph.node]
    count = Counter(modules)
    taken = dict(names)
    for node, module in zip(graph.node, modules, strict=True):
        alone = module and count[module] == 1
        node.name = _unused(module if alone else "/".join(filter(None, [module, node.op_type])), taken)
        del node.metadata_props[:]
        for number, output in enumerate(node.output):
            if output not in fixed:
                taken[output] = names[output] = node.name if number == 0 else f"{node.name}:{number}"
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]


def _module_of(node: onnx.NodeProto, names: Mapping[str, str]) -> str:
    """Whose weights it has, or else in whose forward it stands."""
    weights = (names.get(value, "") for value in node.input)
    owner = next((name.removesuffix(".weight") for name in weights if name.endswith(".weight")), None)
    if owner is not None:
        return owner
    scopes = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "['', '']")
    return str(ast.literal_eval(scopes)[-2]).removeprefix("net").removeprefix(".")


def _unused(name: str, taken: Mapping[str, str]) -> str:
    """The name, or the name and a number."""
    numbered = (name if n == 0 else f"{name}_{n}" for n in range(len(taken) + 1))
    used = set(taken.values())
    return next(free for free in numbered if free not in used)


def _lower(proto: onnx.ModelProto, opset: int) -> None:
    """From :data:`OPSET` to an older one; the checker refuses what this does not know.

    What was an attribute and is an input now (the axes of ReduceMean) becomes an attribute again, and an attribute goes
    whose value is the default. What else has changed in between are data types. onnx's own converter (1.23) has no way
    down for ReLU and BatchNorm, and gives ReduceMean an attribute that the older one lacks.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        written = onnx.defs.get_schema(node.op_type, OPSET)
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        for number in reversed(range(len(node.input))):
            name = written.inputs[min(number, len(written.inputs) - 1)].name
            if name in known and node.input[number] in constants:
                value = onnx.numpy_helper.to_array(constants[node.input.pop(number)])
                node.attribute.append(onnx.helper.make_attribute(name, value.tolist()))
        defaults = {name: attribute.default_value for name, attribute in written.attributes.items()}
        kept = [a for a in node.attribute if a.name in known or a != defaults.get(a.name)]
        del node.attribute[:]
        node.attribute.extend(kept)
    used = {name for node in graph.node for name in node.input}
    stored = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(stored)
    (domain,) = proto.opset_import
    domain.version = opset
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)


def _name_dimensions(proto: onnx.ModelProto, dynamic_size: bool) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        free = {0: "batch"} | ({2: "height", 3: "width"} if dynamic_size and len(dimensions) == 4 else {})
        for number, name in free.items():
            dimensions[number].dim_param = name
