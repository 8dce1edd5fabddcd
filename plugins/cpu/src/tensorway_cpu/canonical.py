"""What a row of host memory holds: a block of one cache group, whatever ranks the engine is divided into.

May import the core and the mathematics of `tensorway-kv`. All layers of the group lie one behind the other, with all
heads and all tokens of a block; so rows of engines of unequal tensor, pipeline and context parallelism are the same
bytes, and one of them may load what another has stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import attrs
import msgspec

from tensorway.errors import LayoutInvalid, OptionsInvalid, Unsupported
from tensorway.geometry import Group, Part, Plane, RankGeometry
from tensorway.memory import PAGE
from tensorway_kv.store.sections import BASE, of_group
from tensorway_kv.topology import check_ranks

#: Grows when the same geometry would be other bytes.
_VERSION: Final = 1
_ENCODE: Final = msgspec.msgpack.Encoder().encode
Order = Literal["NHD", "HND"]


@attrs.frozen
class Canon:
    """Rows of each cache group."""

    #: Of each group a rank that holds all of it, with one page that is a row.
    groups: tuple[RankGeometry, ...]
    #: Pages of the engine in a block.
    pages: int

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Of a block of each group."""
        return tuple(group.planes[0].page_bytes for group in self.groups)

    @property
    def row_bytes(self) -> int:
        """From row to row: the longest block, in whole pages, so that files can be read straight into it."""
        return -(-max(self.nbytes) // PAGE) * PAGE

    def at(self, group: int, base: int, rows: int) -> RankGeometry:
        """Rows of a group in memory."""
        plane = msgspec.structs.replace(self.groups[group].planes[0], base=base, stride=self.row_bytes, pages=rows)
        return msgspec.structs.replace(self.groups[group], planes=(plane,))

    def fingerprint(self, facts: Mapping[str, str]) -> bytes:
        """What must be equal for bytes of equal keys to be equal."""
        told = _ENCODE((_VERSION, sorted(facts.items()), self.groups))
        return hashlib.blake2b(told, digest_size=16, person=b"tensorway-cpu").digest()


def canonical(ranks: Sequence[RankGeometry], pages: int, order: Order) -> Canon:
    """Rows for an engine; raises if its blocks cannot be stored one by one."""
    check_ranks(ranks, "this engine")
    asked = "KV blocks were to be kept in host memory."
    if type(pages) is not int or pages < 1:
        raise OptionsInvalid(asked, f"A block was to have {pages!r} pages.", "Give a whole number above zero.")
    sizes = [group.block_tokens for group in ranks[0].groups]
    if 0 in sizes:
        true = f"Group {sizes.index(0)} is a state, which is of a whole sequence and not of a block."
        raise Unsupported(asked, true, "Leave the group out of what is offloaded.")
    return Canon(tuple(_of_group(ranks, group, pages, order) for group in range(len(sizes))), pages)


def _of_group(ranks: Sequence[RankGeometry], group: int, pages: int, order: Order) -> RankGeometry:
    asked, to_do = f"Group {group} was to be kept in host memory.", "Describe all ranks of one engine alike."
    alone = [one for one in (of_group(rank, group) for rank in ranks) if one is not None]
    if not alone:
        raise LayoutInvalid(asked, "No rank has pages of it.", to_do)
    widths: dict[tuple[int, str], int] = {}
    heads: dict[tuple[int, str], int] = {}
    for part in (part for rank in alone for plane in rank.planes for part in plane.parts):
        content = part.layer, part.component
        if widths.setdefault(content, part.width) != part.width:
            true = f"{part.component} of layer {part.layer} is {widths[content]} or {part.width} bytes wide."
            raise LayoutInvalid(asked, true, to_do)
        heads[content] = max(heads.get(content, 0), part.first + part.heads)
    tokens, offset, parts = ranks[0].groups[group].block_tokens * pages, 0, []
    for layer, component in sorted(widths):
        width, count = widths[layer, component], heads[layer, component]
        token, head = (count * width, width) if order == "NHD" else (width, tokens * width)
        parts.append(Part(layer, component, offset, tokens, token, 0, count, head, width))
        offset += tokens * count * width
    if offset >= 1 << 31:
        raise LayoutInvalid(asked, f"A block of it has {offset:,} bytes.", "Give a block fewer pages.")
    made = RankGeometry((Plane("rows", 0, BASE, offset, offset, 1, tuple(parts)),), (Group(tokens),))
    made.check(f"rows of group {group}")
    return made
