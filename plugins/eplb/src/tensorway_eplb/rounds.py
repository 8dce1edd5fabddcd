"""In which order pairs of ranks exchange rows when each rank may talk to one peer at a time in each direction.

May import nothing but attrs. `plan` asks; backends that move in bounded rounds (NCCL) follow.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen
class Exchange:
    """Rows of one layer that `source` sends to `target` in one round: `rows` of them, from the `first` on.

    They are counted in the order of the pair's `PeerRows`, which is the same at both ends.
    """

    source: int
    target: int
    first: int
    rows: int


def rounds_of(pairs: Iterable[tuple[int, int, int]], max_rows: int | None = None) -> tuple[tuple[Exchange, ...], ...]:
    """Put (source, target, rows) into rounds: no rank sends twice in one, and none receives twice.

    Edges are colored greedily, heaviest first, so that what shares a round takes about as long; a pair of more than
    `max_rows` is cut into several exchanges. The rounds of a pair are in the order of its rows.
    """
    cut = [
        Exchange(source, target, first, min(max_rows or rows, rows - first))
        for source, target, rows in pairs
        for first in range(0, rows, max_rows or rows)
    ]
    cut.sort(key=lambda part: (-part.rows, part.source, part.target, part.first))
    sending: dict[int, int] = {}  # by rank, a bit for each round in which it is taken
    receiving: dict[int, int] = {}
    found: list[list[Exchange]] = []
    for part in cut:
        taken = sending.get(part.source, 0) | receiving.get(part.target, 0)
        free = ~taken & (taken + 1)  # the lowest bit that is not set
        index = free.bit_length() - 1
        if index == len(found):
            found.append([])
        found[index].append(part)
        sending[part.source] = sending.get(part.source, 0) | free
        receiving[part.target] = receiving.get(part.target, 0) | free
    return tuple(tuple(sorted(parts, key=lambda part: part.source)) for parts in found)
