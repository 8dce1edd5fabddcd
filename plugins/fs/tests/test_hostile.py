"""What may lie in a folder, and what must not come of it."""

from __future__ import annotations

import os
import random

import attrs
import pytest

from tensorway_fs.namespace import FACTS, REMOVED, Namespace, Removals, read_facts, tell_removed
from tensorway_fs.records import PAGE, Head
from tensorway_fs.testing import corruption
from tensorway_fs.testing.blocks import DEADLINE, block_of, key_of, read
from tensorway_fs.testing.disks import Disk

MANY = range(0, 400, 8)


def test_odd_files_are_left_alone(open_tier, put, segments, tmp_path):
    put(open_tier(), MANY)
    space, real = segments()[0].parent, segments()[0]
    odd = [f"{number:016x}-{'0' * 16}.seg" for number in range(900, 906)]
    (space / odd[0]).symlink_to(real)
    (space / odd[1]).mkdir()
    os.mkfifo(space / odd[2])
    os.link(real, space / odd[3])
    (space / odd[4]).write_bytes(b"")
    (space / odd[5]).write_bytes(os.urandom(PAGE))
    (space / "notes.txt").write_text("mine")
    (space.parent / ("f" * 32)).symlink_to(space)
    tier = open_tier(max_bytes=1 << 20)
    assert {"done"} == set(read(tier, MANY).values())
    for number in range(4000, 4000 + 8 * 600, 8):
        assert ["done"] == put(tier, [number])
    assert {*odd[:3], "notes.txt"} <= set(os.listdir(space))


def test_a_copied_segment_is_not_taken_for_another(open_tier, put, segments):
    put(open_tier(), MANY[:3])
    real = segments()[0]
    (real.parent / f"{99:016x}-{'0' * 16}.seg").write_bytes(real.read_bytes())
    elsewhere = real.parent.parent / ("e" * 32)
    elsewhere.mkdir()
    (elsewhere / real.name).write_bytes(real.read_bytes())
    tier = open_tier()
    assert {"done"} == set(read(tier, MANY[:3]).values())
    assert 1 == len(tier._index.segments())


def test_a_size_that_no_disk_has_is_no_reason_to_take_memory(open_tier, put, segments):
    put(open_tier(), MANY[:3])
    path = segments()[0]
    head = Head.decoded(path.read_bytes()[:PAGE])
    with path.open("r+b") as file:
        file.write(attrs.evolve(head, places=1 << 18).encoded())
    os.truncate(path, 1 << 42)
    assert {"corrupt", "missing"} >= set(read(open_tier(), MANY[:3]).values())


def test_what_was_torn_is_missing_and_nothing_else_is(open_tier, put, segments):
    tier = open_tier()
    put(tier, MANY[:3])
    tier.close()
    path = segments()[0]
    head = Head.decoded(path.read_bytes()[:PAGE])
    os.truncate(path, head.at(2) + 100)
    assert ["done", "done", "corrupt"] == list(read(open_tier(), MANY[:3]).values())


def test_a_log_of_removals_may_say_anything(tmp_path):
    disk, log = Disk(), Removals(Disk(), tmp_path)
    segment = tmp_path / f"{1:016x}-{2:016x}.seg"
    assert set() == log.names()
    tell_removed(disk, segment)
    assert {segment.name} <= {name.ljust(len(segment.name)) for name in log.names()} and set() == log.names()
    rng = random.Random(1)
    for _ in range(50):
        (tmp_path / REMOVED).write_bytes(rng.randbytes(rng.randrange(400)))
        log.names()
    for _ in range(5000):
        tell_removed(disk, segment)
    assert {segment.name} == log.names()
    assert (tmp_path / REMOVED).stat().st_size <= 1 << 18
    (tmp_path / REMOVED).unlink()
    (tmp_path / REMOVED).mkdir()
    assert set() == log.names()


def test_facts_are_for_people_and_may_be_anything(tmp_path):
    namespace = Namespace.of(tmp_path, b"x", Disk())
    namespace.make({"model": "m", "dtype": "bf16"}, sync=True)
    assert {"dtype": "bf16", "model": "m"} == read_facts(Disk(), namespace.path)
    for text in ("", "[" * 5000, '{"facts": [1]}', '"x"', "\0"):
        (namespace.path / FACTS).write_text(text)
        assert {} == read_facts(Disk(), namespace.path)


@pytest.mark.parametrize("layout", ["segments", "files"])
def test_every_single_bit_of_a_small_folder(tmp_path, layout):
    """Of the head, the entries that are used, and some of each block."""
    tier = corruption.opened(tmp_path, layout, direct=False)
    number = 6  # 64 bytes
    assert ["done"] == tier.put([(key_of(number), memoryview(block_of(number)))], DEADLINE)
    tier.close()
    (path,) = corruption.files_of(tmp_path)
    whole = path.read_bytes()
    used = [at for at, byte in enumerate(whole) if byte]
    for at in random.Random(2).sample(used, 60):
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            tier = corruption.opened(tmp_path, layout, direct=False)
            assert {"done", "corrupt", "missing"} >= set(read(tier, [number]).values())
            tier.close()
            path.write_bytes(whole)


def test_a_link_is_not_followed_even_by_its_right_name(open_tier, put, segments, tmp_path):
    tier = open_tier()
    put(tier, MANY[:3])
    tier.close()
    (real,) = segments()
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    assert {"missing"} == set(read(open_tier(), MANY[:3]).values())


def test_what_a_table_says_does_not_hide_what_is_known(open_tier, put):
    tier = open_tier()
    put(tier, [MANY[0], 1])
    index, known = tier._index, tier._index.find(key_of(MANY[0]))
    other, _ = index.find(key_of(1))
    index.publish(other, other.head.places - 1, [bytes(key_of(MANY[0]))], certain=False)
    assert known == index.find(key_of(MANY[0]))


def test_a_name_with_the_highest_number_stops_nobody(open_tier, put, segments):
    put(open_tier(), MANY[:1])
    (segments()[0].parent / f"{'f' * 16}-{'0' * 16}.seg").write_bytes(b"")
    tier = open_tier()
    assert {"done"} == set(put(tier, MANY[1:]))
    assert {"done"} == set(read(open_tier(), MANY).values())


@pytest.mark.parametrize("layout", ["segments", "files"])
def test_what_is_stored_can_be_read_by_this_user_alone(tmp_path, layout):
    before = os.umask(0)
    try:
        tier = corruption.opened(tmp_path, layout, direct=False)
        tier.put([(key_of(6), memoryview(block_of(6)))], DEADLINE)
        tier.close()
    finally:
        os.umask(before)
    made = [*tmp_path.rglob("*")]
    assert len(made) > 2
    assert {0o600 if path.is_file() else 0o700 for path in made} == {path.stat().st_mode & 0o777 for path in made}
    assert not [path for path in made if path.stat().st_mode & 0o077]
