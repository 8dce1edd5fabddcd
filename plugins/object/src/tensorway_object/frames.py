"""What an object holds: a header that says which block it is, and the block. May import the core's offload room.

Whatever was done to an object, what is taken for a block is the one that was asked for: the header has a digest of its
own and one of the block, so that a bit anywhere counts. Neither is a seal: who may write to the bucket may lie.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

from xxhash import xxh3_64_intdigest

from tensorway.offload import OffloadKey

VERSION: Final = 1
_MAGIC: Final = b"TWBLOCK\n"
#: Magic, version, length of the key, of the block, digest of the block, fingerprint, key; then the header's own digest.
_HEAD: Final = struct.Struct("<8sHHQQ16s76s")
_DIGEST: Final = struct.Struct("<Q")
#: Bytes before the block.
HEADER: Final = _HEAD.size + _DIGEST.size


def digest_of(fingerprint: bytes) -> bytes:
    """What stands for a fingerprint in headers: as long for all."""
    return hashlib.blake2b(fingerprint, digest_size=16).digest()


def header_of(key: OffloadKey, block: memoryview, fingerprint: bytes) -> bytes:
    """What goes before a block; the fingerprint as `digest_of` says it."""
    head = _HEAD.pack(_MAGIC, VERSION, len(key), len(block), xxh3_64_intdigest(block), fingerprint, key)
    return head + _DIGEST.pack(xxh3_64_intdigest(head))


def wrong_with(data: memoryview, key: OffloadKey, nbytes: int, fingerprint: bytes) -> str:
    """Why this is not the block that was asked for; empty if it is."""
    if len(data) < HEADER:
        return "it is cut short"
    head = data[: _HEAD.size]
    (digest,) = _DIGEST.unpack_from(data, _HEAD.size)
    if digest != xxh3_64_intdigest(head):
        return "its header was changed, or is none"
    magic, version, length, block, expected, of, name = _HEAD.unpack(head)
    if (magic, version) != (_MAGIC, VERSION):
        return "it is of another kind or version"
    if (of, name[:length], length) != (fingerprint, key, len(key)):
        return "it is another block"
    if block != nbytes:
        return f"it is of a block of {block} bytes, not {nbytes}"
    if len(data) != HEADER + nbytes:
        return "it is cut short" if len(data) < HEADER + nbytes else "more follows on the block"
    return "" if expected == xxh3_64_intdigest(data[HEADER:]) else "its bytes were changed"
