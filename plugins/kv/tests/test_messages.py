"""What engines tell each other: read as it was written, or refused and counted, whatever arrives."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway_kv import messages
from tensorway_kv.messages import (
    MAX_BYTES,
    Ack,
    Heartbeat,
    Held,
    Pushed,
    PushRegistration,
    Reader,
    Refusal,
    Withdraw,
)
from tensorway_kv.testing import fuzz

ACK = Ack("decode-0.1", 3, "r-1", 77, 5, 2, "received")


@pytest.fixture
def reader():
    return Reader()


def count(reader):
    return {cause: times for cause, times in reader.refused.items() if times}


def raw(*fields):
    """A message with any fields, under our mark."""
    return messages.encode(Pushed("p", 0, "r", 1))[:4] + msgspec.msgpack.encode(fields)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
epochs, ranks = st.integers(1, (1 << 63) - 1), st.integers(0, 65_535)
ids = st.lists(st.integers(0, (1 << 31) - 1), max_size=20, unique=True).map(tuple)
blocks = st.lists(ids, min_size=1, max_size=4).map(messages.runs)
any_message = st.one_of(
    st.builds(Heartbeat, texts, ranks, st.lists(st.builds(Held, texts, epochs), min_size=1, max_size=9).map(tuple)),
    st.builds(Ack, texts, ranks, texts, epochs, ranks, st.integers(1, 65_536), st.sampled_from(["received", "failed"])),
    st.builds(
        PushRegistration,
        texts,
        texts,
        ranks,
        texts,
        epochs,
        blocks,
        st.integers(0, 1 << 20),
        st.integers((1 << 20) + 1, 1 << 30),
        st.floats(0.001, 3600),
    ),
    st.builds(Pushed, texts, ranks, texts, epochs),
    st.builds(messages.Greeting, texts, texts, ranks),
    st.builds(messages.Ready, texts, ranks),
    st.builds(
        messages.Ask,
        texts,
        texts,
        ranks,
        texts,
        epochs,
        blocks,
        st.integers(0, 1 << 30),
        blocks,
        st.integers(0, 1 << 20),
        st.integers((1 << 20) + 1, 1 << 30),
        st.floats(0.001, 3600),
    ),
    st.builds(messages.Unask, texts, texts, ranks, texts, epochs),
    st.builds(Withdraw, texts, texts, ranks, texts, epochs),
    st.builds(Refusal, texts, ranks, texts, epochs, st.sampled_from(["unknown", "withdrawn"])),
)


@given(message=any_message)
def test_a_message_is_read_as_it_was_written(message):
    reader = Reader()
    assert message == reader.decode(messages.encode(message))
    assert message is reader.checked(message, message.sender)
    assert {} == count(reader)


@given(message=any_message, cut=st.integers(0, 1 << 16))
def test_the_beginning_of_a_message_is_truncated_and_no_message(message, cut):
    reader, payload = Reader(), messages.encode(message)
    assert reader.decode(payload[: cut % len(payload)]) is None
    assert {"truncated": 1} == count(reader)


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        (b"HB:id1,id2", "foreign"),
        (b"tkv\x02" + messages.encode(ACK)[4:], "foreign"),
        (b"tkv\x00" + messages.encode(ACK)[4:], "foreign"),
        (messages.encode(ACK) + b"\x00", "malformed"),
        (raw("ack", "decode-0.1", 3, "r-1", 77, 5, 2, "received", 9), "malformed"),
        (raw("ack", "decode-0.1", 3, "r-1", 77, 5, 2), "malformed"),
        (raw("sudo", "decode-0.1"), "malformed"),
        (raw("drain", ""), "malformed"),
        (raw("drain", "d" * 129), "malformed"),
        (raw("drain", b"d"), "malformed"),
        (raw("ack", "d", 3, "r", 0, 5, 2, "received"), "malformed"),
        (raw("ack", "d", 3, "r", 1 << 63, 5, 2, "received"), "malformed"),
        (raw("ack", "d", 65_536, "r", 1, 5, 2, "received"), "malformed"),
        (raw("ack", "d", -1, "r", 1, 5, 2, "received"), "malformed"),
        (raw("ack", "d", 3, "r", 1, 5, 0, "received"), "malformed"),
        (raw("ack", "d", 3, "r", 1, 5, 2, "perhaps"), "malformed"),
        (raw("ack", "d", 3, "r" * 513, 1, 5, 2, "received"), "malformed"),
        (raw("ack", "d", 3, "r", "1", 5, 2, "received"), "malformed"),
        (raw("ack", "d", 3.0, "r", 1, 5.5, 2, "received"), "malformed"),
        (raw("heartbeat", "d", 0, []), "malformed"),
        (raw("heartbeat", "d", 0, [["r", 1]] * 4097), "malformed"),
        (raw("push", "d", 0, "r", 1, [], 0), "malformed"),
        (raw("push", "d", 0, "r", 1, [[]] * 257, 0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[1 << 31, 1]]], 0, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[-1, 1]]], 0, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[4, 0]]], 0, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[4, 2], [3, 2]]], 0, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[0, 1 << 30], [1 << 30, 1]]], 0, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[4, 2]]], 9, 9, 1.0), "malformed"),
        (raw("push", "d", "e", 0, "r", 1, [[[4, 2]]], 0, 9, float("nan")), "malformed"),
        (raw("withdraw", "x", "x", 0, "r", 1)[:-1] + b"\xff", "malformed"),
        (b"tkv\x01" + b"\x91" * 60_000, "malformed"),
        (b"tkv\x01" + b"\x00" * MAX_BYTES, "malformed"),
        (None, "malformed"),
        ("tkv", "malformed"),
        (b"", "truncated"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_message_is_refused_and_counted(reader, payload, cause):
    assert reader.decode(payload) is None
    assert {cause: 1} == count(reader)


@pytest.mark.parametrize("message", fuzz.SAMPLES, ids=lambda message: type(message).__name__)
def test_the_largest_numbers_and_strangest_ids_are_read(message, reader):
    assert message == reader.decode(messages.encode(message))


def test_a_message_longer_than_any_notification_is_not_read(reader):
    def payload(count):
        landing = messages.runs([range(1 << 20, (1 << 20) + 2 * count, 2)])
        return messages.encode(PushRegistration("d", "e", 0, "r", 1, landing, 0, 9, 1.0))

    assert reader.decode(payload(9_300)) is not None
    assert MAX_BYTES < len(payload(9_400)) and reader.decode(payload(9_400)) is None
    assert {"malformed": 1} == count(reader)


def test_nobody_speaks_for_another(reader):
    assert reader.checked(ACK, "decode-1.1") is None
    assert reader.checked(ACK, "decode-0.2") is None, "nor for a later life of itself"
    assert {"forged": 2} == count(reader)


def test_the_version_before_is_read_too(monkeypatch, reader):
    monkeypatch.setattr(messages, "ACCEPTED", frozenset({2, 1}))
    assert ACK == reader.decode(messages.encode(ACK, 2)) == reader.decode(messages.encode(ACK))


def test_an_id_may_have_anything_in_it(reader):
    """Elsewhere ids are joined by commas, and one with a comma in it is never renewed."""
    held = (Held("a,b", 1), Held("HB:,", 2), Held("\0", 3))
    (payload,) = messages.heartbeats("d", 0, held)
    assert held == reader.decode(payload).held


@given(lengths=st.lists(st.integers(1, 512), max_size=300), limit=st.sampled_from([700, 4096, MAX_BYTES]))
def test_heartbeats_say_all_in_order_and_none_is_too_long(lengths, limit):
    held = [Held("r" * length, number + 1) for number, length in enumerate(lengths)]
    payloads = list(messages.heartbeats("d", 0, held, limit))
    assert held == [lease for payload in payloads for lease in Reader().decode(payload).held]
    assert all(len(payload) <= limit for payload in payloads)


def test_heartbeats_of_many_short_ids_stay_within_what_is_read(reader):
    held = [Held("r", 1)] * 10_000
    assert held == [
        lease for payload in messages.heartbeats("d", 0, held, 1 << 30) for lease in reader.decode(payload).held
    ]


def test_hostile_messages_and_tickets_raise_nothing_and_are_counted():
    """A slice of the campaign `python -m tensorway_kv.testing.fuzz`."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    counts = fuzz.fuzz(seed, 10_000)
    causes = {"malformed", "truncated", "foreign", "forged"}
    expected = {f"{what} {cause}" for what in ("message", "ticket") for cause in causes}
    assert expected | {"ticket opened"} == set(counts)
    assert 10_000 == counts.total()
