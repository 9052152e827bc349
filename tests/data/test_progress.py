import logging
import re

import pytest

from repvgg.data import progress as module


def test_without_a_terminal_there_is_a_line_per_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with module.progress("writing x", 1000, done=100) as advance:
        advance(50)
        assert not caplog.records
        monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
        advance(50)
        advance(800)
    lines = [record.message for record in caplog.records]
    assert [re.sub(r"\d+ images/s, \d+ min", "…", line) for line in lines] == [
        "writing x: 200 of 1000, … left",
        "writing x: 1000 of 1000, … left",
    ]
    assert lines[1].endswith(" 0 min left")
    assert capsys.readouterr().err == ""


def test_disabled_it_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with module.progress("writing x", 10, enabled=False) as advance:
        advance(10)
    assert not caplog.records
    assert capsys.readouterr().err == ""
