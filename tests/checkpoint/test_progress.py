"""Bars of bytes for who watches a terminal, and silence for files."""

import io

import pytest

from neox.checkpoint.storage.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_bytes_are_shown_on_a_terminal_only(monkeypatch, stream, shown):
    watched = stream()
    monkeypatch.setattr("sys.stderr", watched)
    assert list(progress_bar(["b", "a"], {"a": 3_000_000, "b": 1_000_000, "c": 7}, "reading")) == ["b", "a"]
    written = watched.getvalue()
    assert ("reading" in written and "4.00M" in written) is shown
    assert bool(written) is shown
