"""Traces of requests, checked line by line: one JSON object a line, with `hash_ids` and perhaps a `timestamp`.

May import the core and `replay`. That is the format of the traces that Mooncake published; other fields are ignored. A
file is hostile until checked: its bytes, its lines, and every number in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import OptionsInvalid
from tensorway.offload import OffloadKey, make_offload_key
from tensorway_offload.replay import Request

if TYPE_CHECKING:
    from tensorway.cli.output import Output

#: More than this is refused: a replay keeps all of it in memory, several times.
MOST_BYTES: Final = 1 << 30
_MOST_LINE: Final = 64 << 20
_MOST_BLOCKS: Final = 1 << 26
_TO_DO: Final = 'Give one JSON object a line, such as {"timestamp": 0, "hash_ids": [1, 2, 3]}.'


class _Line(msgspec.Struct):
    """What is read of a line."""

    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]]
    #: Milliseconds.
    timestamp: float = 0.0


_DECODER: Final = msgspec.json.Decoder(_Line)


def read(path: Path, out: Output) -> list[Request]:
    """All requests of a trace, in their order."""
    requests: list[Request] = []
    keys: dict[int, OffloadKey] = {}
    total, first, last = 0, None, -math.inf
    for number, line in _lines(path):
        try:
            given = _DECODER.decode(line)
        except UNREADABLE as error:
            _refuse(path, f"Line {number} is no request: {str(error)[:200]}.")
        if not math.isfinite(given.timestamp) or given.timestamp < last:
            _refuse(path, f"The timestamp of line {number} is {given.timestamp:g}, and that before it {last:g}.")
        if len(set(given.hash_ids)) < len(given.hash_ids):
            _refuse(path, f"Line {number} has one block twice.")
        if (total := total + len(given.hash_ids)) > _MOST_BLOCKS:
            _refuse(path, f"It has more than {_MOST_BLOCKS:,} blocks by line {number}.", "Replay a part of it.")
        last = given.timestamp
        first = last if first is None else first
        request = tuple(keys.setdefault(block, _key(block)) for block in given.hash_ids)
        requests.append(Request((last - first) / 1000, request))
        if number % 100_000 == 0:
            out.progress(f"Read {number:,} lines of {path.name}")
    if not total:
        _refuse(path, "It has no request with a block.")
    return requests


def _key(block: int) -> OffloadKey:
    return make_offload_key(block.to_bytes(8, "big"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            left, number = MOST_BYTES, 0
            while line := file.readline(_MOST_LINE + 1):
                number += 1
                left -= len(line)
                if len(line) > _MOST_LINE or left < 0:
                    _refuse(
                        path, f"It has more than {MOST_BYTES if left < 0 else _MOST_LINE:,} bytes by line {number}."
                    )
                if line.strip():
                    yield number, line
    except OSError as error:
        _refuse(path, f"The system does not read it: {error.strerror}.")


def _refuse(path: Path, true: str, to_do: str = _TO_DO) -> NoReturn:
    raise OptionsInvalid(f"The trace {path} was to be replayed.", true, to_do)
