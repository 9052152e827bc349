"""The compiled extension against PIL, on real photographs."""

import io
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from repvgg.data.jobs import JOB, _decode

KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "gray": {},
    "4:1:1": {"sampling": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411},
    "4:4:0": {"sampling": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440},
}
HEIGHT, WIDTH = 229, 301  # odd: the last MCUs are incomplete


@cache
def stored(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A photograph's JPEG bytes, and what PIL decodes from them."""
    pixels = load_sample_image("flower.jpg")[60 : 60 + HEIGHT, 200 : 200 + WIDTH]
    file = io.BytesIO()
    if "sampling" in KINDS[kind]:  # PIL knows the three common ones
        flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, KINDS[kind]["sampling"]]
        file.write(cv2.imencode(".jpg", pixels[:, :, ::-1], flags)[1].tobytes())
    else:
        image = Image.fromarray(pixels).convert("L" if kind == "gray" else "RGB")
        image.save(file, "JPEG", quality=92, **KINDS[kind])
    return np.frombuffer(file.getvalue(), np.uint8), np.asarray(Image.open(file).convert("RGB"))


def job(content: np.ndarray, *, jpg: bool = True, height: int = HEIGHT, width: int = WIDTH, **fields: float) -> Any:
    """One job; the window is the whole image unless it is given."""
    jobs = np.zeros(1, dtype=JOB)
    jobs["address"], jobs["bytes"], jobs["jpg"] = content.ctypes.data, content.size, jpg
    jobs["height"], jobs["width"], jobs["window_bottom"], jobs["window_right"] = height, width, height, width
    for name, value in fields.items():
        jobs[name] = value
    return jobs


def decode(jobs: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((len(jobs), size, size, 3), 7, dtype=np.uint8)
    status = np.full(len(jobs), -1, dtype=np.int32)
    _decode.decode(jobs, np.zeros(1, dtype=np.int64), out, status, size)
    return out, status


def box(top: float, left: float, height: float, width: float) -> dict[str, float]:
    return {"top": top, "left": left, "box_height": height, "box_width": width}


def window(top: int, left: int, height: int, width: int) -> dict[str, int]:
    return {"window_top": top, "window_left": left, "window_bottom": top + height, "window_right": left + width}


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 200),
    top=st.integers(-40, HEIGHT),
    left=st.integers(-40, WIDTH),
    mirrored=st.booleans(),
)
def test_a_part_of_a_jpeg_is_that_part_of_the_whole_bit_for_bit(
    kind: str, size: int, top: int, left: int, mirrored: bool
) -> None:
    content, whole = stored(kind)
    out, status = decode(job(content, mirrored=mirrored, **box(top, left, size, size)), size)
    padded = np.pad(whole, ((40, 240), (40, 240), (0, 0)))
    expected = padded[40 + top : 40 + top + size, 40 + left : 40 + left + size]
    assert status[0] == 0
    assert np.array_equal(out[0], expected[:, ::-1] if mirrored else expected)


@settings(max_examples=200)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), size=st.integers(1, 260), mirrored=st.booleans())
def test_cropping_then_resizing_matches_pil(data: st.DataObject, kind: str, size: int, mirrored: bool) -> None:
    """Within one level: PIL rounds twice, we once. Up- and downscaling, both axes by different factors."""
    content, whole = stored(kind)
    height, width = data.draw(st.integers(1, HEIGHT)), data.draw(st.integers(1, WIDTH))
    top, left = data.draw(st.integers(0, HEIGHT - height)), data.draw(st.integers(0, WIDTH - width))
    cut = (top, left, height, width)
    out, status = decode(job(content, mirrored=mirrored, **box(*cut), **window(*cut)), size)
    part = Image.fromarray(whole[top : top + height, left : left + width])
    expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    assert status[0] == 0
    assert np.abs(out[0].astype(int) - (expected[:, ::-1] if mirrored else expected)).max() <= 1


@settings(max_examples=100)
@given(data=st.data(), size=st.integers(1, 256))
def test_resizing_then_cropping_matches_pil(data: st.DataObject, size: int) -> None:
    """Boxes between pixels, whose edge pixels mix with what lies outside the box."""
    _, whole = stored("4:2:0")
    height, width = data.draw(st.floats(1, HEIGHT)), data.draw(st.floats(1, WIDTH))
    top, left = data.draw(st.floats(0, HEIGHT - height)), data.draw(st.floats(0, WIDTH - width))
    out, status = decode(job(np.ascontiguousarray(whole), jpg=False, **box(top, left, height, width)), size)
    expected = Image.fromarray(whole).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, min(left + width, WIDTH), min(top + height, HEIGHT))
    )
    assert status[0] == 0
    assert np.abs(out[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_downscaling_does_not_alias() -> None:
    """A pattern of single black and white columns becomes gray; picking pixels would keep it black or white."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    out, _ = decode(job(stripes, jpg=False, height=64, width=64, **box(0, 0, 64, 64)), 8)
    assert np.abs(out.astype(int) - 127.5).max() < 12


def test_flat_images_stay_flat() -> None:
    """Weights sum to 1: white stays white."""
    white = np.full((97, 41, 3), 255, dtype=np.uint8)
    for size in (1, 7, 41, 64, 224):
        out, _ = decode(job(white, jpg=False, height=97, width=41, **box(0, 0, 97, 41)), size)
        assert (out == 255).all()


@pytest.mark.parametrize("cut", [2, 300, 0.5, -2], ids=["no header", "no image", "half", "no end"])
def test_broken_jpegs_are_told_apart_from_whole_ones(cut: float) -> None:
    content, _ = stored("4:2:0")
    short = content[: int(cut * content.size) if isinstance(cut, float) else cut].copy()
    jobs = np.concatenate([job(content, **box(0, 0, HEIGHT, WIDTH)), job(short, **box(0, 0, HEIGHT, WIDTH))])
    _, status = decode(jobs, 64)
    assert status.tolist() == [0, 1]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_crashes(data: st.DataObject) -> None:
    content = stored(data.draw(st.sampled_from(sorted(KINDS))))[0].copy()
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, content.size - 1))] = data.draw(st.integers(0, 255))
    _, status = decode(job(content, **box(10.5, 3, 150, 200)), 32)
    assert status[0] in (0, 1, 2)


def test_a_jpeg_of_another_size_than_announced_is_refused() -> None:
    content, _ = stored("4:4:4")
    _, status = decode(job(content, height=HEIGHT + 1, **box(0, 0, 8, 8)), 8)
    assert status[0] == 2


def test_buffers_that_do_not_fit_are_refused() -> None:
    content, _ = stored("4:2:0")
    jobs, cursor = job(content, **box(0, 0, 8, 8)), np.zeros(1, dtype=np.int64)
    status, out = np.zeros(1, dtype=np.int32), np.zeros((1, 8, 8, 3), dtype=np.uint8)
    for wrong in [
        (jobs, cursor, out, status, 9),
        (jobs, cursor, out, np.zeros(2, dtype=np.int32), 8),
        (jobs, np.zeros(2, dtype=np.int64), out, status, 8),
        (jobs.view(np.uint8)[:-1], cursor, out, status, 8),
        (jobs, cursor, out, status, 0),
    ]:
        with pytest.raises(ValueError, match="fit each other"):
            _decode.decode(*wrong)
    with pytest.raises(TypeError, match="bytes-like"):
        _decode.decode(jobs, cursor, np.zeros((1, 8, 8, 6), dtype=np.uint8)[..., ::2], status, 8)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    at=st.floats(0, 1),
    length=st.integers(0, 300),
    flipped=st.integers(0, 255),
    cut=st.booleans(),
)
def test_the_last_pixel_complains_of_what_the_whole_image_does(
    kind: str, at: float, length: int, flipped: int, cut: bool
) -> None:
    """What a check before a training decodes: whatever is damaged, it is the same to it."""
    content = stored(kind)[0].copy()
    first = int(at * (content.size - 1))
    content[first : first + length] = 0
    content[first] ^= flipped
    content = content[: first + 1] if cut else content
    _, whole = decode(job(content, **box(0, 0, HEIGHT, WIDTH)), 1)
    _, corner = decode(job(content, **box(HEIGHT - 1, WIDTH - 1, 1, 1)), 1)
    assert whole[0] == corner[0]
    assert not cut or whole[0] != 0 or first >= content.size - 2
