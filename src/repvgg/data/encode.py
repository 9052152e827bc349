"""From one image of a source to the bytes of one record.

Imports little: every worker process of the writer starts with this module.
"""

import ctypes
import errno
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from repvgg.data.sources import ImageSource, Sample

PAGE_BYTES = 1 << 23
"""FFCV's default. A record must lie within one page."""
LARGEST_SIDE = 65535
"""Width and height are stored in 16 bits."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
Image.init()  # PIL knows the less common ones only after this


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored.

    `short_side` bounds the shorter side in pixels, `max_resolution` the longer one (as FFCV's); null: no bound. An
    image is only ever shrunk, its aspect ratio kept. `proportion` stores each image as JPEG with
    `compress_probability`, else as raw pixels: faster to read, larger. `pass_through` stores a JPEG that no bound
    shrinks with its own bytes: nothing is lost a second time, and writing is several times faster.
    """

    write_mode: Literal["jpg", "raw", "proportion"] = "jpg"
    short_side: int | None = None
    max_resolution: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    pass_through: bool = True

    def __post_init__(self) -> None:
        if self.write_mode not in ("jpg", "raw", "proportion"):
            raise ValueError(f"write_mode must be jpg, raw or proportion, got {self.write_mode!r}")
        for name in ("short_side", "max_resolution"):
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be at least 1 pixel (or null), got {bound}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in 1 … 100, got {self.jpeg_quality}")
        if not 0 <= self.compress_probability <= 1:
            raise ValueError(f"compress_probability must lie in 0 … 1, got {self.compress_probability}")

    def stored_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height within both bounds, rounded to the nearest pixel, at least 1."""
        scales = [(1, 1)]
        if self.short_side is not None:
            scales.append((self.short_side, min(width, height)))
        if self.max_resolution is not None:
            scales.append((self.max_resolution, max(width, height)))
        numerator, denominator = min(scales, key=lambda scale: scale[0] / scale[1])
        rounded = [(2 * side * numerator + denominator) // (2 * denominator) for side in (width, height)]
        return max(rounded[0], 1), max(rounded[1], 1)

    def as_jpeg(self, seed: int, index: int) -> bool:
        """Whether sample `index` becomes a JPEG: a function of seed and sample, not of workers or order."""
        if self.write_mode == "proportion":
            return bool(np.random.default_rng([seed % 2**64, index]).random() < self.compress_probability)
        return self.write_mode == "jpg"


class StoredAs(IntEnum):
    """Where the bytes of a record come from."""

    PASSED_THROUGH = 0
    ENCODED = 1
    RAW = 2


class Encoded(NamedTuple):
    """One record. `damaged` names an image whose file is faulty and that PIL decodes all the same."""

    stored_as: StoredAs
    height: int
    width: int
    label: int
    content: bytes
    damaged: str | None = None


class Bad(NamedTuple):
    """A sample of which no record can be made, and whether leaving it out would be an answer."""

    name: str
    reason: str
    skippable: bool


@cache
def _imdecode() -> Callable[..., int]:
    """FFCV's JPEG decoder, without `import ffcv`, which takes seconds."""
    spec = find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    libraries = [file for folder in folders or () for file in Path(folder).glob("_libffcv*.so")]
    if not libraries:
        raise ValueError("ffcv is not installed: make setup")
    function = ctypes.CDLL(str(libraries[0])).imdecode
    pointer, size = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [pointer, ctypes.c_uint64, size, size, pointer, *[size] * 6, ctypes.c_bool, ctypes.c_bool]
    return function


def decodes(content: Any, height: int, width: int) -> bool:
    """Whether libjpeg-turbo, which stock FFCV loaders decode with, reads these bytes as RGB without any complaint."""
    source = np.frombuffer(content, dtype=np.uint8)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    whole = (height, width, 0, 0, 1, 1, False, False)  # no crop, no scale, no flip
    return _imdecode()(source.ctypes.data, source.size, height, width, pixels.ctypes.data, *whole) == 0


def is_plain_jpeg(content: bytes, info: dict[Any, Any]) -> bool:
    """Whether these bytes may be stored as they are; `info` is what PIL read from the header.

    Baseline (marker SOF0: progressive files decode several times slower), 8 bit, three components, luma sampled 1×1,
    2×1, 1×2, 2×2 or 4×1 times as finely as chroma, in the colour space that libjpeg takes for YCbCr: a JFIF file, or
    an Adobe file that says so, or one without a note whose components are numbered 1, 2, 3.
    """
    frame = _frame_header(content)
    if frame is None or frame[:2] != (0xC0, 8) or len(frame[2]) != 3:
        return False
    numbers, (luma, *chroma) = zip(*frame[2], strict=True)
    if luma not in (0x11, 0x21, 0x12, 0x22, 0x41) or chroma != [0x11, 0x11]:
        return False
    if "jfif" in info:
        return True
    if "adobe" in info:
        return info.get("adobe_transform") == 1
    return numbers == (1, 2, 3)


def _frame_header(content: bytes) -> tuple[int, int, list[tuple[int, int]]] | None:
    """Marker, bits per sample and (number, sampling factors) of each component (ITU T.81, B.2.2)."""
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOFn; not DHT, JPG, DAC
            rows = content[at + 10 : at + 10 + 3 * content[at + 9]]
            return marker, content[at + 4], list(zip(rows[::3], rows[1::3], strict=False))
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB; transparent pixels keep the colour stored under them.

    Gray of 16 bits is scaled to 8: PIL would clip everything above 255 to white.

    Raises:
        ValueError: gray of 32 bits, of which no file says what is white.
    """
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image), getattr(image, "tag_v2", {})).convert("RGB")
    if image.mode == "I" and image.format == "PPM":  # PIL has scaled it to 0 … 65535, whatever its largest value
        return _gray(np.asarray(image), {}).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind} of 32 bits (PIL's mode {image.mode}), and nothing says which of them is white: "
            "store it as gray of 8 or 16 bits"
        )
    if image.mode == "La":  # PIL has no direct way
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # PIL warns about the direct way
    return image.convert("RGB")


def _gray(levels: NDArray[Any], tags: Mapping[int, Any]) -> Image.Image:
    """Levels of 16 bits, or of as many as a TIFF's tags say, as gray of 8; PIL does not mind that 0 is white there."""
    bits, zero_is_white = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    gray = (levels >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - gray if zero_is_white else gray)


def encode(sample: Sample, options: WriteOptions, *, as_jpeg: bool) -> Encoded | Bad:
    """One record; rotation notes in EXIF are ignored, as torchvision's ImageFolder does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about notes and large images; what counts is whether pixels come out
        return _encode(sample, options, as_jpeg=as_jpeg)


def _encode(sample: Sample, options: WriteOptions, *, as_jpeg: bool) -> Encoded | Bad:
    name, label, image = sample
    damaged = None
    if isinstance(image, bytes):
        content = image
        try:
            image = Image.open(BytesIO(content), formats=FORMATS)
            width, height = image.size
            wanted = as_jpeg and options.pass_through and options.stored_size(width, height) == (width, height)
            if wanted and image.format == "JPEG" and is_plain_jpeg(content, image.info):
                # Some files go on after the image's end.
                whole = content[: content.rfind(b"\xff\xd9") + 2]
                if whole and decodes(whole, height, width):
                    return _fitting(name, Encoded(StoredAs.PASSED_THROUGH, height, width, label, whole))
            image.load()
        except MemoryError:
            raise
        except UnidentifiedImageError:
            reason = f"does not decode: it is of no format that is read here ({', '.join(FORMATS)}), or cut short"
            return Bad(name, reason, skippable=True)
        except Exception as error:  # PIL's parsers of broken files raise whatever they stumble over
            return Bad(name, f"does not decode: {type(error).__name__}: {error}", skippable=True)
        # PIL says nothing of libjpeg's warnings. ImageNet has images of this kind, which everybody trains with.
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and not decodes(content, height, width):
            damaged = name
    try:
        image = to_rgb(image)
    except ValueError as error:
        return Bad(name, f"cannot be stored: {error}", skippable=True)
    size = options.stored_size(*image.size)
    if max(size) > LARGEST_SIDE:
        return _too_large(name, f"{size[0]}×{size[1]} pixels; a record has at most {LARGEST_SIDE} on a side")
    if size != image.size:
        # Antialiased. Rings less than LANCZOS, and takes two thirds of its time; loading filters a second time.
        image = image.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    if not as_jpeg:
        return _fitting(name, Encoded(StoredAs.RAW, height, width, label, image.tobytes(), damaged))
    image.info = {}  # PIL would store the comment
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=options.jpeg_quality, subsampling="4:2:0")
    if not decodes(buffer.getvalue(), height, width):
        return Bad(name, "does not decode after encoding: a fault of PIL's or libjpeg-turbo's", skippable=False)
    return _fitting(name, Encoded(StoredAs.ENCODED, height, width, label, buffer.getvalue(), damaged))


def _fitting(name: str, record: Encoded) -> Encoded | Bad:
    if max(record.width, record.height) > LARGEST_SIDE or len(record.content) > PAGE_BYTES:
        return _too_large(
            name,
            f"{record.width}×{record.height} pixels in {len(record.content):,} bytes; a record has at most "
            f"{LARGEST_SIDE} pixels on a side and {PAGE_BYTES:,} bytes",
        )
    return record


def _too_large(name: str, what: str) -> Bad:
    return Bad(name, f"is too large: {what}. Set write.max_resolution or write.short_side", skippable=False)


def encode_chunk(source: ImageSource, indices: list[int], options: WriteOptions, seed: int) -> list[Encoded | Bad]:
    """Records of the samples `indices`, in this order; ends with the first that cannot be read or stored."""
    outcomes: list[Encoded | Bad] = []
    for index in indices:
        try:
            sample = source[index]
        except OSError as error:
            # An error that names a file is not one of this process.
            of_a_file = error.filename is not None and error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
            name = os.fsdecode(error.filename) if of_a_file else f"sample {index}"
            outcome: Encoded | Bad = Bad(name, f"cannot be read: {error.strerror or error}", skippable=of_a_file)
        except Exception as error:
            reason = f"cannot be read: {type(error).__name__}: {error}"
            outcome = Bad(f"sample {index}", reason, skippable=False)
        else:
            outcome = _wrong_label(sample, len(source.classes)) or encode(
                sample, options, as_jpeg=options.as_jpeg(seed, index)
            )
        outcomes.append(outcome)
        if isinstance(outcome, Bad) and not outcome.skippable:
            break
    return outcomes


def _wrong_label(sample: Sample, classes: int) -> Bad | None:
    if isinstance(sample.label, int | np.integer) and 0 <= sample.label < classes:
        return None
    return Bad(sample.name, f"has label {sample.label!r}, not a whole number in 0 … {classes - 1}", skippable=False)
