"""Processes and threads on one folder."""

from __future__ import annotations

import os
import threading

import pytest

from tensorway.errors import Closed
from tensorway.offload import OfTenant, key_tenant
from tensorway_fs.disk import Disk
from tensorway_fs.records import PAGE
from tensorway_fs.testing.blocks import DEADLINE, aligned, block_of, key_of, read
from tensorway_fs.testing.crash import ended, forked

MANY = range(0, 800, 8)  # all of one page


def test_what_one_stores_another_finds_and_neither_writes_to_the_others_segment(open_tier, put, segments):
    one, other = open_tier(), open_tier()
    put(one, MANY[:3])
    put(other, MANY[3:6])
    assert {"done"} == set(read(other, MANY[:6]).values()) == set(read(one, MANY[:6]).values())
    assert 2 == len(segments())


def test_who_comes_later_goes_on_where_one_ended(open_tier, put, segments):
    for part in (MANY[:3], MANY[3:6], MANY[6:9]):
        tier = open_tier()
        put(tier, part)
        tier.close()
    assert 1 == len(segments())
    assert {"done"} == set(read(open_tier(), MANY[:9]).values())


def test_a_segment_of_a_killed_process_is_gone_on_with(open_tier, put, segments, tmp_path):
    def life():
        put(open_tier(), MANY[:5])
        os.kill(os.getpid(), 9)

    assert ended(forked(life))
    tier = open_tier()
    put(tier, MANY[5:8])
    assert 1 == len(segments())
    assert {"done"} == set(read(tier, MANY[:8]).values())


def test_what_one_deletes_another_does_not_say_to_have(open_tier, put):
    one, other = open_tier(), open_tier()
    put(one, MANY)
    keys = [key_of(number) for number in MANY]
    assert all(other.contains(keys, DEADLINE))
    assert 10 == one.delete(keys[:10], DEADLINE)
    assert [False] * 10 + [True] * 90 == other.contains(keys, DEADLINE)
    assert {"missing"} == set(read(other, MANY[:10]).values())
    put(other, MANY[:10])
    assert {"done"} == set(read(one, MANY).values())


def test_who_is_not_told_of_a_deletion_reads_no_block(open_tier, put):
    one, other = open_tier(), open_tier(refresh=3600.0)
    put(one, MANY[:4])
    other._refresh(1e9, force=True)
    one.delete([key_of(MANY[0])], DEADLINE)
    assert ["missing", "done"] == list(read(other, MANY[:2]).values())
    assert [False, True] == other.contains([key_of(number) for number in MANY[:2]], DEADLINE)


def test_a_segment_in_which_nothing_is_left_goes(open_tier, put, segments):
    tier = open_tier()
    put(tier, MANY)
    before = len(segments())
    tier.delete([key_of(number) for number in MANY], DEADLINE)
    assert len(segments()) == 1 < before, "the one that is written to"


def test_a_segment_is_not_removed_because_this_process_knows_of_nothing_in_it(open_tier, put, segments):
    tier = open_tier()
    put(tier, MANY)
    sealed = next(segment for segment in tier._index.segments() if segment.state.sealed)
    sealed.keys = [None] * len(sealed.keys)
    tier._space.discard(sealed)
    assert sealed.path in segments()


def test_a_segment_that_is_removed_while_it_is_taken_over_is_not_written_to(open_tier, put, segments):
    class Late(Disk):
        armed = False

        def flock(self, file):
            for path in segments() if self.armed else []:
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    path.unlink()
                    self.armed = False
            return super().flock(file)

    first, disk = open_tier(), Late()
    put(first, MANY[:2])
    tier = open_tier(disk)
    first.close()
    disk.armed = True
    assert ["done"] == put(tier, [MANY[5]])
    assert not disk.armed
    assert ["done"] == list(read(open_tier(), [MANY[5]]).values())


def test_others_notice_that_a_segment_is_gone(open_tier, put, segments):
    one, other = open_tier(), open_tier()
    put(one, MANY)
    assert all(other.contains([key_of(number) for number in MANY], DEADLINE))
    segments()[0].unlink()
    there = other.contains([key_of(number) for number in MANY], DEADLINE)
    assert any(there) and not all(there)
    assert {number: "done" if here else "missing" for number, here in zip(MANY, there, strict=True)} == read(
        other, MANY
    )


def test_a_read_that_has_begun_outlives_the_file(open_tier, put, segments):
    class Removing(Disk):
        armed = False

        def preadv(self, file, buffers, offset):
            if self.armed and len(buffers) > 1:
                for path in segments():
                    path.unlink()
            return super().preadv(file, buffers, offset)

    disk = Removing()
    tier = open_tier(disk)
    put(tier, MANY[:3])
    disk.armed = True
    assert {"done"} == set(read(tier, MANY[:3]).values())
    disk.armed = False


def test_threads_store_and_read_the_same_blocks(open_tier):
    tier, wrong = open_tier(segment_bytes=256 << 10), []
    numbers = range(60)

    def work(offset):
        try:
            for turn in range(12):
                some = [(turn * 7 + offset + each) % 60 for each in range(6)]
                outcomes = tier.put([(key_of(each), aligned(block_of(each))) for each in some], DEADLINE)
                assert {"done"} == set(outcomes)
                assert {"done"} == set(read(tier, some).values())
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(offset * 13,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong
    assert {"done"} == set(read(open_tier(), numbers).values())


def test_a_forked_child_may_not_use_it(open_tier, put):
    tier = open_tier()
    put(tier, [0])

    def life():
        for call in (tier.contains, tier.get, tier.put, tier.delete):
            with pytest.raises(Closed):
                call([], DEADLINE)
        tier.close()

    assert not ended(forked(life))
    assert ["done"] == put(tier, [8]), "the child has closed nothing of ours"
    assert {"done"} == set(read(tier, [0, 8]).values())


def test_time_that_jumps_changes_nothing(open_tier, put, monkeypatch):
    tier = open_tier()
    for now in (0.0, 4e9, 1.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        numbers = [8 * (100 + int(now) % 97 + each) for each in range(3)]
        assert {"done"} == set(put(tier, numbers))
        assert {"done"} == set(read(open_tier(), numbers).values())


def test_what_another_has_removed_is_stored_again(open_tier, put):
    one, other = open_tier(), open_tier()
    put(one, MANY[:2])
    assert all(other.contains([key_of(number) for number in MANY[:2]], DEADLINE))
    one.delete([key_of(MANY[0])], DEADLINE)
    assert ["done", "done"] == put(other, MANY[:2])
    assert {"done"} == set(read(open_tier(), MANY[:2]).values())


def test_what_is_deleted_is_deleted_wherever_it_was_stored(open_tier, put):
    for tier in [open_tier(refresh=3600.0) for _ in range(3)]:  # none knows of the others
        put(tier, [0, 8, 16])
    late = open_tier(refresh=3600.0)
    for tier in [open_tier(refresh=3600.0) for _ in range(2)]:
        put(tier, [24])
    assert 2 == late.delete([key_of(0), key_of(24)], DEADLINE)
    assert 2 == late.delete(OfTenant(key_tenant(key_of(8))), DEADLINE)
    assert not any(open_tier().contains([key_of(number) for number in (0, 8, 16, 24)], DEADLINE))


class Meanwhile(Disk):
    """Something happens while a table is read."""

    def __init__(self):
        self.happens = None

    def preadv(self, file, buffers, offset):
        count = super().preadv(file, buffers, offset)
        if self.happens is not None and offset == PAGE:
            happens, self.happens = self.happens, None
            happens()
        return count


def test_what_is_stored_while_deletions_are_looked_at_is_there(open_tier, put):
    disk = Meanwhile()
    one, other = open_tier(disk), open_tier()
    put(one, MANY[:2])
    other.delete([key_of(MANY[0])], DEADLINE)
    disk.happens = lambda: put(one, MANY[2:3])
    assert [False, True] == one.contains([key_of(number) for number in MANY[:2]], DEADLINE)
    assert disk.happens is None
    assert [True] == one.contains([key_of(MANY[2])], DEADLINE)


def test_what_was_deleted_while_a_segment_is_taken_over_stays_deleted(open_tier, put, segments):
    writer = open_tier()
    put(writer, MANY[:2])
    writer.close()
    disk = Meanwhile()
    one, other = open_tier(disk, refresh=3600.0), open_tier()

    def happens():
        assert 1 == other.delete([key_of(MANY[0])], DEADLINE)
        assert {"missing"} == set(read(one, MANY[:1]).values())

    disk.happens = happens
    put(one, MANY[2:3])
    assert disk.happens is None and 1 == len(segments())
    assert [False, True, True] == one.contains([key_of(number) for number in MANY[:3]], DEADLINE)


def test_a_forked_child_holds_nobody_up(open_tier, put, segments):
    hold, let_go = os.pipe()
    children = []

    def life():
        os.close(let_go)
        os.read(hold, 1)

    class Forking(Disk):
        def fallocate(self, file, nbytes):
            super().fallocate(file, nbytes)
            children.append(forked(life))

    one = open_tier(Forking())
    try:
        put(one, MANY[:2])
        one.close()
        other = open_tier()
        small = [(key_of(1), memoryview(block_of(1)))]
        assert ["done"] == other.put(small, 5.0)  # of another kind, so that it needs a segment of its own
        assert ["done"] == put(other, MANY[2:3]) and 2 == len(segments())
    finally:
        os.close(let_go)
        os.close(hold)
        for child in children:
            ended(child)


def test_a_tier_that_is_closed_while_it_writes_writes_to_no_other_file(open_tier, put):
    begun, go_on, found = threading.Event(), threading.Event(), []

    class Slow(Disk):
        def pwritev(self, file, buffers, offset):
            before = os.fstat(file).st_ino
            if not begun.is_set() and offset > PAGE:
                begun.set()
                go_on.wait(DEADLINE)
                found.append(before == inode(file))
            return super().pwritev(file, buffers, offset)

    tier, before = open_tier(Slow(), direct=False), len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=lambda: found.append(put(tier, MANY)))
    thread.start()
    assert begun.wait(DEADLINE)
    tier.close()
    go_on.set()
    thread.join(DEADLINE)
    assert found[0] is True and "done" in found[1]
    assert before == len(os.listdir("/proc/self/fd"))


def inode(file):
    try:
        return os.fstat(file).st_ino
    except OSError:
        return None
