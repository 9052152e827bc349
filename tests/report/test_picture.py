from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg.report import picture
from repvgg.report.record import RunRecord
from repvgg.report.table import load_paper

Make = Callable[..., RunRecord]


def test_the_picture_shows_the_runs_numbers(make_run: Make) -> None:
    records = [make_run(i, name, curve=(0.25, 0.5 + i / 10)) for i, name in enumerate(("plain", "id", "1x1", "full"))]
    curves, speed, accuracy, paper = picture.draw(records, load_paper()).axes
    assert [line.get_label() for line in curves.lines] == ["plain", "id", "1x1", "full"]
    assert [list(line.get_xdata()) for line in curves.lines] == [[1, 2]] * 4
    assert [line.get_ydata()[-1] for line in curves.lines] == pytest.approx([50, 60, 70, 80])
    assert len({line.get_color() for line in curves.lines}) == 4
    assert [bar.get_width() for bar in speed.patches] == [300] * 4 + [630] * 4
    assert [text.get_text() for text in speed.texts] == ["×2.10"] * 4
    assert [text.get_text() for text in speed.get_yticklabels()] == ["plain", "id", "1x1", "full"]
    assert [text.get_text() for text in accuracy.texts] == ["95.50"] * 4
    assert accuracy.get_xlim()[1] - accuracy.get_xlim()[0] >= 2
    assert [text.get_text() for text in paper.texts] == ["72.39", "74.79", "73.15", "75.14"]
    assert "ImageNet" in paper.get_xlabel()


def test_a_failed_run_keeps_its_row_and_no_paper_means_no_panel(make_run: Make) -> None:
    records = [make_run(0, "mine"), make_run(1, "other", status="failed", metrics={}, curve=())]
    (records[1].run_dir / "metrics.csv").unlink()
    figure = picture.draw(records, load_paper())
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["mine", "other\n(failed)"]


def test_runs_without_any_number_still_make_a_picture(make_run: Make) -> None:
    figure = picture.draw([make_run(0, metrics={}, status="interrupted", curve=())], load_paper())
    said = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"no run logged val/deploy/top1", "no throughput measured", "no top-1 measured"} <= said


@pytest.mark.parametrize("runs", [1, 12])
def test_the_file_is_a_png_with_something_on_it(make_run: Make, tmp_path: Path, runs: int) -> None:
    ablations = ("plain", "id", "1x1", "full")
    records = [make_run(i, ablations[i % 4], seed=i // 4) for i in range(runs)]
    out = tmp_path / "out"
    out.mkdir()
    path = picture.write_picture(records, load_paper(), out / "summary.png")
    assert [p.name for p in out.iterdir()] == ["summary.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 1500
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == np.array([0, 0x72, 0xB2])).all(axis=-1).sum() > 1000, "the bars of the deploy form"
    assert 0.5 < (pixels == 255).all(axis=-1).mean() < 0.99
