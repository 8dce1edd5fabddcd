from __future__ import annotations

import msgspec
import pytest

from tensorway.errors import DescriptionInvalid
from tensorway.transport.contract import Description
from tensorway_nixl import wire
from tensorway_nixl.wire import Blob, Versions

OURS = Versions("1.5.1", "1.23.0")
INCARNATION = "a" * 32


def described(**changed):
    blob = {"schema": 1, "nixl": "1.5.1", "ucx": "1.23.0", "host": "h", "canary": 4096, "metadata": b"x" + b"a" * 32}
    return Description("nixl", "engine-1", INCARNATION, (), msgspec.msgpack.encode(Blob(**blob | changed)))


@pytest.mark.parametrize(
    ("nixl", "ucx", "fits"),
    [
        ("1.5.1", "1.23.0", True),
        ("1.5.0", "1.23.0", True),
        ("1.4.1", "1.22.0", True),
        ("1.3.2", "1.21.0", False),
        ("1.1.0", "1.21.0", False),
        ("1.5.1", "1.21.0", False),
        ("1.6.0", "1.23.0", False),
        ("", "1.23.0", False),
        ("1.5.1", "", False),
    ],
)
def test_versions_fit_where_they_were_seen_to_work_and_nowhere_else(nixl, ucx, fits):
    assert fits == OURS.fits(Versions(nixl, ucx)) == Versions(nixl, ucx).fits(OURS)


def test_builds_without_metadata_fit_when_their_ucx_does():
    assert Versions("", "1.21.0").fits(Versions("", "1.21.1"))
    assert not Versions("", "1.21.0").fits(Versions("", "1.20.0"))


def test_a_peer_of_another_version_is_refused_with_both_versions():
    with pytest.raises(DescriptionInvalid) as refused:
        wire.decode(described(nixl="1.3.2", ucx="1.21.0"), OURS, "asked")

    assert "NIXL 1.3.2 with UCX 1.21.0" in str(refused.value)
    assert "NIXL 1.5.1 with UCX 1.23.0" in str(refused.value)


@pytest.mark.parametrize("changed", [{"schema": 2}, {"metadata": b"b" * 40}])
def test_what_is_of_another_schema_or_another_agent_is_refused(changed):
    assert 4096 == wire.decode(described(), OURS, "asked").canary
    with pytest.raises(DescriptionInvalid):
        wire.decode(described(**changed), OURS, "asked")


@pytest.mark.parametrize("blob", [b"", b"\x91" * 2000, b"\x96\x01\x02", msgspec.msgpack.encode(["1"] * 6)])
def test_bytes_that_are_no_description_are_refused(blob):
    with pytest.raises(DescriptionInvalid, match="cannot be read"):
        wire.decode(Description("nixl", "engine-1", INCARNATION, (), blob), OURS, "asked")


@pytest.mark.parametrize("payload", [b"", b"\x00\xff", b"x" * 65_536])
def test_a_notification_comes_out_of_its_frame_as_it_went_in(payload):
    note = wire.unframe(INCARNATION, wire.frame("engine-1", payload))

    assert ("engine-1", INCARNATION, payload) == (note.peer, note.incarnation, note.payload)


@pytest.mark.parametrize("message", [b"", b"req-1", b"twn1", b"twn1\x92\xa1x", b"twn1" + b"\x91" * 2000])
def test_a_message_of_somebody_else_is_not_a_notification(message):
    assert wire.unframe(INCARNATION, message) is None
