"""Paged KV: one rank's pages as arrays, and which blocks of an engine are free, used, or known by their content.

May import the core, numpy and this dist's layouts. `Pages` is beside a rank's memory and knows no request; `BlockPool`
is where requests are scheduled and knows no memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tensorway import memory
from tensorway.errors import LayoutInvalid
from tensorway.kv import Part, Plane
from tensorway.memory import Region
from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry
from tensorway_kv.reference.model import ModelShape

Array = NDArray[Any]
Order = Literal["NHD", "HND"]

_ITEM: Final = np.dtype(np.float32).itemsize


class Pages:
    """Keys and values of one rank, in memory that others can map; where each lies only the geometry says."""

    def __init__(
        self, shape: ModelShape, *, blocks: int, page_tokens: int, order: Order, rank: int = 0, ranks: int = 1
    ) -> None:
        components = attention(shape.kv_heads, shape.head_width * _ITEM)
        cache = Cache(range(shape.layers), components, page_tokens, order=order)
        kept: dict[str, memoryview] = {}

        def base(name: str, nbytes: int) -> int:
            kept[name] = memory.shared(nbytes)
            return Region.of(kept[name]).address

        #: What a connector is told of it.
        self.geometry = rank_geometry([cache], Parallel(ranks), rank, blocks=blocks, base=base)
        self._page_tokens = page_tokens
        self._views = {
            (part.layer, part.component): _view(kept[plane.name], plane, part)
            for plane in self.geometry.planes
            for part in plane.parts
        }

    def write(self, layer: int, blocks: Sequence[int], first: int, keys: Array, values: Array) -> None:
        """Put the rows of tokens from `first` on where they belong."""
        positions = np.arange(first, first + len(keys))
        pages, places = np.asarray(blocks, np.int64)[positions // self._page_tokens], positions % self._page_tokens
        self._views[layer, "k"][pages, places] = keys
        self._views[layer, "v"][pages, places] = values

    def read(self, layer: int, blocks: Sequence[int], tokens: int) -> tuple[Array, Array]:
        """The rows of so many tokens, from the first on."""
        used = np.asarray(blocks[: -(-tokens // self._page_tokens)], np.int64)
        keys, values = (self._views[layer, name][used] for name in "kv")
        return keys.reshape(-1, *keys.shape[2:])[:tokens], values.reshape(-1, *values.shape[2:])[:tokens]


def _view(buffer: memoryview, plane: Plane, part: Part) -> Array:
    """One component of a layer: page, token, head, number."""
    shape = (plane.pages, part.tokens, part.heads, part.width // _ITEM)
    strides = (plane.stride, part.token_stride, part.head_stride, _ITEM)
    found: Array = np.ndarray(shape, np.float32, buffer, part.offset, strides)
    return found


def names_of(tokens: Sequence[int], page_tokens: int, salt: str = "") -> list[bytes]:
    """A name for each full block, which says all tokens up to its end and whose they are."""
    name, found = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest(), []
    for stop in range(page_tokens, len(tokens) + 1, page_tokens):
        content = np.asarray(tokens[stop - page_tokens : stop], "<i4").tobytes()
        name = hashlib.blake2b(name + content, digest_size=16).digest()
        found.append(name)
    return found


class BlockPool:
    """All block ids of an engine. One that nobody uses is free, and may be known by its content until it is taken."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise LayoutInvalid(f"A cache of {blocks} blocks was to be made.", "It holds nothing.", "Give it more.")
        self._users: Counter[int] = Counter()
        self._unknown = deque(range(blocks))
        #: Free and known; which was used longest ago is taken first.
        self._known: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._unknown) + len(self._known)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the first of these names, up to one that is not known."""
        found = []
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """One more uses these."""
        for block in blocks:
            self._users[block] += 1
            self._known.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """So many free blocks, of unknown content from now on; None if there are not so many."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            block = self._unknown.popleft() if self._unknown else self._known.popitem(last=False)[0]
            self._blocks.pop(self._names.pop(block, b""), None)
            self._users[block] = 1
            taken.append(block)
        return taken

    def name(self, block: int, name: bytes) -> None:
        """What a block that is used holds from now on; a content that has a block keeps that."""
        if name not in self._blocks and block not in self._names:
            self._blocks[name], self._names[block] = block, name

    def give(self, blocks: Iterable[int]) -> None:
        """One less uses these; the last of a list is forgotten first, for less is known by it."""
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if self._users[block] < 0:
                true = "Nobody uses it."
                raise LayoutInvalid(f"Block {block} was given back.", true, "Give each block back once.")
            if not self._users[block]:
                del self._users[block]
                if block in self._names:
                    self._known[block] = None
                else:
                    self._unknown.append(block)

    def forget(self) -> None:
        """Nothing is known by its content any more."""
        self._unknown.extend(self._known)
        self._known.clear()
        self._names.clear()
        self._blocks.clear()
