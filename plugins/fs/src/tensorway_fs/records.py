"""What bytes of a segment file mean: its head, the table with an entry for each block, and the blocks behind it.

May import xxhash and attrs. Nothing that a file says is believed: a head and an entry carry checksums over all of
themselves, an entry one of its block, and every size is compared with what the head allows.

    0      the head, which never changes; at STATE what its writer does, a hint that readers may find outdated
    4096   the table: 128 bytes for each place, zeros for a free one
    data   places of equal length, each with one block, at a multiple of 4096

A place is written once. So whoever reads needs no lock: an entry is there when its block is, and stays what it is until
the entry is marked dead or the file is gone.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import attrs
import xxhash

PAGE: Final = 4096
ENTRY: Final = 128
#: Bytes that a key may have.
LONGEST_KEY: Final = ENTRY - 32
#: Places of one segment: the table is read at once.
MOST_PLACES: Final = 1 << 18
#: Bytes that are read or written at once from which on a disk is faster without the page cache.
DIRECT: Final = 128 << 10
#: Bytes of a block; more is no block.
LARGEST: Final = (1 << 32) - PAGE
VERSION: Final = 1
FINGERPRINT: Final = 16

_MAGIC: Final = b"TWKVSEG\n"
_HEAD: Final = struct.Struct("<8sHHIQQQ16sQQ16s")
_CHECK: Final = struct.Struct("<Q")
_BODY: Final = struct.Struct("<QQIBBH")
_WHOLE: Final = struct.Struct("<QQQIBBH")
_MASK: Final = (1 << 64) - 1

#: Where in the first page the writer's state is, and its form: changes, places up to the last written one, sealed.
STATE: Final = 512
_STATE: Final = struct.Struct("<QIB")
STATE_BYTES: Final = _STATE.size

FREE: Final = 0
LIVE: Final = 1
DEAD: Final = 2
#: Where in an entry its state is, and where the key begins.
_STATE_AT: Final = 28
_KEY_AT: Final = 32

#: What an entry without a block looks like.
TOMBSTONE: Final = bytes(_STATE_AT) + bytes([DEAD]) + bytes(ENTRY - _STATE_AT - 1)


@attrs.frozen
class Kind:
    """What all blocks of one segment have in common."""

    key_bytes: int
    #: Bytes from one place to the next.
    stride: int

    @classmethod
    def of(cls, key: bytes, nbytes: int) -> Kind:
        """Where a block belongs: pages for what can go to the disk without a copy, less for what is small."""
        unit = PAGE if nbytes >= PAGE else 64
        return cls(len(key), max(unit, -(-nbytes // unit) * unit))

    def places(self, nbytes: int) -> int:
        """How many a file of about so many bytes has."""
        return max(1, min(MOST_PLACES, (nbytes - PAGE) // (self.stride + ENTRY)))


@attrs.frozen
class Owner:
    """Which process wrote a segment, for people: whether it lives, the lock on the file says."""

    pid: int = 0
    started: int = 0
    boot: bytes = bytes(16)


@attrs.frozen
class Head:
    """What a segment says of itself; its name says number and nonce, too."""

    kind: Kind
    places: int
    number: int
    nonce: int
    fingerprint: bytes
    owner: Owner = Owner()

    @property
    def name(self) -> str:
        """The file's."""
        return f"{self.number:016x}-{self.nonce:016x}.seg"

    @property
    def data(self) -> int:
        """Where the first place is."""
        return PAGE + -(-self.places * ENTRY // PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.data + self.places * self.kind.stride

    def at(self, place: int) -> int:
        """Where a place begins."""
        return self.data + place * self.kind.stride

    def encoded(self) -> bytes:
        """The first page."""
        body = _HEAD.pack(
            _MAGIC, VERSION, self.kind.key_bytes, self.places, self.kind.stride, self.number, self.nonce,
            self.fingerprint, self.owner.pid, self.owner.started, self.owner.boot,
        )  # fmt: skip
        return (body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE, b"\0")

    @classmethod
    def decoded(cls, page: bytes | bytearray) -> Head | str:
        """What a first page says, or what is wrong with it: `foreign`, `version`, `damaged`."""
        if len(page) < _HEAD.size + 8 or page[:8] != _MAGIC:
            return "foreign"
        body = bytes(page[: _HEAD.size])
        _, version, key_bytes, places, stride, number, nonce, mark, pid, started, boot = _HEAD.unpack(body)
        if version != VERSION:
            return "version"
        (check,) = _CHECK.unpack_from(page, _HEAD.size)
        sound = 0 < key_bytes <= LONGEST_KEY and 0 < places <= MOST_PLACES and 0 < stride <= LARGEST and not stride % 64
        if check != xxhash.xxh3_64_intdigest(body) or not sound:
            return "damaged"
        return cls(Kind(key_bytes, stride), places, number, nonce, mark, Owner(pid, started, boot))


@attrs.frozen
class State:
    """What a writer says it has done; a hint, for it may be older than the table, and damaged."""

    changes: int = 0
    #: Every entry behind it is free.
    end: int = 0
    sealed: bool = False

    def encoded(self) -> bytes:
        """For STATE."""
        return _STATE.pack(self.changes & _MASK, self.end, self.sealed)

    @classmethod
    def decoded(cls, raw: bytes | bytearray) -> State:
        """From STATE; whatever is there."""
        changes, end, sealed = _STATE.unpack(raw)
        return cls(changes, end, sealed == 1)


def digest_of(block: bytes | bytearray | memoryview) -> int:
    """The checksum of a block."""
    return xxhash.xxh3_64_intdigest(block)


def entry(head: Head, place: int, key: bytes, digest: int, nbytes: int, stored: int) -> bytes:
    """The entry of a block in a place; `stored` are seconds since 1970, which nothing depends on."""
    body = _BODY.pack(digest, stored, nbytes, LIVE, 0, len(key)) + key.ljust(LONGEST_KEY, b"\0")
    return _CHECK.pack(xxhash.xxh3_64_intdigest(body, (head.nonce + place) & _MASK)) + body


@attrs.frozen
class Entry:
    """A block, as its entry has it."""

    key: bytes
    digest: int
    nbytes: int
    stored: int


def decoded(head: Head, place: int, raw: bytes | bytearray | memoryview) -> Entry | Literal["missing", "corrupt"]:
    """What an entry says; `missing` if it is free or dead, `corrupt` if it is not what was written there."""
    raw = bytes(raw)
    if len(raw) != ENTRY:
        return "corrupt"
    check, digest, stored, nbytes, state, _, key_bytes = _WHOLE.unpack_from(raw)
    if state != LIVE and (raw == TOMBSTONE or not any(raw)):
        return "missing"
    if (
        check != xxhash.xxh3_64_intdigest(raw[8:], (head.nonce + place) & _MASK)
        or key_bytes != head.kind.key_bytes
        or nbytes > head.kind.stride
    ):
        return "corrupt"
    return Entry(raw[_KEY_AT : _KEY_AT + key_bytes], digest, nbytes, stored)


def used(table: bytes | bytearray) -> int:
    """How many entries a table has up to the last that is not free."""
    return -(-len(table.rstrip(b"\0")) // ENTRY)


def keys_of(head: Head, table: bytes | bytearray | memoryview, count: int) -> list[bytes | None]:
    """The keys of the first entries of a table, None where there is no block. They are checked when they are read.

    A million of them are part of opening, so that nothing is done for each but taking its bytes.
    """
    size = head.kind.key_bytes
    form = struct.Struct(f"<{_KEY_AT}x{size}s{LONGEST_KEY - size}x")
    whole = memoryview(table)[: count * ENTRY]
    keys: list[bytes | None] = [key for (key,) in form.iter_unpack(whole)]
    nothing = bytes(size)
    if nothing in keys:  # free or dead, or one whose key is all zeros
        states = whole[_STATE_AT::ENTRY]
        keys = [None if key == nothing and states[at] != LIVE else key for at, key in enumerate(keys)]
    return keys
