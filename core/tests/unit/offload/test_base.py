"""Keys and what tenants are in them; what is said of blocks is data that can go from process to process."""

from __future__ import annotations

import pickle

import attrs
import pytest

from tensorway.errors import OptionsInvalid
from tensorway.offload import (
    EngineSpec,
    Hint,
    LookupResult,
    OffloadContext,
    OffloadingEvent,
    PrefixLookup,
    PrepareLoadOutput,
    PrepareStoreOutput,
    ReqContext,
    Ticket,
    TransferResult,
    base,
    key_group,
    key_hash,
    key_tenant,
    make_offload_key,
    tenant_of_salt,
)


@pytest.mark.parametrize("length", [4, 5, 32, 63, 64])
@pytest.mark.parametrize("group", [0, 1, 255, 256, (1 << 32) - 1])
@pytest.mark.parametrize("salt", ["", "a", "\0", "tenant " * 100, "ü"])
def test_a_key_says_what_it_was_made_of(length, group, salt):
    content = bytes(range(length))
    key = make_offload_key(content, group, salt)
    assert (content, tenant_of_salt(salt), group) == (key_hash(key), key_tenant(key), key_group(key))
    assert length + base.TENANT_BYTES + base.GROUP_BYTES == len(key)


def test_a_key_can_be_taken_apart_by_who_has_no_code_of_ours():
    key = make_offload_key(b"\xaa" * 16, 258)
    assert b"\xaa" * 16 + bytes(8) + b"\0\0\1\2" == key


def test_keys_of_other_contents_groups_or_tenants_are_others():
    made = {
        make_offload_key(content, group, salt)
        for content in (b"aaaa", b"aaaa\0", b"aaab", b"a" * 16)
        for group in (0, 1, 1 << 24)
        for salt in ("", "one", "two")
    }
    assert 4 * 3 * 3 == len(made)


def test_a_salt_is_the_same_tenant_in_every_process():
    assert bytes(8) == tenant_of_salt("")
    assert "40f89e395b66422f" == tenant_of_salt("a").hex()


@pytest.mark.parametrize("content", [b"", b"abc", b"a" * 65])
def test_what_is_no_hash_is_refused(content):
    with pytest.raises(OptionsInvalid, match=f"a hash of {len(content)} bytes"):
        make_offload_key(content)


@pytest.mark.parametrize("group", [-1, 1 << 32])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(OptionsInvalid, match=f"for group {group}"):
        make_offload_key(b"abcd", group)


VALUES = [
    Hint("s", 1.0, 2),
    ReqContext("r", "salt", frozenset({"fs"}), Hint()),
    PrefixLookup(3, 1),
    EngineSpec([0, 1], [[1, -1], [2]]),
    Ticket(1, 2),
    PrepareLoadOutput(Ticket(0, 0), EngineSpec([], [])),
    PrepareStoreOutput(Ticket(0, 1), [make_offload_key(b"abcd")], EngineSpec([0], [[1]]), []),
    OffloadingEvent("removed", [make_offload_key(b"abcd")], "cpu", "evicted"),
    TransferResult(1, "failed", "because", [0]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_goes_from_process_to_process_arrives_and_cannot_be_changed(value):
    assert value == pickle.loads(pickle.dumps(value))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, attrs.fields(type(value))[0].name, None)


def test_results_of_a_lookup_are_the_same_objects_after_a_journey():
    for result in LookupResult:
        assert result is pickle.loads(pickle.dumps(result))


def test_a_spec_is_as_long_as_it_has_blocks():
    assert 3 == len(EngineSpec([0, 0, 1], [[1, 2], [3, 4], [5]]))
    assert "engine" == EngineSpec([], []).medium


def test_contexts_share_nothing_that_can_change():
    one, other = (OffloadContext("e", "manager", ()) for _ in range(2))
    one.facts["model"] = "m"
    assert {} == other.facts
    assert one.services is not other.services
