"""What int8 can be asked for, checked without importing anything heavy."""

from __future__ import annotations

from importlib.util import find_spec

#: By backend: how the range of an activation may be found from calibration images; the first is the default.
#: ``minmax`` takes the smallest and largest value that occurred, so that nothing is clipped, the order and the batches
#: of the images do not matter, and both backends quantize alike. The others clip what is rare: ``entropy`` and
#: ``percentile`` (99.999 %) are onnxruntime's, ``histogram`` (least squared error) is torchao's.
METHODS = {"onnxruntime": ("minmax", "entropy", "percentile"), "torch": ("minmax", "histogram")}
#: What each backend imports.
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "torch": ("torchao",)}
INSTALL = "pip install -e '.[deploy]'"


def require_int8(backend: str, method: str | None = None, *, key: str = "int8", method_key: str = "method") -> str:
    """The calibration method, if there is such a backend, its packages are installed, and it has the method.

    Args:
        backend: a key of :data:`METHODS`.
        method: one of its methods, or None for the default.
        key, method_key: what a user calls them, for the error.

    Raises:
        ValueError: with the choices, or the command that installs what is missing.
    """
    if backend not in METHODS:
        raise ValueError(f"{key}={backend}: choose {' or '.join(METHODS)}, or null for no int8 form")
    missing = [package for package in PACKAGES[backend] if find_spec(package) is None]
    if missing:
        raise ValueError(f"{key}={backend} needs {', '.join(missing)}, which this Python lacks: {INSTALL}")
    if method is not None and method not in METHODS[backend]:
        raise ValueError(f"{method_key}={method}: {key}={backend} knows {', '.join(METHODS[backend])}")
    return method or METHODS[backend][0]
