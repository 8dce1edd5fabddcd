"""Room: quotas, full disks, folders that may not be written to, and what is on the disk for certain."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tensorway.metrics import total
from tensorway_fs.disk import Disk
from tensorway_fs.testing.blocks import DEADLINE, aligned, block_of, key_of, read
from tensorway_fs.testing.crash import ended, forked

MANY = range(0, 8 * 2000, 8)
QUOTA = 1 << 20


class Failing(Disk):
    """Some calls fail as they are told to."""

    def __init__(self):
        self.calls, self.errors = [], {}

    def _pass(self, name, call, *arguments):
        self.calls.append(name)
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))
        return call(*arguments)

    def fallocate(self, file, nbytes):
        return self._pass("fallocate", super().fallocate, file, nbytes)

    def pwritev(self, file, buffers, offset):
        return self._pass("pwritev", super().pwritev, file, buffers, offset)

    def preadv(self, file, buffers, offset):
        return self._pass("preadv", super().preadv, file, buffers, offset)

    def fdatasync(self, file):
        return self._pass("fdatasync", super().fdatasync, file)

    def open(self, path, flags):
        return self._pass("create" if flags & os.O_CREAT else "open", super().open, path, flags)


def used(paths):
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_a_quota_is_kept_and_the_oldest_go(open_tier, put, segments):
    tier = open_tier(max_bytes=QUOTA)
    for number in MANY[:600]:
        assert ["done"] == put(tier, [number])
        assert used(segments()) <= QUOTA
    there = tier.contains([key_of(number) for number in MANY[:600]], DEADLINE)
    assert not any(there[:200]) and all(there[-100:])
    assert total(tier.stats(), "offload_used_bytes") <= QUOTA == total(tier.stats(), "offload_capacity_bytes")
    assert 600 - sum(there) == total(tier.stats(), "offload_removed_total", cause="evicted")


def test_what_was_read_stays_longer(open_tier, put):
    tier, hot = open_tier(max_bytes=QUOTA), list(MANY[:8])
    put(tier, hot)
    for at in range(8, 900, 4):
        put(tier, MANY[at : at + 4])
        found = read(tier, hot[:4])
        assert {"done"} == set(found.values()), at
    assert {"missing"} == set(read(tier, hot[4:]).values())


def test_another_fingerprint_is_another_store_under_the_same_quota(open_tier, put, segments):
    old, new = open_tier(max_bytes=QUOTA), open_tier(max_bytes=QUOTA, context={"fingerprint": b"other weights"})
    put(old, MANY[:100])
    old.close()
    assert {"missing"} == set(read(new, MANY[:100]).values())
    for number in MANY[:600]:
        assert ["done"] == put(new, [number])
    assert used(segments()) <= QUOTA
    assert {path.parent for path in segments()} == {new._namespace.path}, "what nobody uses went first"


def test_engines_that_run_keep_what_they_write(open_tier, put, segments):
    one, other = open_tier(max_bytes=QUOTA), open_tier(max_bytes=QUOTA)
    put(one, MANY[:2])
    for number in MANY[100:700]:
        assert ["done"] == put(other, [number])
    assert {"done"} == set(read(one, MANY[1:2]).values()), "the first was in a segment of one place"
    assert ["done"] == put(one, [MANY[3]])


def test_a_quota_is_not_passed_if_nothing_may_go(open_tier, put, segments):
    one, other = open_tier(max_bytes=150_000), open_tier(max_bytes=150_000, retry=0.0)
    assert {"done"} == set(put(one, MANY[:2]))
    assert ["full"] == put(other, [1]), "of 128 KiB, beside a segment that is being written"
    assert used(segments()) <= 150_000
    assert {"done"} == set(read(one, MANY[1:2]).values())


def test_a_disk_that_is_full_is_said_and_tried_again(open_tier, put):
    disk = Failing()
    tier = open_tier(disk, retry=3600.0)
    disk.errors["fallocate"] = errno.ENOSPC
    assert ["full"] == put(tier, [MANY[0]])
    disk.errors.clear()
    before = len(disk.calls)
    assert ["full"] == put(tier, [MANY[0]])
    assert before == len(disk.calls), "it is not tried with each block"
    assert {"missing"} == set(read(tier, [MANY[0]]).values())
    assert tier.probe(DEADLINE).usable
    assert ["done"] == put(tier, [MANY[0]])


def test_a_probe_of_a_full_disk_says_so(open_tier):
    disk = Failing()
    tier = open_tier(disk)
    disk.errors["fallocate"] = errno.ENOSPC
    result = tier.probe(DEADLINE)
    assert not result.usable and "room" in result.remedy


@pytest.mark.parametrize("call", ["pwritev", "create"])
def test_a_disk_that_fails_loses_nothing_that_was_there(open_tier, put, call):
    disk = Failing()
    tier = open_tier(disk, retry=0.0)
    put(tier, MANY[:3])
    disk.errors[call] = errno.EIO
    assert ["done", "failed"] == put(tier, [MANY[0], 3]), "of another length, so that a segment is made"
    disk.errors.clear()
    assert ["done", "done"] == put(tier, [MANY[0], 3])
    assert {"done"} == set(read(open_tier(), [*MANY[:3], 3]).values())


def test_a_block_that_cannot_be_read_is_corrupt_and_heals(open_tier, put):
    disk = Failing()
    tier = open_tier(disk)
    put(tier, MANY[:2])
    disk.errors["preadv"] = errno.EIO
    assert {"corrupt"} == set(read(tier, MANY[:2]).values())
    disk.errors.clear()
    assert {"missing"} == set(read(tier, MANY[:2]).values())
    put(tier, MANY[:2])
    assert {"done"} == set(read(tier, MANY[:2]).values())


def test_strict_says_done_when_it_is_on_the_disk(open_tier, put):
    disk = Failing()
    tier = open_tier(disk, durability="strict", retry=0.0)
    put(tier, [MANY[0]])
    disk.calls.clear()
    assert ["done"] * 3 == put(tier, MANY[1:4])
    assert "fdatasync" == disk.calls[-1] and "pwritev" in disk.calls
    disk.errors["fdatasync"] = errno.EIO
    assert ["failed"] == put(tier, [MANY[5]])
    disk.errors.clear()
    assert {"missing"} == set(read(tier, [MANY[5]]).values())


def test_strict_does_not_take_the_word_of_who_did_not_sync(open_tier, put):
    lax = open_tier()
    put(lax, MANY[:3])
    disk = Failing()
    strict = open_tier(disk, durability="strict")
    disk.errors["fdatasync"] = errno.EIO
    assert ["failed"] == put(strict, [MANY[0]])
    disk.errors.clear()
    disk.calls.clear()
    assert ["done"] * 2 == put(strict, MANY[:2])
    assert 1 == disk.calls.count("fdatasync")
    assert ["done"] == put(strict, [MANY[2]])
    assert 1 == disk.calls.count("fdatasync"), "once is enough"


@pytest.mark.parametrize("durability", ["none", "segment"])
def test_only_strict_waits_for_the_disk_with_each_call(open_tier, put, durability):
    disk = Failing()
    tier = open_tier(disk, durability=durability)
    put(tier, [MANY[0]])
    disk.calls.clear()
    put(tier, MANY[1:4])
    assert "fdatasync" not in disk.calls


def test_a_full_segment_is_on_the_disk_where_segments_are_to_be(open_tier, put, segments):
    disk = Failing()
    tier = open_tier(disk, durability="segment")
    put(tier, MANY[:1])
    disk.calls.clear()
    put(tier, MANY[1:40])
    assert len(segments()) > 1
    assert "fdatasync" in disk.calls


def test_buffers_that_a_disk_cannot_read_go_through_the_page_cache(open_tier):
    number = 1  # 128 KiB
    for lead in (0, 1, 64):
        tier = open_tier(direct=True)
        memory = aligned(bytes(lead) + block_of(number))
        into = aligned(bytes(lead + 131072))
        assert ["done"] == tier.put([(key_of(number), memory[lead:])], DEADLINE)
        assert ["done"] == tier.get([(key_of(number), into[lead:])], DEADLINE)
        assert into[lead:] == block_of(number)
        assert 1 == tier.delete([key_of(number)], DEADLINE)


def test_descriptors_are_bounded_whatever_is_stored(open_tier, put, segments):
    tier = open_tier(files=4, segment_bytes=64 << 10)
    put(tier, MANY[:500])
    assert len(segments()) > 30
    before = len(os.listdir("/proc/self/fd"))
    assert {"done"} == set(read(tier, MANY[:500]).values())
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_a_limit_of_the_process_is_a_full_disk(open_tier, put):
    def life():
        tier = open_tier(retry=0.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        assert ["full"] == put(tier, [1])
        assert {"missing"} == set(read(tier, [1]).values())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert ["done"] == put(tier, [1])

    assert not ended(forked(life))


def test_a_real_disk_that_fills_up(tmp_path):
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare, to have a small file system")
    command = ["unshare", "--mount", sys.executable, "-m", "tensorway_fs.testing.full", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("this container may not mount")
    assert 0 == done.returncode, done.stderr
    assert "blocks found no room" in done.stdout


def test_a_folder_that_may_only_be_read_is_read(open_tier, put):
    def life():
        os.setuid(65534)
        tier = open_tier(retry=0.0, folder=folder)
        assert {"done"} == set(read(tier, MANY[:2]).values())
        assert ["failed"] == put(tier, [MANY[5]])
        assert not tier.probe(DEADLINE).usable

    if os.geteuid():
        pytest.skip("needs root, to become nobody")
    with tempfile.TemporaryDirectory() as folder:  # nobody may not look into the tests' own
        put(open_tier(folder=folder), MANY[:2])
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(path.stat().st_mode | 0o555)
        assert not ended(forked(life))


def test_a_block_that_never_fits_removes_nothing(open_tier, put):
    tier = open_tier(max_bytes=QUOTA)
    put(tier, MANY[:50])
    assert ["full"] == tier.put([(key_of(MANY[50]), memoryview(bytes(2 * QUOTA)))], DEADLINE)
    assert {"done"} == set(read(open_tier(max_bytes=QUOTA), MANY[:50]).values())


def test_who_goes_on_with_a_segment_knows_that_its_name_is_on_the_disk(open_tier, put, tmp_path):
    synced = []

    class Told(Disk):
        def sync_folder(self, path):
            synced.append(path)
            super().sync_folder(path)

    tier, other = open_tier(Told(), durability="strict"), open_tier()
    put(other, MANY[:2])
    other.close()
    tier.contains([key_of(MANY[2])], DEADLINE)
    synced.clear()
    put(tier, MANY[2:3])
    assert 1 == len(list(tmp_path.rglob("*.seg"))) and [next(tmp_path.rglob("*.seg")).parent] == synced


def test_where_files_cannot_be_locked_blocks_are_stored_all_the_same(open_tier, put, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tensorway_fs.disk.fcntl.flock", flock)
    tier = open_tier()
    assert ["done"] == tier.put([(key_of(0), memoryview(block_of(0)))], 2.0)
    tier.close()
    assert ["done"] == list(read(open_tier(), [0]).values())
