"""Damage on purpose: bytes that are nearly right, by a seed.

Room `testing`. `damaged` knows nothing of what the bytes mean: flips, cuts, splices. `reworded` takes a MessagePack
message apart, puts something else into one of its fields, and puts it together again; `redigested` does that to a
description and lets its digest fit, so that nothing but what reads the fields can refuse it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.transport import description

_NUMBERS: Final = (0, 1, -1, 255, 1 << 31, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, -(1 << 63))
_TEXTS: Final = ("", " ", "\n", "\0", "ü", "x" * 200, "../..", "a b", "%s", "local", "nixl", "\U0010ffff")
_OTHERS: Final[tuple[Any, ...]] = (None, True, 1.5, float("nan"), b"", [], {}, [[[]]], {"a": 1}, b"\xff" * 40)
_HEAD: Final = 20


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Some of: bits flipped, bytes replaced, cut short, a piece removed, doubled, or taken from another message."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, to = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        match rng.randrange(7) if out else 6:
            case 0:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + 4] = rng.randbytes(4)
            case 2:
                del out[at:]
            case 3:
                del out[at:to]
            case 4:
                out[at:at] = out[at:to]
            case 5:
                out[rng.randrange(len(out))] = rng.choice((0, 0x7F, 0x80, 0xC1, 0xFF))
            case _:
                other = rng.choice(others) if others else rng.randbytes(40)
                out[at:to] = other[rng.randrange(len(other) + 1) :]
    return bytes(out)


def reworded(rng: random.Random, data: bytes, keep: bytes = b"") -> bytes:
    """A message with one to three of its fields changed; never the bytes of `keep`."""
    value = msgspec.msgpack.decode(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _other(rng, value, keep)
    return _packed(value)


def redigested(rng: random.Random, data: bytes, keep: bytes = b"") -> bytes:
    """A description of which something is not true, under a digest that fits.

    With `keep`, those bytes of the fabric's part stay as they are: what a native library alone can judge. Without, it
    is often an incarnation that nobody has met: some fabrics never listen to one again that was wrong once.
    """
    body = data[_HEAD:]
    if not keep and rng.random() < 0.4:
        body = body.replace(str(msgspec.msgpack.decode(body)[2]).encode(), rng.randbytes(16).hex().encode())
    while True:
        other = damaged(rng, body) if rng.random() < 0.3 else reworded(rng, body, keep)
        if other != body and keep in other:
            return data[:4] + description._digest(other) + other


def opaque(data: bytes) -> bytes:
    """The longest bytes in the fabric's part of a description: what it hands to its library unread, if it does."""
    blob = msgspec.msgpack.decode(msgspec.msgpack.decode(data[_HEAD:])[4])
    return max((part for part in blob if isinstance(part, bytes)), key=len, default=b"")


def _other(rng: random.Random, value: Any, keep: bytes) -> Any:
    """Something else of the same type, mostly."""
    if rng.random() < 0.08:
        return rng.choice((*_NUMBERS, *_TEXTS, *_OTHERS))
    if isinstance(value, bool) or value is None:
        return rng.choice(_OTHERS)
    if isinstance(value, int):
        return rng.choice((*_NUMBERS, value ^ (1 << rng.randrange(62)), value + 1, value - 1))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((*_TEXTS, value[:cut], value + value, value[:cut] + "?" + value[cut + 1 :]))
    if isinstance(value, bytes):
        return _bytes(rng, value, keep)
    if isinstance(value, dict):
        return _pairs(rng, value, keep)
    return _items(rng, value, keep) if isinstance(value, list) else rng.choice(_OTHERS)


def _bytes(rng: random.Random, value: bytes, keep: bytes) -> bytes:
    if keep and value == keep:
        return value
    try:  # a message within a message
        if isinstance(msgspec.msgpack.decode(value), list) and rng.random() < 0.9:
            return reworded(rng, value, keep)
    except (*UNREADABLE, TypeError):  # the last for a key that cannot be one, before msgspec 0.22
        pass
    return damaged(rng, value)


def _pairs(rng: random.Random, value: dict[Any, Any], keep: bytes) -> dict[Any, Any]:
    out = dict(value)
    if out and rng.random() < 0.8:
        name = rng.choice(list(out))
        out[name] = _other(rng, out[name], keep)
    else:
        out |= {f"{rng.random()}": rng.choice(_OTHERS) for _ in range(rng.choice((1, 2000)))}
    return out


def _items(rng: random.Random, value: list[Any], keep: bytes) -> list[Any]:
    out = list(value)
    if out and rng.random() < 0.9:
        at = rng.randrange(len(out))
        out[at] = _other(rng, out[at], keep)
        return out
    return rng.choice((out[:-1], out + out, [*out, None], out * 3000 if len(_packed(out)) < 100 else out[1:]))


def _packed(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError, msgspec.MsgspecError):
        return msgspec.msgpack.encode(repr(value)[:4096])
