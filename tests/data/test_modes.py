"""Every mode of PIL to RGB: scaled, or refused by name, alike in the writer and where a user names an image file."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg.data.encode import Bad, Encoded, WriteOptions, encode, to_rgb
from repvgg.data.pictures import UnreadableImageError, open_image
from repvgg.data.sources import Sample
from support.images import photo

PICTURE = photo(np.random.default_rng(0), (24, 18))
RGB = np.asarray(PICTURE).astype(int)
GRAY = np.asarray(PICTURE.convert("L"))
AS_GRAY = np.stack([GRAY] * 3, axis=2)
DEEP = GRAY.astype(np.uint16) * 257
DEEP_MODES = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}
#: What each mode keeps of a photograph, and by how many levels the way there and back may be off.
KEPT = {
    "1": (np.asarray(PICTURE.convert("1").convert("RGB")), 0),
    "L": (AS_GRAY, 0),
    "LA": (AS_GRAY, 0),
    "P": (np.asarray(PICTURE.convert("P").convert("RGB")), 0),
    "PA": (np.asarray(PICTURE.convert("P").convert("RGB")), 0),
    "RGB": (RGB, 0),
    "RGBA": (RGB, 0),
    "RGBX": (RGB, 0),
    "CMYK": (RGB, 1),
    "YCbCr": (RGB, 3),
    "HSV": (RGB, 12),
}
#: Converting to these is lossless where every pixel is opaque.
PREMULTIPLIED = {"La": ("LA", AS_GRAY), "RGBa": ("RGBA", RGB)}


def in_mode(mode: str) -> Image.Image:
    return (PICTURE.convert("P") if mode == "PA" else PICTURE).convert(mode)


@pytest.mark.parametrize("mode", KEPT)
def test_a_mode_of_8_bits_keeps_what_it_holds(mode: str) -> None:
    image = in_mode(mode)
    assert image.mode == mode
    wanted, apart = KEPT[mode]
    assert to_rgb(image).mode == "RGB"
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - wanted).max() <= apart


@pytest.mark.parametrize("mode", PREMULTIPLIED)
def test_what_is_multiplied_by_its_opacity_is_divided_again(mode: str) -> None:
    by_way_of, wanted = PREMULTIPLIED[mode]
    image = PICTURE.convert(by_way_of).convert(mode)
    assert image.mode == mode
    assert np.array_equal(to_rgb(image), wanted)


def test_lab_is_what_its_colours_are() -> None:
    """CIE 1976: L* of 0 … 100 in 0 … 255, a* and b* as signed bytes."""
    lab = Image.frombytes("LAB", (3, 1), bytes([0, 0, 0, 255, 0, 0, 137, 80, 67]))
    black, white, red = np.asarray(to_rgb(lab)).astype(int)[0]
    assert black.max() <= 1
    assert white.min() >= 253
    assert red[0] > 230
    assert red[1:].max() < 60


@pytest.mark.parametrize("mode", DEEP_MODES)
def test_gray_of_16_bits_is_scaled(mode: str) -> None:
    image = Image.frombytes(mode, PICTURE.size, DEEP.astype(DEEP_MODES[mode]).tobytes())
    assert np.array_equal(to_rgb(image), AS_GRAY)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_gray_of_32_bits_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"32 bits \(PIL's mode {mode}\).* 8 or 16 bits"):
        to_rgb(PICTURE.convert(mode))


def test_no_mode_of_pil_is_left_out() -> None:
    tested = {*KEPT, *PREMULTIPLIED, "LAB", *DEEP_MODES, "I", "F"}
    assert set(Image.MODES) <= tested


# --- files ------------------------------------------------------------------------------------------------------------


def file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pgm(largest: int) -> bytes:
    """The photograph in levels of 0 … largest, two bytes each (netpbm's format, P5)."""
    levels = np.round(GRAY / 255 * largest).astype(">u2")
    return b"P5 %d %d %d\n" % (*PICTURE.size, largest) + levels.tobytes()


def tiff(bits: int, pixels: bytes, *, zero_is_white: bool = False, kind: int = 1) -> bytes:
    """Gray, one strip; kind 1 is unsigned, 2 signed, 3 floating point (TIFF 6.0, sections 4 and 19)."""
    tags = [(256, PICTURE.width), (257, PICTURE.height), (258, bits), (259, 1), (262, 0 if zero_is_white else 1)]
    tags += [(273, 8 + 2 + 12 * 11 + 4), (277, 1), (278, PICTURE.height), (279, len(pixels)), (284, 1), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def packed_12_bits(levels: np.ndarray) -> bytes:
    pairs = levels.reshape(-1, 2).astype(int)
    three = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    return np.stack(three, axis=1).astype(np.uint8).tobytes()


PALETTE = np.asarray(PICTURE.convert("P").convert("RGB"))
TRANSPARENT = {
    "gray": (file(PICTURE.convert("L"), "PNG", transparency=int(GRAY[3, 3])), AS_GRAY),
    "rgb": (file(PICTURE, "PNG", transparency=PICTURE.getpixel((3, 3))), RGB),
    "one colour of a palette": (file(PICTURE.convert("P"), "PNG", transparency=3), PALETTE),
    "many colours of a palette": (file(PICTURE.convert("P"), "PNG", transparency=bytes(range(200))), PALETTE),
    "gif": (file(PICTURE.convert("P"), "GIF", transparency=3), PALETTE),
}
READ = {
    "PNG of 16 bits": (file(Image.fromarray(DEEP), "PNG"), AS_GRAY),
    "PGM of 16 bits": (pgm(65535), AS_GRAY),
    "PGM of 10 bits": (pgm(1023), AS_GRAY),
    "PGM of 8 bits": (b"P5 %d %d 255\n" % PICTURE.size + GRAY.tobytes(), AS_GRAY),
    "TIFF of 16 bits": (tiff(16, DEEP.astype("<u2").tobytes()), AS_GRAY),
    "TIFF of 16 bits, 0 is white": (tiff(16, (65535 - DEEP).astype("<u2").tobytes(), zero_is_white=True), AS_GRAY),
    "TIFF of 12 bits": (tiff(12, packed_12_bits(GRAY.astype(int) * 4095 // 255)), AS_GRAY),
    "TIFF of 8 bits, 0 is white": (tiff(8, (255 - GRAY).tobytes(), zero_is_white=True), AS_GRAY),
    **{f"transparent, {name}": both for name, both in TRANSPARENT.items()},
}
FLOATS = GRAY.astype("<f4")
REFUSED = {
    "TIFF of floats, 0 … 1": tiff(32, (FLOATS / 255).tobytes(), kind=3),
    "TIFF of floats, 0 … 255": tiff(32, FLOATS.tobytes(), kind=3),
    "TIFF of 32 bits": tiff(32, (DEEP.astype("<u4") << 16).tobytes()),
    "TIFF of 16 bits with a sign": tiff(16, (DEEP >> 1).astype("<i2").tobytes(), kind=2),
    "PFM": b"Pf\n%d %d\n-1.0\n" % PICTURE.size + (FLOATS / 255)[::-1].tobytes(),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_alike_by_the_writer_and_for_a_prediction(name: str, tmp_path: Path) -> None:
    content, wanted = READ[name]
    record = encode(Sample(name, 0, content), WriteOptions(write_mode="raw"), as_jpeg=False)
    assert isinstance(record, Encoded), record
    stored = np.frombuffer(record.content, np.uint8).reshape(wanted.shape)
    assert np.abs(stored.astype(int) - wanted).max() <= 1
    path = tmp_path / "image"
    path.write_bytes(content)
    assert np.array_equal(open_image(path), stored)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_a_white_is_refused_by_name_in_both(name: str, tmp_path: Path) -> None:
    outcome = encode(Sample("dark.tif", 0, REFUSED[name]), WriteOptions(), as_jpeg=True)
    assert isinstance(outcome, Bad), outcome
    assert outcome.name == "dark.tif"
    assert outcome.skippable
    assert "store it as gray of 8 or 16 bits" in outcome.reason
    path = tmp_path / "dark.tif"
    path.write_bytes(REFUSED[name])
    with pytest.raises(UnreadableImageError, match=r"dark\.tif cannot be read as an image: .*gray of 8 or 16 bits"):
        open_image(path)


def test_what_is_no_image_is_said_without_an_address_in_memory(tmp_path: Path) -> None:
    outcome = encode(Sample("._x.jpg", 0, b"resource fork"), WriteOptions(), as_jpeg=True)
    assert isinstance(outcome, Bad)
    assert outcome.reason.startswith("does not decode: it is of no format that is read here (JPEG, PNG")
    path = tmp_path / "x.jpg"
    path.write_bytes(b"resource fork")
    with pytest.raises(UnreadableImageError, match=r"x\.jpg cannot be read as an image: it is of no format"):
        open_image(path)
