"""What is believed of a description and of a notification; nothing here needs Mooncake."""

from __future__ import annotations

import base64

import msgspec
import pytest

from tensorway.errors import DescriptionInvalid, Unsupported
from tensorway.transport.contract import Description
from tensorway_mooncake import wire

SECRET = b"s" * wire.SECRET
GOOD = wire.Blob(wire.SCHEMA, "0.3.13", wire.host(), "127.0.0.1", 15_000, 1 << 40, SECRET)
NOTE = wire.Note("engine-1", "abc", 3, b"\x00\xff")


def decoded(blob, incarnation="abc", version="0.3.13"):
    data = blob if isinstance(blob, bytes) else wire.encode(blob)
    return wire.decode(Description("mooncake", "engine-1", incarnation, (), data), version, "Asked.")


def but(**changed):
    return msgspec.structs.replace(GOOD, **changed)


def test_what_was_encoded_is_decoded():
    assert GOOD == decoded(GOOD)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        msgspec.msgpack.encode([1, 2]),
        but(address="engine.example"),
        but(address="127.0.0.1:15000"),
        but(address="::1"),
        but(address=""),
        but(port=0),
        but(port=80),
        but(port=65_536),
        but(canary=0),
        but(canary=(1 << 63) - 1),
        but(secret=b""),
        but(secret=b"s" * 33),
    ],
)
def test_what_mooncake_must_never_see_is_refused(blob):
    with pytest.raises(DescriptionInvalid):
        decoded(blob)


def test_an_incarnation_that_no_slot_holds_is_refused():
    with pytest.raises(DescriptionInvalid, match="length"):
        decoded(GOOD, incarnation="a" * (wire.MAX_INCARNATION + 1))


@pytest.mark.parametrize("changed", [{"version": "0.3.12"}, {"version": ""}, {"schema": 2}])
def test_another_version_is_refused_with_both(changed):
    with pytest.raises(DescriptionInvalid, match=r"and this endpoint 0\.3\.13 \(schema 1\)"):
        decoded(but(**changed))


def test_a_loopback_address_of_another_machine_is_refused_and_its_network_address_is_not():
    with pytest.raises(Unsupported, match="option host"):
        decoded(but(host="another"))
    assert "10.0.0.7" == decoded(but(host="another", address="10.0.0.7")).address


def test_a_note_that_was_sealed_is_read():
    assert NOTE == wire.unseal(wire.seal(NOTE, SECRET), SECRET)


def test_a_note_is_text_of_a_bounded_length():
    sealed = wire.seal(wire.Note("n" * 128, "i" * 64, 1 << 60, b"\xff" * 65_536), SECRET)
    assert sealed.isascii()
    assert len(sealed) < 90_000


def flipped(text):
    data = bytearray(base64.b64decode(text))
    data[-1] ^= 1
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "message",
    [
        "",
        "hello",
        "h\u00e4",
        "====",
        flipped(wire.seal(NOTE, SECRET)),
        wire.seal(NOTE, b"t" * wire.SECRET),
        wire.seal(wire.Note("two words", "abc", 3, b""), SECRET),
        wire.seal(wire.Note("engine-1", "", 3, b""), SECRET),
        base64.b64encode(wire._seal(b"\xc1", SECRET) + b"\xc1").decode(),
    ],
)
def test_what_is_not_sealed_with_our_secret_or_is_no_note_is_nothing(message):
    assert wire.unseal(message, SECRET) is None
