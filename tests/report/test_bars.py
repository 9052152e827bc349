from pathlib import Path

import numpy as np
from PIL import Image

from repvgg.report.bars import Bar, write_bars


def test_bars_are_drawn_to_scale_and_ours_stands_out(tmp_path: Path) -> None:
    bars = [Bar("ours", 200, 190, 210, ours=True), Bar("theirs", 100, 95, 120)]
    write_bars({"one": bars, "two": bars[::-1]}, "images/s", tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    blue, grey = ((pixels == colour).all(1).sum() for colour in ((0x00, 0x72, 0xB2), (0xA3, 0xAD, 0xB8)))
    assert 1.7 < blue / grey < 2.3
