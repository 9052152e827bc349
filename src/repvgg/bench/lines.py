"""Which lines a benchmark has: what can vary, and which combinations do not exist. No torch: `--help` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product

FORMS = ("train_form", "deploy")
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
LAYOUTS = ("channels_last", "contiguous")
#: torch's own, and those that read an ONNX file.
TORCH_RUNTIMES = ("eager", "compile")
FILE_RUNTIMES = ("onnxruntime", "openvino")
RUNTIMES = (*TORCH_RUNTIMES, *FILE_RUNTIMES)
#: Runtimes that read a file lay tensors out as they like.
OWN_LAYOUT = "its own"


@dataclass(frozen=True)
class Setting:
    """What is compared under equal conditions; a field that a benchmark does not vary is empty."""

    form: str = ""
    precision: str = ""
    runtime: str = ""
    layout: str = ""

    def __str__(self) -> str:
        return " ".join(value for value in asdict(self).values() if value)


SETTING_FIELDS = tuple(field.name for field in fields(Setting))


@dataclass(frozen=True)
class Line:
    """One thing that is measured: a variant, whose implementation, under which conditions."""

    model: str
    side: str
    setting: Setting

    def __str__(self) -> str:
        return " ".join(part for part in (self.model, self.side, str(self.setting)) if part)


def inference_settings(
    forms: Sequence[str], precisions: Sequence[str], runtimes: Sequence[str], layouts: Sequence[str], device: str
) -> tuple[list[Setting], list[str]]:
    """All combinations that exist, and of the others what is left out and why.

    Args:
        device: cpu or cuda.

    Raises:
        ValueError: float16 on a processor, or no combination that exists.
    """
    require_float16(precisions, device)
    settings: dict[Setting, None] = {}
    left_out: dict[str, None] = {}
    for form, precision, runtime in product(forms, precisions, runtimes):
        reason = _missing(form, precision, runtime, device)
        if reason is not None:
            left_out[f"{Setting(form, precision, runtime)}: {reason}"] = None
            continue
        for layout in layouts:
            own = runtime in FILE_RUNTIMES
            settings[Setting(form, precision, runtime, OWN_LAYOUT if own else layout)] = None
    if not settings:
        raise ValueError("nothing is left to measure: " + "; ".join(left_out))
    return list(settings), list(left_out)


def require_float16(precisions: Sequence[str], device: str) -> None:
    """Raise ValueError for float16 on a processor, which has no fast one."""
    if "float16" in precisions and device == "cpu":
        raise ValueError("--precisions float16 needs a GPU (--device cuda): on a processor choose float32 or bfloat16")


def training_settings(precisions: Sequence[str], runtimes: Sequence[str], layouts: Sequence[str]) -> list[Setting]:
    """All combinations; each exists."""
    return [Setting("", *values) for values in product(precisions, runtimes, layouts)]


def _missing(form: str, precision: str, runtime: str, device: str) -> str | None:
    """Why there is no such line, None where there is."""
    if device == "cuda" and runtime in FILE_RUNTIMES:
        return "runs on the processor here: --device cpu"
    if precision == "bfloat16" and runtime == "onnxruntime":
        return "ONNX Runtime has no bfloat16 convolution for processors"
    if precision == "int8":
        if form != "deploy":
            return "it is the deploy form that is quantized"
        if runtime == "eager":
            return "a quantized graph runs compiled or in a runtime, not layer by layer"
        if device == "cuda":
            return "int8 is measured on the processor here: --device cpu"
    return None
