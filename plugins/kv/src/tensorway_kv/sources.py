"""Who reads what from whom: for all ranks of a reading engine at once, so that a producer can count its readers.

May import the core and this package's intersections. Whatever cannot be read is found here, before any request is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import attrs

from tensorway.errors import Incompatible
from tensorway.kv import Group, Part, RankGeometry
from tensorway_kv.intersect import MAX_ROWS, Axis, Box, meet, normal, rows

#: A layer and a component of it.
Content: TypeAlias = tuple[int, str]


@attrs.frozen
class Holder:
    """A rank that has a content, and where."""

    rank: int
    plane: int
    group: int
    part: Part

    @property
    def stop(self) -> int:
        """Behind the last head that it has."""
        return self.part.first + self.part.heads


@attrs.frozen
class Piece:
    """What a reader takes of one content from one producer: heads `first` to `stop`."""

    own: Holder
    theirs: Holder
    first: int
    stop: int


@attrs.frozen
class _Choice:
    """Of a shape, by positions in lists of holders: who reads which heads from whom."""

    reader: int
    producer: int
    first: int
    stop: int


class Engine:
    """The ranks of an engine, by what they hold. All have the same groups."""

    def __init__(self, ranks: Sequence[RankGeometry]) -> None:
        self.groups: tuple[Group, ...] = ranks[0].groups
        self.axes = [[Axis.of_group(rank, group) for group in range(len(self.groups))] for rank in ranks]
        self.contents: dict[Content, list[Holder]] = {}
        for number, rank in enumerate(ranks):
            for index, plane in enumerate(rank.planes):
                for part in plane.parts:
                    holder = Holder(number, index, plane.group, part)
                    self.contents.setdefault((part.layer, part.component), []).append(holder)

    def axis(self, holder: Holder) -> Axis:
        """Which positions a holder's pages have."""
        return self.axes[holder.rank][holder.group]


@attrs.frozen
class Pages:
    """A plane of the reader and one of the producer that have something in common, and what, layer by layer."""

    own_plane: int
    their_plane: int
    own_group: int
    their_group: int
    own: Axis
    theirs: Axis
    layers: dict[int, list[Box]]


def by_pages(own: RankGeometry, theirs: RankGeometry, taken: Sequence[Piece]) -> list[Pages]:
    """What a rank takes of another, by the planes it lies in; raises `Incompatible` if that is beyond reckoning."""
    found: dict[tuple[int, int], Pages] = {}
    for piece in taken:
        key = piece.own.plane, piece.theirs.plane
        groups = piece.own.group, piece.theirs.group
        if key not in found:
            found[key] = Pages(*key, *groups, Axis.of_group(own, groups[0]), Axis.of_group(theirs, groups[1]), {})
        box = Box.of(piece.own.part, piece.theirs.part, piece.first, piece.stop)
        found[key].layers.setdefault(piece.own.part.layer, []).append(box)
    shapes = {
        (pages.own, pages.theirs, normal(boxes)[2]) for pages in found.values() for boxes in pages.layers.values()
    }
    if (count := sum(rows(*shape) for shape in shapes)) > MAX_ROWS:
        raise Incompatible(
            "Pages of one rank were to be read into pages of another.",
            f"They meet in {count:,} rows of bytes before that repeats; at most {MAX_ROWS:,} are provided for.",
            "Choose block sizes with a larger common divisor, or equal orders of tokens and heads.",
        )
    return list(found.values())


def pieces(own: Engine, theirs: Engine, asked: str) -> Iterator[Piece]:
    """What every rank of `own` reads; raises `Incompatible` if it cannot have everything that it holds."""
    known: dict[object, list[_Choice]] = {}
    for content, readers in own.contents.items():
        producers = theirs.contents.get(content)
        if producers is None:
            layer, component = content
            raise Incompatible(
                asked,
                f"Its ranks have no {component} of layer {layer}.",
                "Let both engines run one model, with caches of one kind.",
            )
        _check(own, theirs, content, readers, producers, asked)
        shape = (_shape(own, readers), _shape(theirs, producers))
        if shape not in known:
            known[shape] = list(_choices(own, theirs, readers, producers, asked))
        for choice in known[shape]:
            yield Piece(readers[choice.reader], producers[choice.producer], choice.first, choice.stop)


def _shape(engine: Engine, holders: list[Holder]) -> object:
    return tuple((holder.rank, holder.group, holder.part.first, holder.part.heads) for holder in holders)


def _choices(
    own: Engine, theirs: Engine, readers: list[Holder], producers: list[Holder], asked: str
) -> Iterator[_Choice]:
    """Of replicas a reader takes the first at or after its own place among all producers of the content."""
    for number, reader in enumerate(readers):
        begin = number * len(producers) // len(readers)
        missing = {
            shared: [(reader.part.first, reader.stop)]
            for shared in {theirs.axis(producer) for producer in producers} | _shares(theirs.axis(producers[0]))
            if len(meet(own.axis(reader), shared).positions)
        }
        for index in (*range(begin, len(producers)), *range(begin)):
            producer = producers[index]
            open_ = missing.get(theirs.axis(producer), [])
            left: list[tuple[int, int]] = []
            for first, stop in open_:
                low, high = max(first, producer.part.first), min(stop, producer.stop)
                if low >= high:
                    left.append((first, stop))
                    continue
                yield _Choice(number, index, low, high)
                left += [rest for rest in ((first, low), (high, stop)) if rest[0] < rest[1]]
            open_[:] = left
        for shared, open_ in missing.items():
            if open_:
                raise _uncovered(asked, reader.part, shared, open_[0])


def _shares(axis: Axis) -> set[Axis]:
    """Those of all context-parallel ranks, whether they are there or not."""
    return {attrs.evolve(axis, rank=rank) for rank in range(axis.of)}


def _check(
    own: Engine, theirs: Engine, content: Content, readers: list[Holder], producers: list[Holder], asked: str
) -> None:
    layer, component = content
    what = f"{component} of layer {layer}"
    to_do = "Let both engines run one model, with caches of one kind."
    for says, here, there in (
        ("is {} bytes wide", _widths(readers), _widths(producers)),
        ("has {} heads", [max(one.stop for one in readers)], [max(one.stop for one in producers)]),
        ("is {}", _kinds(own, readers), _kinds(theirs, producers)),
    ):
        if here != there:
            text = [says.format(" or ".join(map(str, side))) for side in (there, here)]
            raise Incompatible(asked, f"Its {what} {text[0]}; ours {text[1]}.", to_do)
    wanted = {own.groups[one.group].window for one in readers}
    kept = {theirs.groups[one.group].window for one in producers} - {0}
    if kept and (0 in wanted or max(wanted) > min(kept)):
        raise Incompatible(
            asked,
            f"It keeps the last {min(kept)} tokens of {what}; ours needs {max(wanted) if 0 not in wanted else 'all'}.",
            "Configure sliding windows alike on both engines.",
        )


def _widths(holders: list[Holder]) -> list[int]:
    return sorted({one.part.width for one in holders})


def _kinds(engine: Engine, holders: list[Holder]) -> list[str]:
    return sorted({"kept for tokens" if engine.groups[one.group].block_tokens else "a state" for one in holders})


def _uncovered(asked: str, part: Part, shared: Axis, heads: tuple[int, int]) -> Incompatible:
    share = f", of the positions that share {shared.rank} of {shared.of} has" if shared.of > 1 else ""
    return Incompatible(
        asked,
        f"None of its ranks has heads {heads[0]} to {heads[1] - 1} of {part.component} of layer {part.layer}{share}.",
        "Register all ranks of the engine together.",
    )
