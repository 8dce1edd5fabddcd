"""Files for what a command found: whole or not at all, never a folder, and a device stays one."""

from __future__ import annotations

import os
import resource
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
    for text in (b"one", b"two"):
        reports.writable(path, "--output")
        reports.write(path, text, "--output")
        assert (text, [path]) == (path.read_bytes(), list(tmp_path.iterdir()))


@pytest.mark.parametrize("name", ["report.json", "full", "n" * 300])
def test_what_cannot_be_written_is_three_lines_and_nothing_is_left(tmp_path, name):
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "report.json").write_text("before")
    there, limits = set(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a disk that is full in the midst of it
    try:
        with pytest.raises(OptionsInvalid) as raised:
            reports.write(tmp_path / name, b"x" * 10_000, "--output")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"was to be written to {tmp_path / name}." in raised.value.asked and "--output" in raised.value.to_do
    assert there == set(tmp_path.iterdir()) and "before" == (tmp_path / "report.json").read_text()


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    reports.write(path, b"found", "--output")
    assert b"found" == os.read(read_fd, 100)
    os.close(read_fd)
    assert path.is_fifo()


def test_a_device_is_written_to_and_not_replaced():
    reports.writable(Path(os.devnull), "--output")
    reports.write(Path(os.devnull), b"x", "--output")
    assert Path(os.devnull).is_char_device()
