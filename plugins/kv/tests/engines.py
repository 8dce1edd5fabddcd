"""What only these tests do to engines of `tensorway_kv.testing.engine`: one simple shape, and faults by name."""

from __future__ import annotations

import gc
import importlib.util
import threading

import attrs
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.testing.possessions import open_files
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_kv import messages
from tensorway_kv.layouts import Cache, attention
from tensorway_kv.testing.engine import open_mover

TRANSPORTS = [
    "local",
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ("tensorway_nixl", "nixl_cu12"))),
            reason='needs NIXL: pip install "tensorway[nixl]"',
        ),
    ),
]


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


def open_faulty_mover(rank, engine, shape, number, options):
    """The same over a fabric whose posts go wrong as the test says."""
    faults = Faults(1, delay=1.0)
    fabric = rank.notes["fabric"] = FaultyFabric(LocalFabric(), faults)
    rank.notes["faults"] = faults
    create = tensorway.create
    tensorway.create = lambda kind, *rest: Endpoint(fabric) if kind == "transport" else create(kind, *rest)
    try:
        open_mover(rank, engine, shape, number, options)
    finally:
        tensorway.create = create


def let(rank, *faults):
    """What goes wrong next."""
    rank.notes["faults"].next(*faults)


def release(rank):
    """Let go on what was stalled."""
    rank.notes["fabric"].release()


def flush(rank, deadline):
    rank.notes["mover"].flush(deadline)


def leftovers(rank):
    """Open files and threads of the process."""
    gc.collect()  # what earlier tests left
    return open_files().total(), threading.active_count()


def say(rank, engine, to, message):
    """Tell a rank of a producer something, whatever it is."""
    (link,) = [link for link in rank.notes["mover"]._links.values() if link.engine == engine]
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
