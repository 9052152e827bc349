"""One image to one record: what is stored as it is, what is encoded anew, what is refused."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repvgg.data.encode import Bad, Encoded, StoredAs, WriteOptions, decodes, encode
from repvgg.data.sources import ImageSource, Sample
from support.images import photo

PICTURE = photo(np.random.default_rng(0), (120, 90))


def jpeg(image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def record(content: bytes | Image.Image, **options: object) -> Encoded:
    outcome = encode(Sample("picture", 3, content), WriteOptions(**options), as_jpeg=True)  # type: ignore[arg-type]
    assert isinstance(outcome, Encoded), outcome
    assert outcome.label == 3
    assert Image.open(BytesIO(outcome.content)).size == (outcome.width, outcome.height)
    assert decodes(outcome.content, outcome.height, outcome.width)
    return outcome


def difference(content: bytes, image: Image.Image) -> float:
    pixels = np.asarray(Image.open(BytesIO(content)).convert("RGB"), dtype=float)
    return float(np.abs(pixels - np.asarray(image.convert("RGB"))).mean())


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_plain_jpeg_within_the_bounds_keeps_its_bytes(subsampling: str) -> None:
    content = jpeg(subsampling=subsampling, comment=b"kept too")
    stored = record(content, short_side=90, max_resolution=120)
    assert (stored.stored_as, stored.content) == (StoredAs.PASSED_THROUGH, content)


def test_what_follows_the_end_of_a_jpeg_is_cut_off() -> None:
    assert record(jpeg() + b"\0\0\0").content == jpeg()


@pytest.mark.parametrize(
    "content",
    [
        jpeg(progressive=True),
        jpeg(PICTURE.convert("L")),
        jpeg(PICTURE.convert("CMYK")),
        jpeg(keep_rgb=True),  # stored as RGB, not YCbCr
        jpeg().replace(b"\xff\xc0", b"\xff\xc1", 1),  # extended sequential
    ],
    ids=["progressive", "gray", "cmyk", "rgb", "extended"],
)
def test_other_jpegs_are_encoded_anew(content: bytes) -> None:
    stored = record(content)
    assert stored.stored_as == StoredAs.ENCODED
    assert stored.damaged is None
    with Image.open(BytesIO(stored.content)) as image:
        assert (image.mode, image.info.get("progressive")) == ("RGB", None)
    assert difference(stored.content, Image.open(BytesIO(content))) < 4


def test_a_png_under_a_jpegs_name_is_encoded() -> None:
    buffer = BytesIO()
    PICTURE.save(buffer, "PNG")
    stored = record(buffer.getvalue())
    assert stored.stored_as == StoredAs.ENCODED
    assert difference(stored.content, PICTURE) < 4


def test_without_pass_through_all_are_encoded() -> None:
    stored = record(jpeg(), pass_through=False, jpeg_quality=50)
    assert stored.stored_as == StoredAs.ENCODED
    assert len(stored.content) < len(jpeg())


def test_no_note_of_the_camera_survives_an_encoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    content = jpeg(exif=exif, comment=b"who took it")
    assert (record(content).width, record(content).height) == (120, 90)
    encoded = record(content, pass_through=False)
    assert (encoded.width, encoded.height) == (120, 90), "not turned, as torchvision reads it"
    assert b"who took it" not in encoded.content


def test_shrinking_equals_pils_antialiased_bicubic() -> None:
    content = jpeg()
    options = WriteOptions(write_mode="raw", short_side=60)
    outcome = encode(Sample("picture", 0, content), options, as_jpeg=False)
    assert isinstance(outcome, Encoded)
    expected = Image.open(BytesIO(content)).resize((80, 60), Image.Resampling.BICUBIC)
    assert (outcome.stored_as, outcome.width, outcome.height) == (StoredAs.RAW, 80, 60)
    assert outcome.content == expected.tobytes()


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.98])
def test_a_truncated_jpeg_is_bad(cut: float) -> None:
    content = jpeg()
    for options in (WriteOptions(), WriteOptions(pass_through=False)):
        outcome = encode(Sample("picture", 0, content[: int(cut * len(content))]), options, as_jpeg=True)
        assert isinstance(outcome, Bad)
        assert outcome.skippable
        assert "does not decode" in outcome.reason


def test_a_jpeg_that_only_pil_accepts_is_stored_and_named() -> None:
    """As some of ImageNet's: libjpeg warns of bytes that belong nowhere, all pixels are there."""
    content = jpeg()
    faulty = content[:-2] + bytes(40) + content[-2:]
    assert not decodes(faulty, 90, 120)
    stored = record(faulty)
    assert (stored.stored_as, stored.damaged) == (StoredAs.ENCODED, "picture")
    assert difference(stored.content, PICTURE) < 5


sides = st.integers(1, 4000)
bounds = st.none() | st.integers(1, 1000)


@given(width=sides, height=sides, short_side=bounds, max_resolution=bounds)
def test_stored_sizes_obey_the_bounds(
    width: int, height: int, short_side: int | None, max_resolution: int | None
) -> None:
    options = WriteOptions(short_side=short_side, max_resolution=max_resolution)
    size = options.stored_size(width, height)
    assert min(size) >= 1
    assert size[0] <= width
    assert size[1] <= height
    assert min(size) <= (short_side or 4000)
    assert max(size) <= (max_resolution or 4000)
    within = min(width, height) <= (short_side or 4000) and max(width, height) <= (max_resolution or 4000)
    if within:
        assert size == (width, height)
    else:
        at_a_bound = min(size) == short_side or max(size) == max_resolution
        assert at_a_bound, "not smaller than needed"
    exact = width * size[1] / height  # the aspect ratio, to half a pixel of either side
    assert abs(size[0] - exact) <= 0.5 + 0.5 * width / height + 1e-9 or min(size) == 1
    assert options.stored_size(height, width) == size[::-1]


def test_a_source_shuffles_by_default() -> None:
    class Numbers(ImageSource):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Sample:
            raise NotImplementedError

    order = Numbers().order(7)
    assert np.array_equal(np.sort(order), np.arange(100))
    assert np.array_equal(order, Numbers().order(7))
    assert not np.array_equal(order, Numbers().order(8))


def test_workers_start_without_torch_and_ffcv() -> None:
    code = (
        "import sys, repvgg.data.workers; from repvgg.data.encode import _imdecode; _imdecode()\n"
        "print({'torch', 'ffcv', 'numba'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
