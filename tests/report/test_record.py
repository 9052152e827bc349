import json
import math
from pathlib import Path

import pytest

from repvgg.files import replacing
from repvgg.report.record import read_history, read_record, write_record


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_record(
        tmp_path,
        status="finished",
        config={"choices": {"model": "repvgg_a0"}, "seed": 7, "betas": (0.9, 0.99), "dir": Path("x")},
        metrics={"val/top1": 0.5, "nan": math.nan, "up": math.inf, "down": -math.inf, "count": 3},
        objective=math.nan,
        error=None,
    )
    assert path == tmp_path / "result.json"

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    for record in (read_record(path), read_record(tmp_path)):
        assert (record.run_dir, record.status, record.error) == (tmp_path, "finished", None)
        assert record.config == {"choices": {"model": "repvgg_a0"}, "seed": 7, "betas": [0.9, 0.99], "dir": "x"}
        assert record.metrics["val/top1"] == 0.5
        assert math.isnan(record.metrics["nan"])
        assert (record.metrics["up"], record.metrics["down"]) == (math.inf, -math.inf)
        assert record.objective is not None
        assert math.isnan(record.objective)
        assert (record.choice("model"), record.choice("ablation")) == ("repvgg_a0", None)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result.json"
    with replacing(target) as file:
        file.write(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"), replacing(target) as file:
            file.write(b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_unknown_status_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of finished, failed, interrupted, .*not 'done'"):
        write_record(tmp_path, status="done", config={}, metrics={}, objective=None, error=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "finished"}', '{"metrics": 3}'])
def test_what_is_no_record_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is not the record of a run .* Run the job again"):
        read_record(tmp_path)


def test_history_is_one_row_per_measured_value(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/top1\n"
        "0,4,2.5,\n"
        "0,9,,0.25\n"
        "1,14,1.5,\n"
        "1,19,,0.5\n"
        "1,19,,0.75\n"  # resumed: the same step again
        ",20,1.25,\n"
        "2,29,,0.8"  # torn: perhaps 0.85
    )
    history = read_history(tmp_path)
    rows = [tuple(row) for row in history.astype(object).itertuples(index=False)]
    assert [*history.columns] == ["epoch", "step", "metric", "value"]
    assert rows[:4] == [
        (0, 4, "train/loss", 2.5),
        (0, 9, "val/top1", 0.25),
        (1, 14, "train/loss", 1.5),
        (1, 19, "val/top1", 0.75),
    ]
    assert rows[4][1:] == (20, "train/loss", 1.25)
    assert history["epoch"].isna().tolist() == [False] * 4 + [True]


def test_a_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no column `step`.*\['a', 'b'\]"):
        read_history(tmp_path)
