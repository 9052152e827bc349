"""Damage to the data files is found before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from repvgg.data import verify
from repvgg.data.verify import CorruptDatasetError, note_path, read_records
from support.training import classifier, datamodule, trainer


@pytest.fixture
def damaged(digits: Path, tmp_path: Path) -> Path:
    """Digits of which a training and a validation image do not decode; both files have been sound once."""
    for split in ("train", "val"):
        shutil.copy(digits / f"{split}.beton.json", tmp_path)
        path = Path(shutil.copy(digits / f"{split}.beton", tmp_path))
        records = read_records(path)
        with path.open("r+b") as file:
            file.seek(int(records.images["data_ptr"][300]) + 2)
            file.write(bytes(int(records.sizes[300]) - 4))
    return tmp_path


@pytest.mark.parametrize("check", ["sample", "full"])
def test_a_training_does_not_begin_with_a_file_that_is_damaged(damaged: Path, check: Any) -> None:
    data = datamodule(damaged, check=check)
    runner = trainer(damaged, [])
    with pytest.raises(CorruptDatasetError, match=r"train\.beton: record 300 does not decode"):
        runner.fit(classifier(), datamodule=data)
    assert runner.global_step == 0


def test_the_validation_file_is_looked_at_too(damaged: Path, digits: Path) -> None:
    shutil.copy(digits / "train.beton", damaged)
    with pytest.raises(CorruptDatasetError, match=r"val\.beton: record 300"):
        datamodule(damaged).prepare_data()


def test_without_a_look_the_damage_is_met_in_the_middle(damaged: Path) -> None:
    runner = trainer(damaged, [], limit_train_batches=1.0)
    data = datamodule(damaged, check="tables", batch_size=16)
    with pytest.raises(CorruptDatasetError, match=r"train\.beton: record 300 does not decode"):
        runner.fit(classifier(batch_size=16), datamodule=data)
    assert runner.global_step > 0


def test_a_file_is_looked_at_once_a_run(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr("repvgg.learn.datamodule.check_beton", lambda path, *_, **__: looked_at.append(path.name))
    data = datamodule(digits)
    data.prepare_data()
    data.prepare_data()  # as Lightning does before the test
    assert looked_at == ["train.beton", "val.beton"]


def test_one_file_for_both_is_looked_at_once(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr("repvgg.learn.datamodule.check_beton", lambda path, *_, **__: looked_at.append(path.name))
    data = datamodule(digits)
    data.files["train"] = data.files["val"]
    data.prepare_data()
    assert looked_at == ["val.beton"]


def test_an_unknown_check_is_refused_at_once(digits: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.check must be one of sample, full, tables, got 'some'"):
        datamodule(digits, check="some")


def test_the_next_training_relies_on_this_one(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in [*digits.glob("*.beton"), *digits.glob("*.beton.json")]:
        shutil.copy(file, tmp_path)
    datamodule(tmp_path).prepare_data()
    assert {note_path(tmp_path / f"{split}.beton").is_file() for split in ("train", "val")} == {True}
    monkeypatch.setattr(verify, "_decode", lambda *_: pytest.fail("decoded again"))
    datamodule(tmp_path).prepare_data()
