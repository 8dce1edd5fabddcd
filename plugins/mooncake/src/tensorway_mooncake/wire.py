"""What two endpoints over Mooncake tell each other: the fabric's part of a description, and notifications.

May import tensorway's ground and the transport's contract. All of a description is checked here before Mooncake sees
a word of it: Mooncake takes any text for the address of a peer. Mooncake does not say who sent a notification, and
takes one from anybody who reaches its port: so each carries its sender and a seal, which only who has the receiver's
description can make.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from typing import Annotated, Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid, Unsupported
from tensorway.platforms import boot_id
from tensorway.transport.contract import Description
from tensorway.transport.description import identifier

SCHEMA: Final = 1
#: Bytes of the secret that a description carries, and of a seal.
SECRET: Final = 32
_SEAL: Final = 16
#: So that a canary fits into its slot.
MAX_INCARNATION: Final = 64
#: The name under which Mooncake delivers our notifications.
LABEL: Final = "tensorway"
_LOWEST_PORT: Final = 1024


class Blob(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The fabric's part of a description."""

    schema: int
    #: Mooncake's version.
    version: str
    #: The running kernel and its network, so that a loopback address is believed where it means something.
    host: str
    address: str
    port: Annotated[int, msgspec.Meta(ge=_LOWEST_PORT, le=65_535)]
    #: Where the endpoint's incarnation lies in its registered memory, so that reading it proves that reading works.
    canary: Annotated[int, msgspec.Meta(gt=0, le=(1 << 62))]
    #: With it a sender proves that it has this description.
    secret: bytes


DECODE_BLOB: Final = msgspec.msgpack.Decoder(Blob).decode


class Note(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A notification: who sends it, which one of this sender's it is, what it says."""

    name: str
    incarnation: str
    number: Annotated[int, msgspec.Meta(ge=0)]
    payload: bytes


_DECODE_NOTE: Final = msgspec.msgpack.Decoder(Note).decode


def encode(blob: Blob) -> bytes:
    """The fabric's part of a description as bytes."""
    return msgspec.msgpack.encode(blob)


def decode(description: Description, version: str, asked: str) -> Blob:
    """The fabric's part of a description that this endpoint can connect to; raises what is wrong with it."""
    try:
        blob = DECODE_BLOB(description.blob)
        address = ipaddress.IPv4Address(blob.address)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise DescriptionInvalid(asked, f"Its Mooncake part cannot be read: {error}.", "Give it unchanged.") from None
    if blob.schema != SCHEMA or blob.version != version:
        raise DescriptionInvalid(
            asked,
            f"It runs Mooncake {blob.version or 'of unknown version'} (schema {blob.schema}), and this endpoint "
            f"{version or 'one of unknown version'} (schema {SCHEMA}).",
            "Install the same version of Mooncake at both ends; no others were seen to work with each other.",
        )
    if len(blob.secret) != SECRET or len(description.incarnation) > MAX_INCARNATION:
        raise DescriptionInvalid(asked, "Its secret or its incarnation has another length.", "Give it unchanged.")
    if address.is_loopback and blob.host != host():
        raise Unsupported(
            asked,
            f"It advertises {address}, and it is on another machine, or in a container with a network of its own.",
            "Create it with the option host, an address of its machine that this one reaches.",
        )
    return blob


def seal(note: Note, secret: bytes) -> str:
    """A notification as Mooncake carries it: text, because Mooncake wraps it into JSON."""
    body = msgspec.msgpack.encode(note)
    return base64.b64encode(_seal(body, secret) + body).decode("ascii")


def unseal(message: str, secret: bytes) -> Note | None:
    """The notification in a message; None for what was not sealed with this secret."""
    try:
        data = base64.b64decode(message.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    body = data[_SEAL:]
    if not hmac.compare_digest(data[:_SEAL], _seal(body, secret)):
        return None
    try:
        note = _DECODE_NOTE(body)
    except UNREADABLE:
        return None
    return note if identifier(note.name) and identifier(note.incarnation) else None


def host() -> str:
    """The running kernel, and the network namespace: what loopback addresses are about."""
    return f"{boot_id()} {os.readlink('/proc/self/ns/net')}"  # noqa: PTH115


def _seal(body: bytes, secret: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_SEAL, key=secret, person=b"tensorway").digest()
