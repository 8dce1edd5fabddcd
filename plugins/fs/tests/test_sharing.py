"""Processes and threads on one folder."""

from __future__ import annotations

import os
import threading

import pytest

from tensorway.errors import Closed
from tensorway_fs.disk import Disk
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
