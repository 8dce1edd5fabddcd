"""Descriptions: what was said comes back, and no bytes make the reader raise anything but that they are none."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorway.errors import DescriptionInvalid
from tensorway.memory import ADDRESS_LIMIT, Region
from tensorway.transport import description as envelope
from tensorway.transport.contract import Description

IDENTIFIERS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128)
REGIONS = st.builds(
    Region, st.integers(1, 1 << 62), st.integers(1, 1 << 62), st.sampled_from(["cpu", "cuda:0", "xpu:12"])
)
TRUE = Description(
    "local", "engine-1", "0123abcd", (Region(4096, 64), Region(8192, 1 << 40, "cuda:1")), b"\x00blob\xff"
)


def sealed(body: bytes) -> bytes:
    """Bytes with the right magic and the right digest, whatever they are."""
    return envelope._MAGIC + envelope._digest(body) + body


def wire(**fields) -> bytes:
    row = {"transport": "local", "name": "engine-1", "incarnation": "0123", "regions": [], "blob": b""} | fields
    return sealed(msgspec.msgpack.encode(list(row.values())))


def refused(data: object, match: str = "") -> None:
    with pytest.raises(DescriptionInvalid, match=match or None):
        envelope.decode(data, "local")


@given(IDENTIFIERS, IDENTIFIERS, st.lists(REGIONS, max_size=5), st.binary(max_size=200))
def test_what_was_said_comes_back(name, incarnation, regions, blob):
    said = Description("local", name, incarnation, tuple(regions), blob)
    assert said == envelope.decode(envelope.encode(said), "local")


@given(st.binary(max_size=300))
@example(b"\x95\xa5local\xa1\xff\xa1a\x90\xc4\x00")
@example(b"\x91" * 5000)
@example(b"")
def test_no_bytes_are_anything_but_refused(data):
    for candidate in (data, envelope._MAGIC + data, sealed(data)):
        refused(candidate)


def test_ten_thousand_damaged_descriptions_are_refused_with_and_without_their_digest():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng, true = random.Random(seed), envelope.encode(TRUE)
    body, accepted = true[len(envelope._MAGIC) + envelope._DIGEST :], 0
    for attempt in range(10_000):
        honest = attempt % 2 == 0
        data = bytearray(true if honest else body)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[at] = (data[at] + rng.randint(1, 255)) % 256
            elif change == 1:
                del data[at : at + rng.randint(1, 9)]
            elif change == 2:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            else:
                data[at:] = rng.randbytes(rng.randrange(9))
            data = data or bytearray(b"\0")
        try:
            seen = envelope.decode(bytes(data) if honest else sealed(bytes(data)), "local")
        except DescriptionInvalid:
            continue
        # Its maker may say anything under a digest of their own; what comes out is a description all the same.
        assert not honest or bytes(data) == true, f"seed {seed}, attempt {attempt}"
        assert envelope.identifier(seen.name) and all(type(region) is Region for region in seen.regions)
        accepted += 1
    assert accepted < 5000


@pytest.mark.parametrize("data", [None, "twd1", bytearray(b"twd1"), 5, b"", b"twd", b"twd2" + bytes(40)], ids=repr)
def test_what_does_not_begin_like_one_is_refused(data):
    refused(data, "begin")


def test_one_flipped_bit_is_damage():
    data = bytearray(envelope.encode(TRUE))
    data[-1] ^= 1
    refused(bytes(data), "digest")
    refused(envelope.encode(TRUE) + b"x", "digest")


def test_the_limits_are_checked_before_anything_is_believed():
    refused(envelope._MAGIC + bytes(envelope.MAX_BYTES), "none has more")
    region = (4096, 1, "cpu")
    assert envelope.MAX_REGIONS == len(envelope.decode(wire(regions=[region] * envelope.MAX_REGIONS), "local").regions)
    refused(wire(regions=[region] * (envelope.MAX_REGIONS + 1)), "none has more")


@pytest.mark.parametrize(
    "region",
    [
        (0, 1, "cpu"),
        (1, 0, "cpu"),
        (-1, 1, "cpu"),
        (ADDRESS_LIMIT, 1, "cpu"),
        (1 << 62, (1 << 64) - 1, "cpu"),
        (1, 1, "CPU"),
        (1, 1, ""),
        (1.0, 1, "cpu"),
        (True, 1, "cpu"),
        (1, 1),
        (1, 1, "cpu", 5),
        None,
    ],
    ids=repr,
)
def test_a_region_that_is_none_is_refused(region):
    refused(wire(regions=[region]))


def test_a_description_of_another_transport_is_refused_and_says_of_which():
    refused(wire(transport="nixl"), "nixl")


@pytest.mark.parametrize("name", ["", "a b", "a\n", "ä", "a" * 129, "\x7f"])
def test_a_name_that_is_none_is_refused(name):
    assert not envelope.identifier(name)
    refused(wire(name=name), "name")
    refused(wire(incarnation=name), "incarnation")


def test_a_field_too_many_or_too_few_is_refused():
    refused(sealed(msgspec.msgpack.encode(["local", "a", "b", []])))
    refused(sealed(msgspec.msgpack.encode(["local", "a", "b", [], b"", 1])))
    refused(sealed(msgspec.msgpack.encode({"transport": "local"})))


def test_the_longest_name_is_taken():
    assert "a" * 128 == envelope.decode(wire(name="a" * 128), "local").name
