"""What every byte of a rank's KV pages is, in coordinates that all engines share: layer, component, token, head, byte.

Below the movements, for two of them: handing over and offloading. May import the transport's blocks and the ground.
Only descriptions, and what makes one valid: how two of them meet is mathematics of the dist `tensorway-kv`. They cross
processes and come from peers, so they are checked before anything trusts them.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Final

import msgspec

from tensorway.errors import LayoutInvalid, MemoryInvalid
from tensorway.memory import ADDRESS_LIMIT, Region
from tensorway.transport.blocks import BlockTable

#: More than any model or engine has; beyond that a number is a mistake or an attack.
MAX_PLANES: Final = 4096
MAX_PARTS: Final = 4096
_MAX: Final = 1 << 31

_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=_MAX)]
_Address = Annotated[int, msgspec.Meta(ge=1, le=ADDRESS_LIMIT - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One component of one layer in a page: which tokens and heads it has, and where each of their bytes lies.

    The byte `b` of head `h` of the `t`-th token of the page is at `offset + t * token_stride + (h - first) *
    head_stride + b`. So both orders of tokens and heads, packed keys and values, latents and scales are one thing.
    """

    layer: _Count
    #: What it is: `k`, `v`, `latent`, `scale.k`, `conv.x`, `ssm`: equal names on both sides are equal content.
    component: _Name
    offset: _Count
    #: Tokens of a page; 0 for a state, which is of the whole sequence and has no token axis.
    tokens: _Count
    token_stride: _Count
    #: The first of the model's heads that is here, and how many are; for a state, of its channels.
    first: _Count
    heads: _Positive
    head_stride: _Positive
    #: Bytes of one head of one token.
    width: _Positive

    @property
    def end(self) -> int:
        """Behind its last byte in the page."""
        rows = max(self.tokens - 1, 0) * self.token_stride
        return self.offset + rows + (self.heads - 1) * self.head_stride + self.width


class Plane(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Pages of equal shape in one region: page `i` is `page_bytes` long and begins at `base + i * stride`."""

    name: _Name
    #: The cache group whose block ids count these pages.
    group: _Count
    base: _Address
    page_bytes: _Positive
    stride: _Positive
    pages: _Positive
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    device: _Name = "cpu"

    @property
    def region(self) -> Region:
        """The memory of all pages."""
        return Region(self.base, self.stride * (self.pages - 1) + self.page_bytes, self.device)

    def table(self) -> BlockTable:
        """Its pages as blocks."""
        return BlockTable((self.region.address,), self.page_bytes, self.stride, self.pages, self.device)


class Group(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A cache group: pages that one list of block ids addresses."""

    #: Tokens of one block over all context-parallel ranks; 0 for a state: its last block id is the one that counts.
    block_tokens: _Count
    #: A request needs only so many of its last tokens; 0 for all.
    window: _Count = 0


class Share(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which positions a context-parallel rank holds: `p` is on rank `p // interleave % of`."""

    rank: _Count = 0
    of: _Positive = 1
    interleave: _Positive = 1


class RankGeometry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All KV memory of one rank of an engine."""

    planes: Annotated[tuple[Plane, ...], msgspec.Meta(min_length=1, max_length=MAX_PLANES)]
    groups: Annotated[tuple[Group, ...], msgspec.Meta(min_length=1, max_length=MAX_PLANES)]
    share: Share = Share()

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many block ids each group has here."""
        return tuple(
            min((plane.pages for plane in self.planes if plane.group == group), default=0)
            for group in range(len(self.groups))
        )

    def check(self, whose: str) -> None:
        """Raise `LayoutInvalid` unless pages hold their parts, no part overlaps itself, and groups exist."""
        asked = f"The KV geometry of {whose} was given."
        names = Counter(plane.name for plane in self.planes)
        if not names:
            raise LayoutInvalid(asked, "It has no planes.", "Leave out ranks that hold nothing.")
        if max(names.values()) > 1:
            name = names.most_common(1)[0][0]
            raise LayoutInvalid(asked, f"Two planes are called {name}.", "Give each plane a name of its own.")
        if self.share.rank >= self.share.of:
            true = f"It has share {self.share.rank} of {self.share.of}."
            raise LayoutInvalid(asked, true, "Count context-parallel ranks from 0.")
        held: set[tuple[int, str]] = set()
        for plane in self.planes:
            self._check_plane(asked, plane)
            for part in plane.parts:
                if (part.layer, part.component) in held:
                    true = f"{part.component} of layer {part.layer} is there twice; the second is in {plane.name}."
                    raise LayoutInvalid(asked, true, "Give each component of a layer once: a page has all its heads.")
                held.add((part.layer, part.component))

    def _check_plane(self, asked: str, plane: Plane) -> None:
        to_do = "Describe the memory as the engine lays it out."
        if plane.group >= len(self.groups):
            raise LayoutInvalid(asked, f"{plane.name} is of group {plane.group}, which it has not.", to_do)
        try:
            plane.table()
        except MemoryInvalid as error:
            raise LayoutInvalid(asked, f"{plane.name} is no memory. {error.true}", to_do) from error
        if len({part.tokens for part in plane.parts}) > 1:
            raise LayoutInvalid(asked, f"Parts of {plane.name} have pages of unequal tokens.", to_do)
        whole, rest = divmod(self.groups[plane.group].block_tokens, self.share.of)
        if self.share.of > 1 and whole % self.share.interleave:  # or a rank's pages would be unequally full
            true = f"A page of {plane.name} has {whole} tokens; ranks take turns after {self.share.interleave}."
            raise LayoutInvalid(asked, true, to_do)
        for part in plane.parts:
            if part.end > plane.page_bytes or not _simple(part):
                true = (
                    f"{part.component} of layer {part.layer} does not fit a page of {plane.name}, or overlaps itself."
                )
                raise LayoutInvalid(asked, true, to_do)
            if part.tokens and (rest or part.tokens != whole):
                true = f"A page of {plane.name} has {part.tokens} tokens; a block's share is {whole} and {rest} over."
                raise LayoutInvalid(asked, true, to_do)
            if bool(part.tokens) != bool(whole):
                raise LayoutInvalid(asked, f"{plane.name} and its group do not agree whether it is a state.", to_do)


def _simple(part: Part) -> bool:
    """Whether no two of its bytes are one: the smaller stride's row fits into the larger stride."""
    axes = sorted([(part.head_stride, part.heads), *([(part.token_stride, part.tokens)] if part.tokens > 1 else [])])
    covered = part.width
    for stride, count in axes:
        if count > 1 and stride < covered:
            return False
        covered += stride * (count - 1)
    return True
