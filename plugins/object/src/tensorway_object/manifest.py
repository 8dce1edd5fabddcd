"""What one fingerprint stands for, written beside its blocks: for people, and so that nobody takes another's for it.

May import the errors, msgspec, and the core's offload room.
"""

from __future__ import annotations

from typing import Final

import msgspec
from xxhash import xxh3_64_hexdigest

from tensorway.errors import Incompatible
from tensorway.offload import TierContext
from tensorway_object.frames import VERSION

#: Bytes of one; what is longer is not ours.
MOST: Final = 1 << 20


class _Manifest(msgspec.Struct):
    version: int
    fingerprint: str
    nbytes: list[int]
    facts: dict[str, str]
    #: Of all the others, so that one that was damaged is not taken for a deployment with other facts.
    digest: str = ""


_DECODER: Final = msgspec.json.Decoder(_Manifest)
_ENCODER: Final = msgspec.json.Encoder()


def manifest_of(context: TierContext) -> bytes:
    """As an object; equal contexts have equal ones."""
    facts = dict(sorted(context.facts.items()))
    made = _Manifest(VERSION, context.fingerprint.hex(), list(context.nbytes), facts)
    made.digest = _digest(made)
    return msgspec.json.format(_ENCODER.encode(made))


def check(data: bytes, context: TierContext, where: str) -> bool:
    """Whether this is a manifest that can be read; raises if it is of other facts than ours."""
    try:
        found = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    if found.digest != _digest(found):
        return False
    ours = _DECODER.decode(manifest_of(context))
    if found == ours:
        return True
    differ = [name for name in ("version", "fingerprint", "nbytes") if getattr(found, name) != getattr(ours, name)]
    differ += sorted(name for name in {*found.facts, *ours.facts} if found.facts.get(name) != ours.facts.get(name))
    raise Incompatible(
        f"The tier object was to keep blocks beside those that {where} tells of.",
        f"Those are of another kind: {', '.join(differ)[:300]} differ.",
        "Use another url, or remove what is below that fingerprint: equal fingerprints must mean equal facts.",
    )


def _digest(of: _Manifest) -> str:
    return xxh3_64_hexdigest(_ENCODER.encode((of.version, of.fingerprint, of.nbytes, of.facts)))
