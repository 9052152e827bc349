"""Import FFCV without its side effects. Every module of this room that needs FFCV imports this one first.

`import ffcv` sets torch's thread count to 1, and each loader and each loader thread set it again.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore torch's process-wide thread count on leaving."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# FFCV keeps a table of two names in a numba dictionary, whose compilation takes seconds in every process. It is only
# read by Python code, so a plain dictionary will do.
with torch_threads_kept(), warnings.catch_warnings(), patch("numba.typed.Dict", dict):
    # FFCV imports distutils, which Python 3.11 announces as going away; setuptools provides it.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from ffcv import libffcv
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import (
        CenterCropRGBImageDecoder,
        RandomResizedCropRGBImageDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import TransformNode
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, Squeeze, ToDevice, ToTensor, ToTorchImage
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type


def _keep_precompiled() -> None:
    """Teach FFCV's compiler to leave alone functions that carry `precompiled = True`.

    FFCV compiles every operation anew in every process, seconds each, because its functions are closures that
    numba cannot cache. Ours are Python around an extension that is compiled once, at installation. The stage function
    around them is plain Python in FFCV 1.0.2 and can call either kind.
    """
    original = Compiler.compile

    def compile_unless_done(code: Callable[..., Any], signature: Any = None) -> Callable[..., Any]:
        return code if getattr(code, "precompiled", False) else original(code, signature)

    Compiler.compile = staticmethod(compile_unless_done)


def _read_record(address: Any, state: Any) -> Any:
    """Stored bytes of the record at `address`; state is (mapped file, sorted addresses, their sizes)."""
    contents, addresses, sizes = state
    return contents[address : address + sizes[np.searchsorted(addresses, address)]]


def _compile_readers_on_demand() -> None:
    """Compile the function that reads a record when it is called first, which our own decoder never does.

    FFCV compiles it at once, and spoils numba on the way: it takes the type "contiguous bytes" and marks it read-only.
    numba keeps one object per type, so from then on every compiled function with such an argument cannot find itself
    (KeyError in lookups and in clean-ups).
    """
    OSCacheManager.compile_reader = lambda self: Compiler.compile(_read_record)


_keep_precompiled()
_compile_readers_on_demand()

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "AllocationQuery",
    "CenterCropRGBImageDecoder",
    "Compiler",
    "EpochIterator",
    "FieldDescType",
    "HeaderType",
    "IntDecoder",
    "IntField",
    "Loader",
    "Operation",
    "RGBImageField",
    "RandomHorizontalFlip",
    "RandomResizedCropRGBImageDecoder",
    "RandomTranslate",
    "SimpleRGBImageDecoder",
    "Squeeze",
    "State",
    "ToDevice",
    "ToTensor",
    "ToTorchImage",
    "TransformNode",
    "get_metadata_type",
    "libffcv",
    "torch_threads_kept",
]
