"""For tests of pushes, in the processes of ranks: steps that compute layer by layer, and what is on the way.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from tensorway.testing.ranks import Rank
from tensorway_kv import orders
from tensorway_kv.testing.memory import JUNK, Ids, name_of, salted


def fill_layer(rank: Rank, blocks: Ids, start: int, stop: int, salt: int, layer: int) -> None:
    """Compute one layer of some tokens of a request; its states are computed with the rest, by `fill`."""
    held = rank.notes["memory"]
    for _, places, names in held.places(blocks, range(start, stop), states=False):
        if names.size and int(names.flat[0]) // name_of(1, "k", 0, 0, 0) == layer:
            held.memory[places] = salted(names, salt)


def layers_of(rank: Rank) -> Sequence[int]:
    """Those that this rank has."""
    return sorted({part.layer for plane in rank.notes["memory"].geometry.planes for part in plane.parts})


def compute(rank: Rank, plan: bytes, chunks: Sequence[tuple[Ids, int, int, int]], spoken: bool = True) -> list[Any]:
    """One step that computes: its plan, then layer after layer, each sent on if `spoken`; what has ended."""
    mover = rank.notes["mover"]
    mover.submit(plan)
    for layer in layers_of(rank):
        for blocks, start, stop, salt in chunks:
            fill_layer(rank, blocks, start, stop, salt, layer)
        if spoken:
            mover.after_layer(layer)
    found: list[Any] = mover.poll()
    return found


def landing_bytes(rank: Rank) -> bytes:
    """Everything that is in landing memory."""
    return b"".join(ctypes.string_at(one.address, one.nbytes) for one in rank.notes["mover"]._staging.regions)


def pushing(rank: Rank, connected: bool = False) -> int:
    """How many pushes are on their way from here; of those that are connected, if so."""
    pushes = rank.notes["mover"]._serving._pushes.values()
    return sum(push.link.bound is not None or not connected for push in pushes)


def sent_early(rank: Rank) -> int:
    """Tokens that were sent layer by layer, of the push that has fewest."""
    pushes = rank.notes["mover"]._serving._pushes.values()
    return min(sum(stop - start for start, stop in push._spans) for push in pushes) if pushes else 0


def verify_several(
    rank: Rank, requests: Sequence[tuple[Ids, int, int, int]], windows: Sequence[int], states: bool = True
) -> int:
    """See that exactly these tokens of all these requests are there; how many bytes that is.

    Of each its blocks, from which token to before which, and its salt; of groups with a window its last tokens.
    """
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for blocks, start, stop, salt in requests:
        for group, window in enumerate(windows):
            begin = max(start, stop - window) if window else start
            for plane, places, names in held.places(blocks, range(begin, stop), states):
                if plane.group == group:
                    expected[places] = salted(names, salt)
    np.testing.assert_array_equal(held.memory, expected)
    return int((expected != JUNK).sum())


def listen(rank: Rank) -> list[Any]:
    """What has been heard, and has ended."""
    found: list[Any] = rank.notes["mover"].poll()
    return found


def begin_pushes(rank: Rank, plan: bytes, words_only: bool = False) -> None:
    """Write the words of a plan and, unless it is to be these only, begin its pushes; none of them comes to its end."""
    mover = rank.notes["mover"]
    what = orders.decode(plan, mover.incarnation)
    for mark in what.marks:
        mover._board.write(mark)
    if not words_only:
        mover._serving.submit(what)


def hear(rank: Rank, message: Any) -> None:
    """As if it came from who it says it is from."""
    landing = rank.notes["mover"]._landings.get((message.sender, message.request, message.epoch))
    if landing is not None:
        landing.heard(message)


class _Short:
    """A transport that carries shorter messages."""

    def __init__(self, endpoint: Any, nbytes: int) -> None:
        self._endpoint, self.capabilities = endpoint, attrs.evolve(endpoint.capabilities, max_notification=nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._endpoint, name)


def take_notifications_of(rank: Rank, nbytes: int) -> None:
    """Carry none that is longer."""
    mover = rank.notes["mover"]
    mover._reader.endpoint = _Short(mover.endpoint, nbytes)


def at_rest(rank: Rank, seconds: float) -> float:
    """Which part of a processor the process uses while nobody asks it anything."""
    before, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return (time.process_time() - before) / (time.monotonic() - began)
