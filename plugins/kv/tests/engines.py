"""What only these tests do to engines of `tensorway_kv.testing.engine`: one simple shape, and faults by name."""

from __future__ import annotations

import importlib.util

import attrs
import numpy as np
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.testing.possessions import fewest
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_kv import asking, messages
from tensorway_kv.layouts import Cache, attention
from tensorway_kv.testing.engine import open_mover
from tensorway_kv.testing.memory import COMPONENTS, JUNK, name_of, salted


def _over(transport, *modules):
    """A parameter that is skipped where something is missing."""
    missing = [name for name in (f"tensorway_{transport}", *modules) if importlib.util.find_spec(name) is None]
    reason = f'needs {", ".join(missing)}: pip install "tensorway[{transport}]"'
    return pytest.param(transport, marks=pytest.mark.skipif(bool(missing), reason=reason))


TRANSPORTS = ["local", _over("nixl", "nixl_cu12")]
#: For what takes long, and is to be seen over each of them all the same.
ALL_TRANSPORTS = [*TRANSPORTS, _over("mooncake", "mooncake")]


@attrs.frozen
class Shape:
    """What an engine's ranks hold."""

    tp: int = 1
    heads: int = 6
    page_tokens: int = 4
    order: str = "NHD"
    layers: int = 2
    width: int = 8
    window: int = 0

    def caches(self):
        return [
            Cache(
                range(self.layers),
                attention(self.heads, self.width),
                self.page_tokens,
                order=self.order,
                window=self.window,
            )
        ]


# -- in the processes


def open_faulty_mover(rank, engine, shape, number, options, emulated=frozenset()):
    """The same over a fabric whose posts go wrong as the test says."""
    faults = Faults(1, delay=1.0)
    fabric = rank.notes["fabric"] = FaultyFabric(LocalFabric(), faults)
    fabric.capabilities = attrs.evolve(fabric.capabilities, emulated=emulated)
    rank.notes["faults"] = faults
    create = tensorway.create
    tensorway.create = lambda kind, *rest: Endpoint(fabric) if kind == "transport" else create(kind, *rest)
    try:
        open_mover(rank, engine, shape, number, options)
    finally:
        tensorway.create = create


def open_asking_mover(rank, engine, shape, number, options):
    """The same over a fabric that says that its reads are slow, so that who reads asks to be written to."""
    asking.WORTH = 1
    open_faulty_mover(rank, engine, shape, number, options, frozenset({("cma", "read"), ("shm", "read")}))


def let(rank, *faults):
    """What goes wrong next."""
    rank.notes["faults"].next(*faults)


def let_pass(rank, posts=None, fault="stall"):
    """Let so many posts through and none that follows, which go wrong alike; without a number let all through again."""
    faults = rank.notes["faults"]
    if posts is None:
        rank.notes["fabric"].faults = faults
        return
    rank.notes["fabric"].faults = _After(faults, posts, fault)


class _After:
    """Faults of which the first posts are free."""

    def __init__(self, faults, posts, fault):
        self.pause, self._faults, self._left, self._fault = faults.pause, faults, posts, fault

    def choose(self, among):
        if self._fault not in among:
            return self._faults.choose(among)
        self._left -= 1
        return "" if self._left >= 0 else self._fault


def release(rank):
    """Let go on what was stalled."""
    rank.notes["fabric"].release()


def await_layer(rank, layer, deadline):
    rank.notes["mover"].before_layer(layer, deadline)


def verify_layers(rank, blocks, start, stop, layers):
    """See that exactly these tokens of these layers are there, and nothing else; how many bytes that is."""
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for _, places, names in held.places(blocks, range(start, stop)):
        if names.flat[0] // name_of(1, COMPONENTS[0], 0, 0, 0) in layers:
            expected[places] = salted(names, 1)
    np.testing.assert_array_equal(held.memory, expected)
    return int((expected != JUNK).sum())


def look_away(rank):
    """From now on it fetches no words: a reader that is slow between what it has read and the words beside it."""
    scratch = rank.notes["mover"]._reader.scratch
    rank.notes["places"] = list(iter(scratch.take, None))


def look(rank):
    """It fetches words again."""
    for place in rank.notes.pop("places"):
        rank.notes["mover"]._reader.scratch.give(place)


def flush(rank, deadline):
    rank.notes["mover"].flush(deadline)


def leftovers(rank):
    """Open files and threads of the process."""
    return fewest()[::-1]


def say(rank, engine, to, message):
    """Tell a rank of a producer something, whatever it is."""
    (link,) = [link for link in rank.notes["mover"]._links if link.engine == engine]
    link.send(to, messages.encode(message) if not isinstance(message, bytes) else message)


def life(rank):
    return rank.notes["mover"].incarnation


def take_no_notifications(rank, times):
    """Let the peer's inbox be full for so many messages."""
    endpoint = rank.notes["mover"].endpoint
    notify, left = endpoint.notify, [times]

    def full(*arguments):
        if left[0]:
            left[0] -= 1
            raise DeadlineExceeded("A message was to be sent.", "The peer takes no more.", "Try again.")
        notify(*arguments)

    endpoint.notify = full
