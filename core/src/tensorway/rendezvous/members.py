"""The members of a group, as they write themselves into a rendezvous, and what is read of others.

Room `rendezvous`; may import the ground and its own room. What others wrote is checked before anything in it is
believed: it comes from who knows the secret, and that may still be another version, or damaged.

A member is two records. All of a group are told of the first, so it is small; what a transport connects with has a
digest there and a record of its own, which is read by who connects.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid
from tensorway.rendezvous.negotiation import Fact

#: joining: it is there, and not ready. live: connect to it. draining: begin nothing new. gone: it said goodbye.
MemberState = Literal["joining", "live", "draining", "gone"]
_SCHEMA: Final = 2
_MAX_FACTS: Final = 1024


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One member of a group."""

    schema: int
    name: str
    #: Which life of it this is: the one of its endpoint.
    incarnation: str
    state: MemberState
    facts: dict[str, Fact]
    #: Of what a transport of the same name connects with, see `digest`.
    described: bytes


_DECODE_MEMBER: Final = msgspec.msgpack.Decoder(Member).decode


def digest(description: bytes) -> bytes:
    """By which a member says which description is its own."""
    return hashlib.blake2b(description, digest_size=16).digest()


def description_key(prefix: str, name: str) -> str:
    """Where the description of a member is: beside the prefix that its group watches, and not below it."""
    return f"{prefix.removesuffix('/')}~/{name}"


def encode(name: str, incarnation: str, state: MemberState, facts: dict[str, Fact], described: bytes) -> bytes:
    """A member as a value of a record."""
    return msgspec.msgpack.encode(Member(_SCHEMA, name, incarnation, state, facts, described))


def decode(key: str, value: bytes) -> Member:
    """A member from a record; raises `DescriptionInvalid` unless it is one, of the name that its key says."""
    asked = f"The record {key} was read."
    try:
        member = _DECODE_MEMBER(value)
    except UNREADABLE as error:
        true = f"It describes no member: {str(error).splitlines()[0]}"
        raise DescriptionInvalid(asked, true, "Install one version of tensorway in the whole deployment.") from None
    if member.schema != _SCHEMA or len(member.facts) > _MAX_FACTS or not key.endswith("/" + member.name):
        true = f"It is of schema {member.schema}, has {len(member.facts)} facts, and is called {member.name[:80]!a}."
        raise DescriptionInvalid(asked, true, f"A member of schema {_SCHEMA} is stored under its own name.")
    return member
