from __future__ import annotations

import random

import attrs
import pytest

from tensorway_fs.records import (
    ENTRY,
    LONGEST_KEY,
    MOST_PLACES,
    PAGE,
    TOMBSTONE,
    Entry,
    Head,
    Kind,
    Owner,
    State,
    decoded,
    digest_of,
    entry,
    keys_of,
    used,
)  # fmt: skip

HEAD = Head(Kind(44, 4096), 100, 7, 1 << 63, bytes(range(16)), Owner(1, 2, bytes(range(16, 32))))


def test_a_head_is_what_was_written_and_nothing_else_is_one():
    page = HEAD.encoded()
    assert HEAD == Head.decoded(page)
    size = len(page.rstrip(b"\0"))
    for bit in range(size * 8):
        other = bytearray(page)
        other[bit // 8] ^= 1 << bit % 8
        assert isinstance(Head.decoded(other), str), bit
    assert isinstance(Head.decoded(page[:50]), str)


@pytest.mark.parametrize(
    "change",
    [
        {"places": 0}, {"places": MOST_PLACES + 1}, {"kind": Kind(0, 4096)}, {"kind": Kind(LONGEST_KEY + 1, 4096)},
        {"kind": Kind(44, 0)}, {"kind": Kind(44, 100)}, {"kind": Kind(44, 1 << 50)},
    ],
)  # fmt: skip
def test_a_head_with_a_good_checksum_may_not_say_what_cannot_be(change):
    assert "damaged" == Head.decoded(attrs.evolve(HEAD, **change).encoded())


def test_an_entry_is_what_was_written_there_and_nothing_else_is_one():
    key, data = bytes(range(44)), b"block" * 100
    raw = entry(HEAD, 5, key, digest_of(data), len(data), 1234)
    assert Entry(key, digest_of(data), 500, 1234) == decoded(HEAD, 5, raw)
    for bit in range(ENTRY * 8):
        other = bytearray(raw)
        other[bit // 8] ^= 1 << bit % 8
        assert "corrupt" == decoded(HEAD, 5, other), bit
    assert "corrupt" == decoded(HEAD, 6, raw), "an entry of another place"
    assert "corrupt" == decoded(attrs.evolve(HEAD, nonce=3), 5, raw), "an entry of another segment"
    assert "corrupt" == decoded(HEAD, 5, raw[:-1])
    assert ["missing"] * 2 == [decoded(HEAD, 5, free) for free in (bytes(ENTRY), TOMBSTONE)]


def test_an_entry_is_not_longer_than_its_place():
    raw = entry(HEAD, 0, bytes(44), 1, HEAD.kind.stride + 1, 0)
    assert "corrupt" == decoded(HEAD, 0, raw)


def test_keys_are_found_whatever_they_are_and_free_places_have_none():
    head = attrs.evolve(HEAD, kind=Kind(16, 64))
    keys = [b"\0" * 16, b"\xff" * 16, None, b"\0" * 15 + b"\1", None, b"\1" + b"\0" * 15]
    rows = [TOMBSTONE if key is None else entry(head, at, key, 0, 0, 0) for at, key in enumerate(keys)]
    rows[4] = bytes(ENTRY)
    table = b"".join(rows) + bytes(ENTRY * 10)
    assert 6 == used(table)
    assert keys == keys_of(head, table, 6)


def test_any_bytes_are_a_table_and_a_state():
    rng = random.Random(1)
    for _ in range(200):
        table = rng.randbytes(ENTRY * 4)
        keys_of(HEAD, table, used(table))
        for place in range(4):
            assert "corrupt" == decoded(HEAD, place, table[place * ENTRY : (place + 1) * ENTRY])
        State.decoded(rng.randbytes(13))


def test_places_hold_what_belongs_into_them():
    for nbytes in (0, 1, 64, 65, 4095, 4096, 4097, 100_003, 1 << 20):
        kind = Kind.of(b"k" * 44, nbytes)
        assert nbytes <= kind.stride < nbytes + PAGE + 1
        assert nbytes < PAGE or not kind.stride % PAGE
        head = attrs.evolve(HEAD, kind=kind, places=kind.places(1 << 20))
        assert not head.data % PAGE and head.at(head.places) == head.nbytes
        assert head.places == 1 or head.nbytes <= (1 << 20) + PAGE
