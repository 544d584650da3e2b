"""A progress bar in a log: whole lines, a few of them, and none where none is wanted."""

import io

import pytest

from data_prep.progress import INTERVAL_VARIABLE, progress_bar, with_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, steps: int) -> str:
    """What a bar of so many steps prints."""
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar("train", steps, unit="step") as bar:
        for _ in range(steps):
            bar.update()
    return stream.getvalue()


@pytest.fixture(autouse=True)
def usual_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests are started with."""
    monkeypatch.delenv(INTERVAL_VARIABLE, raising=False)


def test_a_log_gets_whole_lines_and_not_one_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: on a terminal the line is drawn over itself."""
    log = drawn(monkeypatch, io.StringIO(), 1000)
    assert "\r" not in log and log.endswith("\n")
    first, *_, last = lines = log.splitlines()
    assert len(lines) <= 3 and first.startswith("train:   0%|") and "1000/1000" in last
    assert "\r" in drawn(monkeypatch, Terminal(), 1000)


def test_whoever_reads_along_gets_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "0")
    assert len(drawn(monkeypatch, io.StringIO(), 50).splitlines()) > 20


def test_items_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    assert list(with_progress(["a", "b"], "files")) == ["a", "b"]
    assert "files: 100%|" in stream.getvalue() and "2/2" in stream.getvalue()


def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    with progress_bar("quick", 1, unit="step", delay_seconds=60.0, leave=False) as bar:
        bar.update()
    with progress_bar("hidden", 1, unit="step", shown=False) as bar:
        bar.update()
    assert stream.getvalue() == ""
