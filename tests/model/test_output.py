"""Files are replaced whole or not at all, and tables have as many cells as headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.evaluation.markdown import table
from model.output import write_atomically


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "file.json"
    for content in ("α\n", b"\x00\xff", memoryview(b"view")):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def no_space(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_has_a_cell_for_each_header():
    assert table(("a", "b"), [(1, None), ("x", 2.5)]) == "| a | b |\n|---|---|\n| 1 |  |\n| x | 2.5 |"
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        table(("a", "b"), [("x",)])
