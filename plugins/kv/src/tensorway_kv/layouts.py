"""Geometries of ranks from what an engine is configured with: layers, heads, orders of a page, parallel dimensions.

May import the core. An engine that knows its own memory better describes it itself; this is how the usual ones lay
it out, and how a planner knows what ranks of an engine hold whose memory it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import attrs

from tensorway.errors import LayoutInvalid
from tensorway.kv import Group, Part, Plane, RankGeometry, Share


@attrs.frozen
class Component:
    """What a layer keeps: so many heads of so many bytes for each token; for a state, channels of the sequence."""

    name: str
    #: Of the model. One head, such as a latent, is on every tensor-parallel rank.
    heads: int
    #: Bytes of a head of one token.
    width: int


def attention(heads: int, head_bytes: int, *, scale_bytes: int = 0) -> tuple[Component, ...]:
    """Keys and values; with `scale_bytes` also what FP8 needs beside each head of each token."""
    names = [("k", head_bytes), ("v", head_bytes)]
    names += [("scale.k", scale_bytes), ("scale.v", scale_bytes)] if scale_bytes else []
    return tuple(Component(name, heads, width) for name, width in names)


def latent(nbytes: int) -> tuple[Component, ...]:
    """Multi-head latent attention: one row for each token, which all tensor-parallel ranks have."""
    return (Component("latent", 1, nbytes),)


@attrs.frozen
class Cache:
    """Layers whose pages are alike and are counted by one list of block ids: a cache group."""

    layers: Sequence[int]
    components: Sequence[Component]
    #: Of one rank's page; 0 for a state.
    page_tokens: int
    window: int = 0
    #: Whether a page goes through the heads of a token first, or through the tokens of a head.
    order: Literal["NHD", "HND"] = "NHD"
    #: What shares a page: nothing, the components of a layer, or all layers of the group.
    pages: Literal["component", "layer", "group"] = "layer"
    #: Whether components lie side by side in each head of each token, not one behind the other.
    woven: bool = False
    #: Bytes between pages.
    gap: int = 0


@attrs.frozen
class Parallel:
    """How an engine divides its model. Its ranks count tensor-parallel ranks fastest, then context, then pipeline."""

    tp: int = 1
    #: How many layers each pipeline stage has; empty for one stage.
    stages: tuple[int, ...] = ()
    #: Tensor-parallel ranks that share the tokens of one head, neighbors of each other.
    dcp: int = 1
    #: Ranks besides the tensor-parallel ones that share tokens.
    pcp: int = 1
    interleave: int = 1

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tp * self.pcp * max(len(self.stages), 1)

    def place(self, rank: int) -> tuple[int, int, int]:
        """Of a rank: its pipeline stage, and its ranks by context and by tensor."""
        rest, tensor = divmod(rank, self.tp)
        stage, context = divmod(rest, self.pcp)
        return stage, context, tensor

    def share(self, rank: int) -> Share:
        """Which positions it holds."""
        _, context, tensor = self.place(rank)
        return Share(context * self.dcp + tensor % self.dcp, self.dcp * self.pcp, self.interleave)

    def holds(self, rank: int, layer: int) -> bool:
        """Whether a layer is on its stage."""
        stage = self.place(rank)[0]
        return not self.stages or sum(self.stages[:stage]) <= layer < sum(self.stages[: stage + 1])

    def heads(self, rank: int, heads: int) -> tuple[int, int]:
        """The first of so many heads that it has, and how many."""
        if self.tp % heads and heads % self.tp:
            raise LayoutInvalid(
                f"{heads} heads were to be divided among {self.tp} ranks.",
                "Neither number divides the other.",
                "Describe the parts of each rank as the engine holds them.",
            )
        return self.place(rank)[2] * heads // self.tp, max(heads // self.tp, 1)


def rank_geometry(
    caches: Sequence[Cache],
    parallel: Parallel,
    rank: int,
    *,
    blocks: int | Sequence[int],
    base: Callable[[str, int], int],
    device: str = "cpu",
) -> RankGeometry:
    """The memory of one rank. `base` says where the plane of this name and of so many bytes begins.

    Planes are named by component and layer, `k.0`; by layer, `layer.0`; or by group, `group.0`.
    """
    counts = [blocks] * len(caches) if isinstance(blocks, int) else blocks
    share, planes = parallel.share(rank), []
    for group, (cache, count) in enumerate(zip(caches, counts, strict=True)):
        for name, contents in _pages(cache, group, [layer for layer in cache.layers if parallel.holds(rank, layer)]):
            parts, nbytes = _parts(cache, contents, parallel, rank)
            stride = nbytes + cache.gap
            where = base(name, stride * (count - 1) + nbytes)
            planes.append(Plane(name, group, where, nbytes, stride, count, parts, device))
    groups = tuple(Group(cache.page_tokens * share.of, cache.window) for cache in caches)
    return RankGeometry(tuple(planes), groups, share)


def _pages(cache: Cache, group: int, layers: list[int]) -> Iterator[tuple[str, list[tuple[int, list[Component]]]]]:
    """For each plane its name, and which components of which layers a page of it has."""
    components = list(cache.components)
    if cache.pages == "group":
        if layers:
            yield f"group.{group}", [(layer, components) for layer in layers]
        return
    for layer in layers:
        if cache.pages == "layer":
            yield f"layer.{layer}", [(layer, components)]
        else:
            yield from ((f"{one.name}.{layer}", [(layer, [one])]) for one in components)


def _parts(
    cache: Cache, contents: list[tuple[int, list[Component]]], parallel: Parallel, rank: int
) -> tuple[tuple[Part, ...], int]:
    """The parts of one page, and its length."""
    parts, offset, tokens = [], 0, max(cache.page_tokens, 1)
    for layer, components in contents:
        cell = sum(one.width for one in components)
        if cache.woven and len({one.heads for one in components}) > 1:
            raise LayoutInvalid(
                f"Components of layer {layer} were to lie side by side in each head.",
                "They have unequal numbers of heads.",
                "Give them planes of their own, or one behind the other.",
            )
        within = 0
        for one in components:
            first, heads = parallel.heads(rank, one.heads)
            step = cell if cache.woven else one.width
            token, head = (heads * step, step) if cache.order == "NHD" else (step, tokens * step)
            token = token if cache.page_tokens else 0
            at = offset + within
            parts.append(Part(layer, one.name, at, cache.page_tokens, token, first, heads, head, one.width))
            within += one.width if cache.woven else tokens * heads * step
        offset += tokens * cell * heads if cache.woven else within
    return tuple(parts), offset
