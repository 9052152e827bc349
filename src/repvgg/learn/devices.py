"""Whether this machine has what a run asks for, said before anything is built. Torch is all that it imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

HALF_ON_GPU_ONLY = ("16-mixed", "16-true", "16")


def require_devices(accelerator: str, devices: int | str | Sequence[int], precision: str | int) -> None:
    """Refuse what would otherwise fail late or run as something else.

    Raises:
        ValueError: more GPUs than there are, or float16 on a CPU, where Lightning would
            quietly take bfloat16.
    """
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu":
        if str(precision) in HALF_ON_GPU_ONLY:
            raise ValueError(
                f"trainer.precision={precision} needs a GPU; on a CPU choose 32-true (the paper's) or bf16-mixed"
            )
        return
    if accelerator not in ("gpu", "cuda"):
        return
    available = torch.cuda.device_count()
    if isinstance(devices, int) and devices >= 0:
        wanted = devices
    elif isinstance(devices, str | int):  # -1, "auto"
        wanted = 1
    else:
        wanted = max(devices, default=-1) + 1
    if wanted > available:
        raise ValueError(
            f"trainer.devices={devices} asks for {wanted} GPU{'s' if wanted > 1 else ''}, this machine has "
            f"{available}: lower trainer.devices, or train on the processor with trainer=cpu "
            "(trainer.accelerator=cpu trainer.devices=2 for two processes)"
        )


#: In torch.cpu.get_capabilities(): AVX-512, AMX and AVX2 of x86, then Arm's.
BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")


def slow_bf16(asked: Mapping[str, object], accelerator: str = "cpu") -> str | None:
    """A line to print where bfloat16 is asked for on a processor without units for it; None where it has them.

    Args:
        asked: keys and values that may ask for it, such as ``{"trainer.precision": "bf16-mixed"}``.
        accelerator: ``auto`` is a CPU where there is no GPU.
    """
    found = [f"{key}={value}" for key, value in asked.items() if str(value).startswith(("bf16", "bfloat16"))]
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if not found or not on_cpu:
        return None
    # oneDNN computes in it on any processor with AVX-512, slowly, and may be told to use less than there is.
    able = torch.cpu.get_capabilities()
    if any(able.get(unit, False) for unit in BF16_UNITS) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    name = device_name(torch.device("cpu"))
    what = f"this processor ({name}) has no units for bfloat16 (AVX512-BF16, AMX)"
    return f"{', '.join(found)}: {what}, so float32 is likely to be faster"


def set_tf32(allowed: bool) -> None:
    """Whether GPUs may compute float32 convolutions and matrix products in TF32; torch allows it for convolutions."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def device_name(device: torch.device) -> str:
    """The model of the GPU, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), device.type)


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return file.readlines()
    except FileNotFoundError:  # not Linux
        return []
