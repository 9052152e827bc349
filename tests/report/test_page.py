import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from repvgg.report import charts, page, table
from repvgg.report.compare import Comparison, compare
from repvgg.report.record import RunRecord
from repvgg.report.runs import Run, read_runs

Make = Callable[..., RunRecord]


def make_all(make_run: Make) -> None:
    for seed, (full, plain) in enumerate([(0.75, 0.70), (0.76, 0.72), (0.74, 0.69)], start=1):
        for ablation, top1 in (("full", full), ("plain", plain)):
            speed = 200.0 if ablation == "full" else 300.0
            make_run(
                f"{ablation}-{seed}",
                ablation,
                seed=seed,
                metrics={
                    **{"test/top1": top1, "test/deploy/top1": top1, "bench/speedup": 600 / speed},
                    **{"bench/train_form/images_per_s": speed, "bench/deploy/images_per_s": 600.0},
                },
            )
    make_run("0_id|<b>", "id", seed=1, status="failed", metrics={}, error="RuntimeError: <script>*no* | `good`\nat all")


@pytest.fixture
def comparison(make_run: Make, tmp_path: Path) -> Comparison:
    make_all(make_run)
    return compare(read_runs([str(tmp_path)])[0])


class Reader(HTMLParser):
    """Tables as rows of cells, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        self.fetched += [str(value) for name, value in attrs if name in ("src", "srcset", "data", "style") and value]
        if tag == "link":
            self.fetched.append("link")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")


def test_a_page_made_twice_is_the_same_byte_for_byte(comparison: Comparison, tmp_path: Path) -> None:
    first, second = tmp_path / "out" / "first", tmp_path / "out" / "second"
    for out in (first, second):
        page.write_page(comparison, out)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert [f.as_posix() for f in files] == [
        *("data.csv", "groups.csv"),
        *(f"pictures/{name}.{kind}" for name in ("curves", "losses", "speed", "top1") for kind in ("png", "svg")),
        *("report.html", "report.md"),
    ]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    with Image.open(first / "pictures" / "top1.png") as image:
        assert image.width == 1100


def test_the_html_page_asks_for_nothing_and_holds_no_ones_html(comparison: Comparison, tmp_path: Path) -> None:
    page.write_page(comparison, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    reader = Reader(text)
    assert {"script", "b", "iframe", "link"}.isdisjoint(reader.tags)
    images = [source for source in reader.fetched if source.startswith("data:")]
    assert len(images) == 4
    assert all(s.startswith(("data:image/svg+xml;base64,", "text-align")) for s in reader.fetched)
    assert not re.search(r"url\(|@import", page.CSS)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('<div class="scroll"><table>') == len(reader.tables) == 4
    failed = reader.tables[-1][1]
    assert failed[:2] == ["0_id|<b>", "failed"]
    assert failed[-1] == "RuntimeError: <script>*no* | `good` at all"


def test_the_tables_hold_the_numbers(comparison: Comparison, tmp_path: Path) -> None:
    page.write_page(comparison, tmp_path / "out")
    accuracy, forms, speed, _ = Reader((tmp_path / "out" / "report.html").read_text()).tables
    plain = dict(zip(accuracy[0], accuracy[2], strict=True))
    assert plain == {
        "ablation": "plain",
        "n": "3",
        "top-1 train form [%]": "70.33 ± 1.53",
        "top-1 deploy [%]": "70.33 ± 1.53",
        "− full [pp]": "-4.67",
        "95% interval": "-6.10 … -3.23",  # scipy.stats.ttest_rel([70, 72, 69], [75, 76, 74])
        "pairs": "3",
        "p": "0.005",
        "paper − full [pp]": "-2.75",
    }
    assert accuracy[1][:2] == ["full", "3"]
    assert forms[0] == ["ablation", "deploy − train form [pp]"]
    speeds = dict(zip(speed[0], speed[2], strict=True))
    assert speeds["train form [images/s]"] == "300 ± 0.0"
    assert speeds["speed-up [×]"] == "2.00 ± 0.00"
    assert (speeds["train form speed, × full"], speeds["paper"]) == ("1.50", f"{1810 / 1061:.2f}")


def test_the_csv_files_hold_every_run_and_all_digits(comparison: Comparison, tmp_path: Path) -> None:
    page.write_page(comparison, tmp_path / "out")
    runs = list(csv.DictReader(io.StringIO((tmp_path / "out" / "data.csv").read_text())))
    assert len(runs) == 7
    assert {r["group"] for r in runs} == {"full", "plain", ""}
    (failed,) = [r for r in runs if r["status"] == "failed"]
    assert failed["left out because"].startswith("RuntimeError: <script>")
    groups = list(csv.DictReader(io.StringIO((tmp_path / "out" / "groups.csv").read_text())))
    assert float(groups[1]["top-1 deploy [%]"]) == pytest.approx(211 / 3)
    assert float(groups[1]["difference to full [pp]"]) == pytest.approx(-14 / 3)
    assert groups[0]["p"] == ""


def test_the_words_say_what_the_numbers_allow(comparison: Comparison) -> None:
    text = page.markdown(comparison, {})
    assert "leaves out 0 for 1 of 1: plain (-4.67 pp)." in text
    assert "Both forms score the same in all 6 runs." in text
    assert "6 finished runs, seeds 1–3; 1 run in no mean" in text
    assert "do not stand beside runs that depart from that: data digits (there imagenet), recipe quick (there" in text
    assert "report.md" not in text
    assert "data.csv" not in text, "where there are no files none are named"


def test_what_is_of_others_stays(comparison: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\): name a directory of the page's own"):
        page.write_page(comparison, out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        page.require_own(out / "thesis.tex")


def test_an_older_page_is_replaced_whole(comparison: Comparison, make_run: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    page.write_page(comparison, out)
    only = make_run("alone/x", metrics={"test/top1": 0.5, "test/deploy/top1": 0.5}, curve=()).run_dir
    page.write_page(compare(read_runs([str(only)])[0]), out)
    assert sorted(p.name for p in (out / "pictures").iterdir()) == []
    text = (out / "report.md").read_text()
    assert "No run measured the speed of its forms." in text
    assert "paper |" not in text, "a ratio of the paper's with none of ours beside it"


def with_overrides(*overrides: str) -> Any:
    return Run(run_dir=Path(), status="finished", overrides=overrides)


def test_commands_gather_seeds_and_ablations() -> None:
    sweep = [
        with_overrides(f"ablation={a}", "+experiment=[table6,on_digits]", f"seed={s}")
        for a in ("full", "id")
        for s in (1, 2)
    ]
    alone = with_overrides("recipe.lr=0.1", "ablation=full")
    more = with_overrides("ablation=plain", "+experiment=[table6,on_digits]", "seed=3")
    unknown = Run(run_dir=Path(), status="finished")
    lines, missing = page.commands([*sweep, alone, more, unknown])
    assert lines == [
        "python src/train.py -m '+experiment=[table6,on_digits]' ablation=full,id seed=1,2",
        "python src/train.py recipe.lr=0.1 ablation=full",
        "python src/train.py '+experiment=[table6,on_digits]' ablation=plain seed=3",
    ]
    assert missing == 1


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([1, 2], "1, 2"), ([0, 1, 2, 5, 7, 8, 9], "0–2, 5, 7–9")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert page._ranges(numbers) == text


def test_settings_that_a_choice_was_given_are_said(make_run: Make, tmp_path: Path) -> None:
    for seed, width in ((1, 1), (2, 0.25)):
        config = {"net": {"width_a": width}, "recipe": {"lr": 0.05, "batch_size": 64}, "trainer": {"max_epochs": None}}
        make_run(seed, seed=seed, config=config)
    said = page.facts(compare(read_runs([str(tmp_path)])[0]))
    assert "Settings: a = 0.25, batch 64, lr 0.05 (1 run); a = 1, batch 64, lr 0.05 (1 run)" in said


def test_int8_stands_beside_the_other_forms(make_run: Make, tmp_path: Path) -> None:
    for ablation, seed, int8 in (("full", 1, 0.5), ("full", 2, 0.25), ("qarepvgg", 1, 0.75), ("qarepvgg", 2, 0.75)):
        forms = {"test/top1": 0.75, "test/deploy/top1": 0.75, "test/int8/top1": int8, "int8/rel_l2_diff": 0.5}
        papers = {"model": "repvgg_a0", "data": "imagenet", "recipe": "paper_120"}
        make_run(f"{ablation}-{seed}", ablation, seed=seed, metrics=forms, **papers)
    compared = compare(read_runs([str(tmp_path)])[0])
    text = page.markdown(compared, {})
    assert "int8 changes the deploy form's top-1, in the mean: full -37.50 pp, qarepvgg +0.00 pp." in text
    header, _, full, qarepvgg = page.tables(compared)["forms"].splitlines()
    assert "| top-1 int8 [%] | int8 − deploy [pp] | int8 logits rel. L2 difference |" in header
    assert "| 37.50 ± 17.68 | -37.50 ± 17.68 | 5.0e-01 |" in full
    assert "| 75.00 ± 0.00 | +0.00 ± 0.00 | 5.0e-01 |" in qarepvgg
    assert table.PAPER_INT8 not in header  # which Table 6 does not have
    header, _, full, qarepvgg = page.tables(compare(read_runs([str(tmp_path)])[0], paper="int8"))["forms"].splitlines()
    assert f"| int8 logits rel. L2 difference | {table.PAPER_INT8} |" in header
    assert "| 5.0e-01 | 52.20 |" in full
    assert "| 5.0e-01 | 70.40 |" in qarepvgg


def test_one_run_is_described_as_one(make_run: Make, tmp_path: Path) -> None:
    rows = ["epoch,step,train/loss,val/loss,val/deploy/loss,val/top1,val/deploy/top1"]
    rows += [f"{epoch},{9 + epoch},,{1 - epoch / 10},{1 - epoch / 10},0.5,0.5" for epoch in range(3)]
    rows += [f"{epoch},{8 + epoch},{2 - epoch / 10},,,," for epoch in range(3)]
    shares = {f"health/share/stage{i}/{kind}": 0.5 for i in (1, 2) for kind in ("conv3x3", "identity")}
    config = {"net": {"width_a": 0.25}}
    run = make_run("a", seed=3, config=config)
    run = make_run("b", seed=3, config=config, metrics={**run.metrics, **shares})
    (run.run_dir / "metrics.csv").write_text("\n".join(rows) + "\n")
    compared = compare(read_runs([str(run.run_dir)])[0])
    page.write_page(compared, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith(
        "# A run of repvgg_b0 on digits\n\n- One finished run, `b`, seed 3\n- Choices: model repvgg_b0,"
    )
    assert "- Top-1: 95.25 % as trained, 95.50 % deployed." in text
    assert "net.width_a 0.25 (there 1)" in text
    for empty in ("reference", "group ", "other groups", "± is", "pairs", "deviation", "72.", "75.14", "Pareto"):
        assert empty not in text, empty
    assert "| ablation | n | top-1 train form [%] | top-1 deploy [%] |\n" in text
    drawn = charts.charts(compared)
    assert [*drawn] == ["speed", "curves", "losses", "branches"]
    legends = {
        name: [words.get_text() for legend in figure.legends for words in legend.get_texts()]
        for name, (figure, _) in drawn.items()
    }
    assert legends == {
        "speed": ["train form", "deploy form"],
        "curves": ["deploy form", "train form"],
        "losses": ["deploy form", "train form", "training images"],
        "branches": ["conv3x3", "identity"],
    }
    training, _, deploy = drawn["losses"][0].axes[0].lines
    assert list(training.get_ydata()) == pytest.approx([2.0, 1.9, 1.8])
    assert list(deploy.get_ydata()) == pytest.approx([1.0, 0.9, 0.8])


def test_a_speed_up_within_the_spread_of_its_measurement_is_said(make_run: Make, tmp_path: Path) -> None:
    speeds = {"bench/train_form/images_per_s": 100.0, "bench/deploy/images_per_s": 95.0, "bench/speedup": 0.95}
    top1 = {"test/top1": 0.5, "test/deploy/top1": 0.5}
    for seed, spread in ((1, 0.04), (2, 0.25)):
        make_run(f"seed-{seed}", seed=seed, metrics={**top1, **speeds, "bench/spread": spread})
    compared = compare(read_runs([str(tmp_path)])[0])
    said = [line for line in page.reading(compared) if "spread" in line]
    assert said == [
        "Of 1 run the speed-up lies within the spread of its own measurement, and says nothing: seed-2. Something else "
        "used the machine, or both forms are as fast."
    ]
    header, _, row = page.tables(compared)["speed"].splitlines()
    assert header.endswith(f"| {table.SPREAD} |")
    assert row.endswith("| 0.95 ± 0.00 | 14 |")


def test_cells_of_the_html_page_may_break() -> None:
    """At 1200 px no table is wider than the page."""
    assert "nowrap" not in page.CSS
