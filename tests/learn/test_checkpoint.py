"""Checkpoints on disks that fail, in files that are torn, and of other networks."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg.learn.checkpoint import (
    AtomicCheckpointIO,
    Checkpoints,
    damage,
    newest_whole,
    remove_leftovers,
    require_continuable,
    require_same_classes,
)
from support.networks import tiny
from support.training import classifier, datamodule, trainer

CHOICES = {"model": "repvgg_b0", "ablation": "full"}


@pytest.fixture
def limited() -> object:
    """Files of at most 100 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(path: Path, size: int = 10_000) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save({"weights": torch.arange(size)}, path)
    return path


def test_a_full_disk_costs_the_checkpoint_not_the_run(
    limited: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.zeros(10)}, tmp_path / "last.ckpt")
    assert io.error is None
    before = (tmp_path / "last.ckpt").read_bytes()
    io.save_checkpoint({"weights": torch.zeros(1_000_000)}, tmp_path / "last.ckpt")
    assert isinstance(io.error, OSError)
    assert "last.ckpt was not written: File too large. Training goes on" in caplog.text
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_another_error_of_the_writer_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"weights": lambda: 0}, tmp_path / "last.ckpt")


def test_training_goes_on_while_the_disk_is_full(digits: Path, tmp_path: Path) -> None:
    """The best is not forgotten either: it is written at the next validation that is better than the best written."""
    directory = tmp_path / "checkpoints"
    keeper = Checkpoints(str(directory), monitor="val/top1")
    run = trainer(tmp_path, [keeper], max_epochs=2, enable_checkpointing=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    module = classifier()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        run.fit(module, datamodule=datamodule(digits))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.current_epoch == 2
    assert keeper.best == {}
    assert list(directory.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0.01, 0.99), flip=st.booleans())
def test_what_is_torn_or_changed_is_noticed_and_the_one_before_is_used(
    cut: float, flip: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("c")
    previous, last = write(directory / "previous.ckpt"), write(directory / "last.ckpt")
    content = bytearray(last.read_bytes())
    start, end = (content.find(number.to_bytes(8, "little")) for number in (1, 9_999))
    if flip:  # anywhere in the tensor's bytes
        content[start + int(cut * (end - start))] ^= 0x10
    else:
        del content[int(cut * len(content)) :]
    last.write_bytes(content)
    assert damage(last) is not None
    assert damage(previous) is None
    assert newest_whole(directory) == previous


def test_the_damaged_one_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "previous.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert newest_whole(tmp_path) == tmp_path / "previous.ckpt"
    assert f"{tmp_path / 'last.ckpt'} is damaged" in caplog.text
    (tmp_path / "previous.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"all checkpoints of .* are damaged: last.ckpt, previous.ckpt. Delete them"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "none") is None


def test_a_kill_between_two_renames_leaves_the_newest(tmp_path: Path) -> None:
    """last.ckpt has become previous.ckpt, next.ckpt is not yet last.ckpt."""
    write(tmp_path / "previous.ckpt")
    assert newest_whole(tmp_path) == tmp_path / "previous.ckpt"
    write(tmp_path / "next.ckpt")
    assert newest_whole(tmp_path) == tmp_path / "next.ckpt"


def test_what_killed_writers_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".next.ckpt.{dead.pid}.tmp").touch()
    alive = tmp_path / ".next.ckpt.1.tmp"
    alive.touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [alive]


def test_the_checkpoint_of_another_network_is_refused(digits: Path, tmp_path: Path) -> None:
    keeper = Checkpoints(str(tmp_path), monitor="val/top1")
    keeper.run["choices"] = CHOICES
    run = trainer(tmp_path, [keeper], enable_checkpointing=True)
    module = classifier()
    run.fit(module, datamodule=datamodule(digits))
    last = tmp_path / "last.ckpt"
    check = partial(require_continuable, batch_size=64, epochs=9)
    check(last, CHOICES, module)
    numbers = [str(number) for number in range(10)]
    for classes in (numbers, None):
        require_same_classes(last, classes, "val.beton")
    with pytest.raises(
        ValueError, match=r"than val\.beton: only the checkpoint has 0; only the data has ten\..*init_from="
    ):
        require_same_classes(last, [*numbers[1:], "ten"], "val.beton")
    with pytest.raises(ValueError, match=r"is of a run with ablation=full, not ablation=id: add ablation=full to"):
        check(last, {**CHOICES, "ablation": "id"}, module)
    other = classifier(tiny(num_classes=7, strides=(1, 2, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"of another network: 2 tensors differ, .* \(10,\) there and \(7,\) here"):
        check(last, CHOICES, other)
    with pytest.raises(ValueError, match="there is no file"):
        check(tmp_path / "none.ckpt", CHOICES, module)
    weights = tmp_path / "weights.pth"
    torch.save(module.net.state_dict(), weights)
    with pytest.raises(ValueError, match=f"no training to go on with: init_from={weights} begins one"):
        check(weights, CHOICES, module)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        check(weights, CHOICES, module)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_it_was_replaced_by(digits: Path, tmp_path: Path) -> None:
    """A start goes on from previous.ckpt; killed after its first checkpoint, two good ones must be there."""
    run = trainer(tmp_path, [Checkpoints(str(tmp_path), monitor="val/top1")], enable_checkpointing=True)
    run.fit(classifier(), datamodule=datamodule(digits))
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    good = previous.read_bytes()
    last.write_bytes(last.read_bytes()[:1000])
    later = Checkpoints(str(tmp_path), monitor="val/top1")
    later.save_last(run)
    assert damage(last) is None
    assert previous.read_bytes() == good
    newest = last.read_bytes()
    later.save_last(run)
    assert previous.read_bytes() == newest


def test_the_best_of_another_run_is_not_this_ones(tmp_path: Path) -> None:
    keeper = Checkpoints(str(tmp_path))
    keeper.load_state_dict({"best": {"score": 0.9, "epoch": 3}})
    assert keeper.best == {}
    write(tmp_path / "best.ckpt")
    keeper.load_state_dict({"best": {"score": 0.9, "epoch": 3}})
    assert keeper.best == {"score": 0.9, "epoch": 3}


def test_a_metric_that_is_not_logged_is_named(digits: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, [Checkpoints(str(tmp_path), monitor="val/top9")], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"monitor=val/top9 is not logged; choose from val/loss, val/top1"):
        run.fit(classifier(), datamodule=datamodule(digits))


def test_the_deploy_forms_metric_needs_the_deploy_form(digits: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, [Checkpoints(str(tmp_path))], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"logged by callbacks.two_forms, which is off: add callbacks.checkpoints.mon"):
        run.fit(classifier(), datamodule=datamodule(digits))


KILLED_WHILE_WRITING = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from repvgg.learn.checkpoint import AtomicCheckpointIO

path, after = Path(sys.argv[1]), float(sys.argv[2])
io = AtomicCheckpointIO()
threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
number = 1
while True:
    io.save_checkpoint({"number": number, "weights": torch.full((500_000,), number)}, path)
    number += 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.1, 0.25, 0.4, 0.7])
def test_a_kill_in_the_middle_of_writing_leaves_a_whole_checkpoint(after: float, tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED_WHILE_WRITING))
    done = subprocess.run([sys.executable, str(script), str(path), str(after)], check=False, timeout=60)
    assert done.returncode == -9
    assert damage(path) is None
    content = torch.load(path, weights_only=True)
    assert content["weights"].unique().numel() == 1 or "number" not in content
    remove_leftovers(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "script.py"]
