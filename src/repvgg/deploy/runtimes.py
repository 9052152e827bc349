"""Exported files, run: `.pt2` by torch, `.onnx` by onnxruntime or OpenVINO, on the CPU.

Torch is imported where a tensor comes or goes: an `.onnx` file runs without it (:meth:`Program.run`).
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repvgg.deploy.untrusted import require_data_only

if TYPE_CHECKING:
    import openvino
    from torch import Tensor

Floats = NDArray[np.float32]

#: Which runtimes run a file, by its suffix; the first is the default.
RUNTIMES = {".onnx": ("onnxruntime", "openvino"), ".pt2": ("torch",)}
#: In which precisions a runtime computes with floating-point numbers; the first is the default.
PRECISIONS = {"torch": ("f32",), "onnxruntime": ("f32",), "openvino": ("f32", "bf16")}
#: Where the metadata is in a .pt2.
METADATA_FILE = "metadata.json"


def missing_package(what: str, error: ImportError) -> ValueError:
    """The error of a package that is of the extra ``deploy``."""
    return ValueError(f"{what}: {error.name} is not installed. Install it with pip install -e '.[deploy]'")


class Program(ABC):
    """An exported network, ready to run.

    Attributes:
        path: its file.
        runtime: ``torch``, ``onnxruntime`` or ``openvino``.
        version: of that package.
        precision: what floating-point operators compute in; the integer ones of a quantized file are what they are.
        metadata: of the file.
        input_size: C, H, W.
        dynamic_size: whether H and W may be others.
    """

    runtime: str

    def __init__(self, path: Path, metadata: Mapping[str, str], precision: str) -> None:
        self.path, self.metadata, self.precision = path, dict(metadata), precision
        self.version = version(self.runtime)
        try:
            channels, height, width = json.loads(self.metadata["input_size"])
        except (KeyError, ValueError):
            raise ValueError(
                f"{path} does not say in its metadata what it takes, so it was not written by this repository. "
                "Export the checkpoint: python src/export.py ckpt=RUN/checkpoints/best.ckpt"
            ) from None
        self.input_size: tuple[int, int, int] = channels, height, width
        self.dynamic_size: bool = json.loads(self.metadata.get("dynamic_size", "false"))

    @abstractmethod
    def run(self, images: Floats) -> Floats:
        """Images N × C × H × W to logits N × classes.

        Raises:
            ValueError: images of another shape.
        """

    def __call__(self, images: Tensor) -> Tensor:
        """:meth:`run` on tensors on the CPU."""
        import torch

        return torch.from_numpy(self.run(images.numpy(force=True)))

    def _require(self, shape: tuple[int, ...]) -> None:
        wanted = self.input_size[:1] if self.dynamic_size else self.input_size
        if len(shape) != 4 or tuple(shape[1 : 1 + len(wanted)]) != wanted:
            sizes = "any height and width" if self.dynamic_size else "{1}, {2}".format(*self.input_size)
            raise ValueError(f"{self.path} takes images of shape N, {self.input_size[0]}, {sizes}; got {tuple(shape)}")


class _OnnxRuntime(Program):
    runtime = "onnxruntime"

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Other providers, where a build has them, would be another device or another precision.
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        super().__init__(path, self._session.get_modelmeta().custom_metadata_map, precision)
        self._input = self._session.get_inputs()[0].name

    def run(self, images: Floats) -> Floats:
        self._require(images.shape)
        logits: Floats = self._session.run(None, {self._input: np.ascontiguousarray(images)})[0]
        return logits


@cache
def _openvino() -> openvino.Core:
    """One for the whole process, kept to its end.

    Each of OpenVINO 2026.4's CPU plugins gives the thread that loads it a stack for signal handlers and frees it at its
    own end. Of two that are gone, the second leaves the thread with the first one's: any signal that Python handles
    (Ctrl-C; the end of a child, once torch's DataLoader had workers) is then a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _limit_without_bf16() -> str | None:
    """The variable that keeps oneDNN from bfloat16. OpenVINO 2026.4 lists it all the same, and then may crash."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        value = os.environ.get(name, "DEFAULT").upper()
        if not any(word in value for word in ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")):
            return f"{name}={value}"
    return None


class _OpenVino(Program):
    runtime = "openvino"

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        core = _openvino()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if {"f32": "FP32", "bf16": "BF16"}[precision] not in able:
            raise ValueError(f"precision={precision}: OpenVINO computes {', '.join(able)} on this CPU. Choose f32")
        if precision == "bf16" and (limit := _limit_without_bf16()) is not None:
            raise ValueError(f"precision={precision}: {limit} leaves OpenVINO no instructions for it. Choose f32")
        model = core.read_model(path)
        # Unasked, OpenVINO takes bf16 where the CPU has it.
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        self._compiled = core.compile_model(model, "CPU", settings)
        super().__init__(path, _metadata_of_onnx(path), precision)

    def run(self, images: Floats) -> Floats:
        self._require(images.shape)
        logits: Floats = self._compiled(np.ascontiguousarray(images))[0]
        return logits


class _Torch(Program):
    runtime = "torch"

    def __init__(self, path: Path, precision: str, threads: int | None) -> None:
        import torch

        require_data_only(path)
        extra = {METADATA_FILE: ""}
        self._module = torch.export.load(path, extra_files=extra).module(check_guards=False)
        super().__init__(path, json.loads(extra[METADATA_FILE] or "{}"), precision)
        self._threads = threads

    def run(self, images: Floats) -> Floats:
        import torch

        logits: Floats = self(torch.from_numpy(images)).numpy()
        return logits

    def __call__(self, images: Tensor) -> Tensor:
        import torch

        self._require(tuple(images.shape))
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                logits: Tensor = self._module(images)
        finally:
            torch.set_num_threads(before)
        return logits


def load_program(
    path: Path, runtime: str | None = None, *, threads: int | None = None, precision: str | None = None
) -> Program:
    """An exported file as something to call with images.

    Args:
        path: an ``.onnx`` or ``.pt2`` that :mod:`repvgg.deploy.export` wrote.
        runtime: see :data:`RUNTIMES`; None for the first of the file's kind.
        threads: of one call; None: all cores that this process may use, or torch's setting.
        precision: see :data:`PRECISIONS`; None is ``f32``, whatever a runtime would take by itself.

    Raises:
        ValueError: no such file, another file, a runtime or precision that is none, a package that is not installed.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        raise ValueError(f"{path}: an exported file ends in {' or '.join(RUNTIMES)}")
    runtimes = RUNTIMES[path.suffix]
    runtime = runtimes[0] if runtime is None else runtime
    if runtime not in runtimes:
        raise ValueError(f"runtime={runtime} does not run {path.suffix} files: choose {' or '.join(runtimes)}")
    precision = PRECISIONS[runtime][0] if precision is None else precision
    if precision not in PRECISIONS[runtime]:
        raise ValueError(f"precision={precision}: {runtime} computes in {' or '.join(PRECISIONS[runtime])} here")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. python src/export.py writes one")
    cores = threads or len(os.sched_getaffinity(0))
    try:
        if runtime == "torch":
            return _Torch(path, precision, threads)
        return (_OnnxRuntime if runtime == "onnxruntime" else _OpenVino)(path, precision, cores)
    except ImportError as error:
        raise missing_package(f"runtime={runtime}", error) from error
    except ValueError:
        raise
    except Exception as error:  # of a damaged file every runtime raises something else
        raise ValueError(f"{path} cannot be loaded by {runtime}: {str(error).strip()}. Export it again") from error


def _metadata_of_onnx(path: Path) -> dict[str, str]:
    try:
        import onnx
    except ImportError as error:
        raise missing_package("metadata of ONNX files", error) from error
    return {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}
