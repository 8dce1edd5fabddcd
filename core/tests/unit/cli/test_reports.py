"""Files for what a command found: whole or not at all, never a folder, and a device stays one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorway.cli import reports
from tensorway.errors import OptionsInvalid


@pytest.mark.parametrize("name", [".", "no/such.json", "x" * 300, "file/below.json"])
def test_what_cannot_be_written_is_said_before_the_work_and_names_the_option(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionsInvalid) as caught:
        reports.writable(tmp_path / name, "--output")
    assert "--output FILE" in caught.value.to_do


def test_a_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "found.json"
    for text in ("one", "two"):
        reports.writable(path, "--output")
        reports.write(path, text, "--output")
        assert (text, [path]) == (path.read_text(), list(tmp_path.iterdir()))


def test_what_was_there_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    path.write_text("before")

    def full(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OptionsInvalid, match="No space left"):
        reports.write(path, "after", "--output")
    assert ("before", [path]) == (path.read_text(), list(tmp_path.iterdir()))


def test_a_device_is_written_to_and_not_replaced():
    reports.writable(Path(os.devnull), "--output")
    reports.write(Path(os.devnull), "x", "--output")
    assert Path(os.devnull).is_char_device()
