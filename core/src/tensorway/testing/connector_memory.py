"""KV memory of a rank whose every byte is known: by layer, component, token, head and byte, and of which request.

Room `testing`; may import `kv` and the rooms below. No array library: pages are small, and rows are compared as bytes.
Where a byte lies is worked out from the `Shape` alone, and by nothing that a connector uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import attrs

from tensorway import memory
from tensorway.kv import Group, Part, Plane, RankGeometry
from tensorway.memory import Region

#: What is in memory that nobody has written to, and what blocks hold that are used for something else.
JUNK: Final = 0xEE
SPOILED: Final = 0x11
#: Blocks of a rank.
BLOCKS: Final = 32
_COMPONENTS: Final = ("k", "v")
#: Memory before the first page and between planes, which belongs to nobody.
_ROOM: Final = 48


@attrs.frozen
class Shape:
    """What the ranks of an engine hold; engines of one model differ in the first three."""

    tp: int = 1
    page_tokens: int = 4
    order: Literal["NHD", "HND"] = "NHD"
    heads: int = 6
    layers: int = 2
    width: int = 8

    @property
    def page_bytes(self) -> int:
        """Of one block of one layer at one rank: its keys, then its values."""
        return len(_COMPONENTS) * self.page_tokens * (self.heads // self.tp) * self.width


class Memory:
    """The memory of one rank, and its geometry."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.shape, self._first, self._heads = shape, rank * (shape.heads // shape.tp), shape.heads // shape.tp
        self._plane = BLOCKS * shape.page_bytes + _ROOM
        self._buffer = memory.shared(_ROOM + shape.layers * self._plane)
        base = Region.of(self._buffer).address
        planes = [
            Plane(
                f"layer.{layer}", 0, base + self._base(layer), shape.page_bytes, shape.page_bytes, BLOCKS,
                tuple(self._part(layer, nth, name) for nth, name in enumerate(_COMPONENTS)),
            )
            for layer in range(shape.layers)
        ]  # fmt: skip
        self.geometry = RankGeometry(tuple(planes), (Group(shape.page_tokens),))
        self.wipe()

    def wipe(self) -> None:
        """Let nothing be there."""
        self._buffer[:] = bytes([JUNK]) * len(self._buffer)

    def fill(
        self, blocks: Sequence[int], start: int, stop: int, salt: int, layers: Sequence[int] | None = None
    ) -> None:
        """Compute tokens of the request that `salt` stands for."""
        for at, row in self._rows(blocks, start, stop, salt, layers):
            self._buffer[at : at + len(row)] = row

    def spoil(self, blocks: Sequence[int]) -> None:
        """Use blocks for something else."""
        for layer in range(self.shape.layers):
            for block in blocks:
                at = self._base(layer) + block * self.shape.page_bytes
                self._buffer[at : at + self.shape.page_bytes] = bytes([SPOILED]) * self.shape.page_bytes

    def holds(
        self, blocks: Sequence[int], start: int, stop: int, salt: int, layers: Sequence[int] | None = None
    ) -> bool:
        """Whether these tokens are there, whatever else is."""
        return all(self._buffer[at : at + len(row)] == row for at, row in self._rows(blocks, start, stop, salt, layers))

    def wrong(self, spans: Sequence[tuple[Sequence[int], int, int, int]], beside: Sequence[int] = ()) -> str:
        """What is not as it should be: these tokens are there, and nothing was written elsewhere; empty if it is.

        `beside`: blocks that belong to requests which failed, and may hold anything.
        """
        expected = bytearray([JUNK]) * len(self._buffer)
        for layer in range(self.shape.layers):
            for block in beside:
                at = self._base(layer) + block * self.shape.page_bytes
                expected[at : at + self.shape.page_bytes] = self._buffer[at : at + self.shape.page_bytes]
        for blocks, start, stop, salt in spans:
            for at, row in self._rows(blocks, start, stop, salt, None):
                expected[at : at + len(row)] = row
        if self._buffer == expected:
            return ""
        places = [at for at, (has, should) in enumerate(zip(self._buffer, expected, strict=True)) if has != should]
        return f"{len(places)} bytes are wrong, the first {self._place(places[0])}"

    def _place(self, at: int) -> str:
        layer, rest = divmod(max(at - _ROOM, 0), self._plane)
        block, byte = divmod(rest, self.shape.page_bytes)
        where = f"byte {byte} of block {block} of layer {layer}" if block < BLOCKS and at >= _ROOM else "outside pages"
        return f"{where}: it is {self._buffer[at]:#x}"

    def _base(self, layer: int) -> int:
        return _ROOM + layer * self._plane

    def _strides(self) -> tuple[int, int]:
        """From one token to the next, and from one head to the next."""
        shape = self.shape
        if shape.order == "NHD":
            return self._heads * shape.width, shape.width
        return shape.width, shape.page_tokens * shape.width

    def _part(self, layer: int, nth: int, name: str) -> Part:
        token, head = self._strides()
        offset = nth * self.shape.page_bytes // len(_COMPONENTS)
        return Part(
            layer, name, offset, self.shape.page_tokens, token, self._first, self._heads, head, self.shape.width
        )

    def _rows(
        self, blocks: Sequence[int], start: int, stop: int, salt: int, layers: Sequence[int] | None
    ) -> Iterator[tuple[int, bytes]]:
        """Where each head of each of these tokens is, and its bytes."""
        shape, (token, head) = self.shape, self._strides()
        for layer in range(shape.layers) if layers is None else layers:
            for nth, component in enumerate(_COMPONENTS):
                part = self._base(layer) + nth * shape.page_bytes // len(_COMPONENTS)
                for position in range(start, stop):
                    page = part + blocks[position // shape.page_tokens] * shape.page_bytes
                    row = page + position % shape.page_tokens * token
                    for local in range(self._heads):
                        name = f"{salt} {layer} {component} {position} {self._first + local}"
                        yield row + local * head, content(name, shape.width)


def content(name: str, nbytes: int) -> bytes:
    """The bytes of one head of one token; those of another are others."""
    return hashlib.blake2b(name.encode(), digest_size=nbytes).digest()


def hashes(salt: int, tokens: int, page_tokens: int) -> tuple[bytes, ...]:
    """By content: one for each full block of the request that `salt` stands for."""
    return tuple(
        hashlib.blake2b(f"{salt} {block}".encode(), digest_size=32).digest() for block in range(tokens // page_tokens)
    )
