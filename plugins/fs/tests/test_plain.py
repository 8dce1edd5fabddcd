"""The layout `files`."""

from __future__ import annotations

import errno
import os

import attrs
import pytest

from tensorway.metrics import total
from tensorway_fs.disk import Disk
from tensorway_fs.options import FsOptions
from tensorway_fs.plain import FilesTier
from tensorway_fs.testing.blocks import CONTEXT, DEADLINE, block_of, key_of, read

MANY = range(0, 400, 8)


@pytest.fixture
def open_files(tmp_path):
    def make(disk=None, context=None, **options):
        given = FsOptions(folder=str(tmp_path), layout="files", **options)
        return FilesTier(given, attrs.evolve(CONTEXT, **(context or {})), disk)

    return make


def test_a_file_that_is_copied_is_a_block_that_is_there(open_files, put, tmp_path):
    one, other = open_files(), open_files()
    put(one, MANY)
    assert {"done"} == set(read(other, MANY).values())
    files = {path.name: path for path in tmp_path.rglob("*.kv")}
    assert len(MANY) == len(files)
    first = files[f"{key_of(0).hex()}.kv"]
    data = first.read_bytes()
    first.unlink()
    assert [False] == other.contains([key_of(0)], DEADLINE)
    first.write_bytes(data)
    assert ["done"] == list(read(other, [0]).values())


def test_a_block_under_another_s_name_is_not_read(open_files, put, tmp_path):
    tier = open_files()
    put(tier, MANY)
    files = {path.name: path for path in tmp_path.rglob("*.kv")}
    files[f"{key_of(8).hex()}.kv"].write_bytes(files[f"{key_of(0).hex()}.kv"].read_bytes())
    assert ["done", "corrupt"] == list(read(tier, MANY[:2]).values())
    assert ["done", "missing"] == list(read(tier, MANY[:2]).values())
    put(tier, MANY[:2])
    assert ["done", "done"] == list(read(tier, MANY[:2]).values())


def test_what_was_not_used_for_longest_goes_first(open_files, put, tmp_path):
    tier = open_files(max_bytes=1 << 18)
    put(tier, MANY[:20])
    for number, path in enumerate(sorted(tmp_path.rglob("*.kv"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (number, number))
    read(tier, MANY[:1])
    put(tier, range(8 * 100, 8 * 125, 8))
    assert total(tier.stats(), "offload_used_bytes") <= 1 << 18
    there = tier.contains([key_of(number) for number in MANY[:20]], DEADLINE)
    assert there[0] and not all(there)


def test_a_write_that_fails_leaves_nothing_behind(open_files, put, tmp_path):
    class Full(Disk):
        def pwritev(self, file, buffers, offset):
            raise OSError(28, "No space left on device")

    tier = open_files(Full())
    assert ["full"] == put(tier, [0])
    assert [] == [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in {"facts.json", "removed"} and path.stat().st_size
    ]
    assert ["done"] == put(open_files(), [0])
    assert block_of(0)


def test_who_cannot_say_that_a_block_was_used_reads_it_all_the_same(open_files, put):
    class Mounted(Disk):
        def touch(self, file):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    put(open_files(), MANY[:2])
    assert {"done"} == set(read(open_files(Mounted()), MANY[:2]).values())


def test_what_may_not_be_read_has_failed(open_files, put):
    class Forbidding(Disk):
        def preadv(self, file, buffers, offset):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    put(open_files(), MANY[:1])
    assert ["failed"] == list(read(open_files(Forbidding()), MANY[:1]).values())


def test_every_folder_on_the_way_to_a_block_is_on_the_disk_before_it_is_stored(open_files, put, tmp_path):
    made, synced = [], set()

    class Told(Disk):
        def mkdir(self, path):
            if not path.exists():
                made.append(path)
                synced.discard(path.parent)
            super().mkdir(path)

        def sync_folder(self, path):
            synced.add(path)
            super().sync_folder(path)

    tier = open_files(Told(), durability="strict")
    put(tier, MANY[:1])
    assert 5 == len(made) and {path.parent for path in made} <= synced
    synced.clear()
    put(tier, MANY[:1])  # which somebody else may have made who was killed then
    assert {path.parent for path in tmp_path.rglob("*.kv")} | {next(tmp_path.rglob("blocks"))} <= synced


def test_what_has_no_name_of_ours_is_not_tidied_away(open_files, put, tmp_path):
    tier = open_files()
    put(tier, [0])
    (fresh,) = tmp_path.rglob("new")
    for name in ("notes.txt", "a" * 32):
        (fresh / name).write_text("x")
        os.utime(fresh / name, (1, 1))
    tier._tidy()
    assert ["notes.txt"] == [path.name for path in fresh.iterdir()]
