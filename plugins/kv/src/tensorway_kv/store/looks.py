"""What a request's blocks were found as, in a folder that may not answer: asked on a thread, judged by the clock.

May import attrs and this package's store. A look that is not over when its time is counts as far as it came.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import attrs


@attrs.define(eq=False)
class Look:
    """One request's blocks, from `first` on; a thread fills it in."""

    request: str
    first: int
    hashes: tuple[bytes, ...]
    #: What names are made with.
    tenant: bytes
    until: float
    #: The windows of groups, 0 for those of which every block is needed.
    windows: Mapping[int, int]
    #: For each block that was looked at its name, and by group the layout that has it, empty for none.
    names: list[bytes] = attrs.field(factory=list)
    found: list[Mapping[int, str]] = attrs.field(factory=list)
    over: bool = False
    #: When it was over; after a while it is not believed any more.
    over_at: float = 0.0
    #: Why nothing more could be found out, and whether that was counted.
    why: str = ""
    judged: bool = False

    def end(self) -> None:
        """Nothing more is found out."""
        if not self.over:
            self.over_at, self.over = time.monotonic(), True

    def useless(self, row: Mapping[int, str]) -> bool:
        """Whether no block that follows one which is stored so can be of use."""
        return any(not layout and not self.windows[group] for group, layout in row.items())

    def blocks(self, tokens: int, most: int) -> int:
        """How many blocks can be loaded, from `first` on and at most so many: those that every group has.

        Of a group with a sliding window only the last ones are needed.
        """
        found = self.found[: len(self.names)][:most]
        count = next((at for at, row in enumerate(found) if self.useless(row)), len(found))
        runs = dict.fromkeys((group for group in (found[0] if found else ()) if self.windows[group]), 0)
        best = 0
        for at, row in enumerate(found[:count], 1):
            stop = (self.first + at) * tokens
            for group in runs:
                runs[group] = runs[group] + 1 if row[group] else 0
            needs = {group: at - max(0, (stop - self.windows[group]) // tokens - self.first) for group in runs}
            if all(runs[group] >= need for group, need in needs.items()):
                best = at
        return best


def layouts_of(rows: Sequence[Mapping[int, str]], groups: int) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Layouts, and for each block and group which of them; -1 for none."""
    numbers: dict[str, int] = {}
    which = tuple(
        tuple(numbers.setdefault(name, len(numbers)) if (name := row.get(group)) else -1 for group in range(groups))
        for row in rows
    )
    return tuple(numbers), which
