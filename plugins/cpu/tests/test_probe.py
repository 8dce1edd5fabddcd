from __future__ import annotations

import mmap
import os

import pytest

from tensorway_cpu import probe as module
from tensorway_cpu.probe import memory_limit, probe


def test_it_passes_here_and_says_how_much_memory_there_is():
    result = probe()

    assert result.usable
    assert "of host memory, " in result.reason
    assert result.facts["available_bytes"] > 0
    assert result.facts["huge_page_bytes"] in (None, 2 << 20, 16 << 20, 32 << 20, 512 << 20)


def there():
    """What is in shared memory, but for names of engines that come and go beside this test."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("tensorway-cpu-")}


def test_shared_memory_is_tried_and_nothing_is_left_behind():
    before = there()

    result = probe()

    assert result.facts["shared"], "this machine has no usable /dev/shm"
    assert result.facts["shared_bytes"] > 0
    assert result.reason.endswith("MiB of shared memory in /dev/shm")
    assert before == there()


@pytest.mark.parametrize("place", ["missing", "file"])
def test_without_shared_memory_plain_memory_still_serves(monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "_SHARED", tmp_path / place)

    result = probe()

    assert result.usable
    assert result.reason.endswith(", no shared memory")
    assert (False, None) == (result.facts["shared"], result.facts["shared_bytes"])


def test_a_full_shared_memory_is_an_answer_and_not_a_crash(monkeypatch):
    # A page that was only promised is filled when it is touched, and on a full tmpfs that kills the process (SIGBUS).
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    assert not probe().facts["shared"]


def test_memory_that_cannot_be_mapped_is_told(monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    result = probe()

    assert not result.usable
    assert "no memory can be mapped ([Errno 12] Cannot allocate memory)" == result.reason
    assert "" != result.remedy


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"a/b": "max", "a": "max"}, None),
        ({"a/b": "4096", "a": "max"}, 4096),
        ({"a/b": "max", "a": "8192"}, 8192),
        ({"a/b": "9000", "a": "8192"}, 8192),
        ({}, None),
    ],
)
def test_the_lowest_limit_on_the_way_to_the_root_counts(tmp_path, limits, wanted):
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("12:cpu:/elsewhere\n0::/a/b\n")
    (tmp_path / "memory.max").write_text("1")  # above the root: not a group
    for group, text in limits.items():
        (tmp_path / "root" / group / "memory.max").write_text(f"{text}\n")

    assert wanted == memory_limit(tmp_path / "root", tmp_path / "own")


def test_a_system_without_cgroups_of_version_2_has_no_limit(tmp_path):
    (tmp_path / "own").write_text("4:memory:/docker/1\n")

    assert memory_limit(tmp_path, tmp_path / "own") is None
    assert memory_limit(tmp_path, tmp_path / "missing") is None


def test_a_limit_below_what_the_machine_has_is_what_is_reported(monkeypatch):
    monkeypatch.setattr(module, "memory_limit", lambda: 64 << 20)
    result = probe()

    assert result.reason.startswith("up to 64 MiB of host memory, ")
    assert 64 << 20 == result.facts["limit_bytes"] == result.facts["available_bytes"]
