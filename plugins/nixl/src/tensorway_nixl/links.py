"""What the fabric keeps of peers, routes and transfers.

May import tensorway's ground, the transport's block tables and `agent`.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import attrs

from tensorway.errors import TensorwayError
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Operation
from tensorway_nixl.agent import List


@attrs.define(eq=False)
class Remote:
    """One incarnation of a peer, as NIXL knows it; all links to it share it."""

    name: str
    incarnation: str
    metadata: bytes = attrs.field(default=b"", repr=False)
    #: How many links use it, and how many transfers with it are not over.
    links: int = 0
    jobs: int = 0
    #: Whether it has answered.
    met: bool = False
    #: Why it is lost; empty while it is not known to be.
    lost: str = ""
    #: Whether its connection may be kept for the next link to it, once nobody uses it.
    keep: bool = False


@attrs.define(eq=False)
class Link:
    """One connection of the endpoint to a peer."""

    remote: Remote
    lane: str
    closed: bool = False


@attrs.frozen(eq=False)
class Lists:
    """Two lists that NIXL has prepared, and what they are of; released when the last that uses them is gone."""

    local: BlockTable
    far: BlockTable
    ours: List
    theirs: List
    #: Into how many parts blocks are cut.
    parts: int


@attrs.define(eq=False)
class Prepared:
    """A route: its two tables, and the lists of them as they are now."""

    link: Link
    local: BlockTable
    far: BlockTable
    lists: Lists
    #: For each operation NIXL's word, and what is asked for by it.
    words: dict[Operation, tuple[Any, str]] = attrs.field(repr=False)


@attrs.define(eq=False)
class Job:
    """One NIXL transfer."""

    remote: Remote
    #: What was asked for, for its errors.
    asked: str
    #: NIXL's handle until it is released; NIXL crashes on one that was.
    handle: Any
    #: The lists that it uses.
    keep: object = attrs.field(repr=False)
    #: What UCX expects it to take.
    microseconds: int = 0
    #: Whether it was done when its post returned.
    at_once: bool = False
    error: TensorwayError | None = None
    #: When nothing of a failed one is under way any more.
    quiet_at: float = math.inf
    #: Held while NIXL is asked about it: at the end of the process two threads may ask.
    lock: threading.RLock = attrs.field(factory=threading.RLock, repr=False)
