"""An interrupted writing continues, and ends with the very bytes of an uninterrupted one."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from repvgg.data.manifest import Manifest, manifest_path
from repvgg.data.partial import PartialBeton
from repvgg.data.sources import ImageFolder
from repvgg.data.verify import verify_beton
from repvgg.data.write import WriteError, WriteOptions, write_beton

pytestmark = pytest.mark.timeout(120)
SOURCE_ROOT = str(Path(__file__).parents[2] / "src")
OPTIONS = WriteOptions(short_side=60)


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial.journal")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.beton"
    write_beton(ImageFolder(folder), path, options=OPTIONS, progress=False)
    return path.read_bytes()


class Interrupted(ImageFolder):
    """Raises Ctrl-C's exception at the 70th image that is read."""

    reads = 0

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        Interrupted.reads += 1
        if Interrupted.reads == 70:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.fixture
def begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target of which 64 of 101 records (two chunks) are in the partial file."""
    monkeypatch.setattr(Interrupted, "reads", 0)
    monkeypatch.setattr(Interrupted, "chunk", 32)
    path = tmp_path / "x.beton"
    with pytest.raises(KeyboardInterrupt):
        write_beton(Interrupted(folder), path, options=OPTIONS, progress=False)
    assert not path.exists()
    assert len(journal_of(path).read_text().splitlines()) == 1 + 64
    return path


def resume(folder: Path, path: Path, options: WriteOptions = OPTIONS) -> Manifest:
    return write_beton(ImageFolder(folder), path, options=options, progress=False)


def test_an_interrupted_writing_continues(
    folder: Path, begun: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manifest = resume(folder, begun)
    assert "continuing after 64 of 101 images" in caplog.text
    assert begun.read_bytes() == whole
    assert verify_beton(begun, decode=True).path == begun, "the manifest's hash, too"
    assert manifest.samples == 101
    assert sorted(entry.name for entry in begun.parent.iterdir()) == [
        ".x.beton.checked",
        ".x.beton.lock",
        "x.beton",
        "x.beton.json",
    ]


def cut_line(path: Path) -> None:
    journal_of(path).write_bytes(journal_of(path).read_bytes()[:-7])


def line_without_data(path: Path) -> None:
    with partial_of(path).open("r+b") as file:
        file.truncate(partial_of(path).stat().st_size - 10)


def changed_data(path: Path) -> None:
    with partial_of(path).open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"changed")


def data_without_line(path: Path) -> None:
    with partial_of(path).open("ab") as file:
        file.write(b"half a record")


def garbled_line(path: Path) -> None:
    lines = journal_of(path).read_text().splitlines(keepends=True)
    lines[30] = "{nonsense\n"
    journal_of(path).write_text("".join(lines))


@pytest.mark.parametrize(
    ("damage", "left"),
    [(cut_line, 63), (line_without_data, 63), (changed_data, 63), (data_without_line, 64), (garbled_line, 29)],
)
def test_it_continues_after_the_last_whole_record(
    folder: Path,
    begun: Path,
    whole: bytes,
    damage: Callable[[Path], None],
    left: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    damage(begun)
    resume(folder, begun)
    assert f"continuing after {left} of 101" in caplog.text
    assert begun.read_bytes() == whole


def test_another_request_begins_anew_and_says_so(
    folder: Path, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = WriteOptions(short_side=60, jpeg_quality=70)
    resume(folder, begun, other)
    assert "was begun for jpeg_quality 90: beginning anew" in caplog.text
    (tmp_path / "fresh").mkdir()
    fresh = tmp_path / "fresh" / "x.beton"
    resume(folder, fresh, other)
    assert begun.read_bytes() == fresh.read_bytes()


def test_other_images_begin_anew(folder: Path, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    link = tmp_path / "fewer"
    link.mkdir()
    for entry in folder.iterdir():
        (link / entry.name).symlink_to(entry)
    source = ImageFolder(link)
    source.description = ImageFolder(folder).description
    source.labels[0] = 2
    write_beton(source, begun, options=OPTIONS, progress=False)
    assert "was begun for source_sha256" in caplog.text


def test_a_writing_stopped_before_its_last_step_is_finished(
    folder: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.beton"
    with monkeypatch.context() as patched:
        patched.setattr(PartialBeton, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resume(folder, path)
    resume(folder, path)
    assert path.read_bytes() == whole


def test_a_manifest_of_data_that_never_came_is_no_data(folder: Path, tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.beton"
    resume(folder, path)
    path.unlink()  # as after a crash between the last two steps
    assert manifest_path(path).is_file()
    resume(folder, path)
    assert path.read_bytes() == whole


def processes_below(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_the_middle_its_workers_end_and_the_same_call_continues(
    faulty_sources: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "x.beton"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from faulty_sources import Faulty\n"
        "if __name__ == '__main__':\n"
        "    import repvgg.data.partial; repvgg.data.partial.SYNC_RECORDS = 3\n"
        "    from repvgg.data.write import WriteOptions, write_beton\n"
        "    write_beton(Faulty(sys.argv[2]), sys.argv[1], options=WriteOptions(), num_workers=2, progress=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([SOURCE_ROOT, str(Path(__file__).parent)])}
    caller = subprocess.Popen([sys.executable, str(script), str(path), "slow"], env=environment)
    try:
        wait_for(lambda: journal_of(path).exists() and len(journal_of(path).read_bytes().splitlines()) > 8)
        workers = processes_below(caller.pid)
        assert len(workers) >= 2
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), seconds=20)
    assert not path.exists()
    left = len(journal_of(path).read_bytes().splitlines()) - 1
    assert 8 <= left < 40
    source = faulty_sources.Faulty("slow")
    write_beton(source, path, options=WriteOptions(), num_workers=0, progress=False)
    continued = path.read_bytes()
    path.unlink()
    write_beton(faulty_sources.Faulty("fine"), path, options=WriteOptions(), num_workers=0, progress=False)
    assert continued == path.read_bytes()


def test_records_left_out_are_remembered_until_stop_is_asked_for(faulty_sources: ModuleType, tmp_path: Path) -> None:
    class Stopped(faulty_sources.Faulty):  # type: ignore[misc, name-defined]
        reads = 0

        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            Stopped.reads += 1
            if Stopped.reads > 39:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    path = tmp_path / "x.beton"
    with pytest.raises(KeyboardInterrupt):
        write_beton(Stopped("cut"), path, options=WriteOptions(), progress=False, on_bad="skip")
    lines = [json.loads(line) for line in journal_of(path).read_text().splitlines()[1:]]
    (at,) = (number for number, line in enumerate(lines) if len(line) == 2)
    assert lines[at][0] == "square 23"
    source = faulty_sources.Faulty("cut")
    with pytest.raises(WriteError, match="square 23"):
        write_beton(source, path, options=WriteOptions(), progress=False)
    assert len(journal_of(path).read_text().splitlines()) == 1 + at
    assert len(write_beton(source, path, options=WriteOptions(), progress=False, on_bad="skip").skipped) == 1
