"""What makes a file of the store credible: names that tell nothing, and a seal over what it is and what it holds.

May import the core's errors. Everything is keyed with the deployment's secret: who does not know it can
neither guess under which name a block is, nor write one that anybody takes for a block.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final, Literal

from tensorway.errors import Unauthenticated

MAGIC: Final = b"TWKVFILE"
#: Files of another version are in another folder, and never met.
VERSION: Final = 1
#: Magic, version, nothing, rank, layout, name, length of what follows the seal.
_HEAD: Final = struct.Struct("<8sHHI20s20sQ")
_SEAL: Final = 32
#: Bytes before what a file holds.
OVERHEAD: Final = _HEAD.size + _SEAL
NAME_BYTES: Final = 20

#: `torn`: shorter or longer than it should be; `foreign`: it says that it is something else; `corrupt`: what it holds
#: is not what was sealed.
Refused = Literal["torn", "foreign", "corrupt"]


class Seals:
    """Names and seals of one deployment."""

    def __init__(self, secret: str) -> None:
        if not secret:
            raise Unauthenticated(
                "KV blocks were to be shared through a folder.",
                "There is no secret, and whoever can write there could say what a block holds.",
                "Set TENSORWAY_SECRET to the same long random text in every process of the deployment.",
            )
        self._key = hashlib.blake2b(
            secret.encode(errors="surrogatepass"), digest_size=32, person=b"tw.kv.store"
        ).digest()

    def tenant(self, salt: str, epoch: str) -> bytes:
        """What names of one tenant's blocks are made with, in one epoch of an engine's weights."""
        text = f"{epoch}\n{salt}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=32, key=self._key, person=b"tw.kv.tenant").digest()

    @staticmethod
    def name(block: bytes, tenant: bytes) -> bytes:
        """Of a block, by its hash."""
        return hashlib.blake2b(block, digest_size=NAME_BYTES, key=tenant, person=b"tw.kv.block").digest()

    def fingerprint(self, manifest: bytes) -> bytes:
        """Of a layout, by what its manifest says."""
        return hashlib.blake2b(manifest, digest_size=NAME_BYTES, key=self._key, person=b"tw.kv.layout").digest()

    def seal(self, layout: bytes, name: bytes, rank: int, data: bytes | bytearray) -> bytes:
        """What comes before these data in their file."""
        head = _HEAD.pack(MAGIC, VERSION, 0, rank, layout, name, len(data))
        return head + self._sealed(head, memoryview(data))

    def refuses(self, layout: bytes, name: bytes, rank: int, data: bytes | bytearray) -> Refused | None:
        """Why the bytes of a file are not what should be there; None if they are, behind the first `OVERHEAD`."""
        if len(data) < OVERHEAD:
            return "torn"
        head = bytes(data[: _HEAD.size])
        length = len(data) - OVERHEAD
        if head[:-8] != _HEAD.pack(MAGIC, VERSION, 0, rank, layout, name, 0)[:-8]:
            return "foreign"
        if head[-8:] != length.to_bytes(8, "little"):
            return "torn"
        with memoryview(data) as view:
            sealed = self._sealed(head, view[OVERHEAD:])
        return None if hmac.compare_digest(sealed, data[_HEAD.size : OVERHEAD]) else "corrupt"

    def _sealed(self, head: bytes, data: memoryview) -> bytes:
        digest = hashlib.blake2b(head, digest_size=_SEAL, key=self._key, person=b"tw.kv.file")
        digest.update(data)
        return digest.digest()
