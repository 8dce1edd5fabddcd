"""The reuse filter: which blocks are worth storing, by how many requests had them.

May import the core's offload room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tensorway.offload import OffloadKey


class Sightings:
    """How many requests mentioned a block, of the blocks that were mentioned last."""

    def __init__(self, threshold: int, most: int) -> None:
        self._threshold, self._most = threshold, most
        self._seen: OrderedDict[OffloadKey, int] = OrderedDict()

    def saw(self, keys: Sequence[OffloadKey]) -> None:
        """One more request has these; none of them is forgotten for another one of them."""
        if self._threshold == 1:
            return
        seen = self._seen
        for key in keys:
            seen[key] = seen.pop(key, 0) + 1
        while len(seen) > max(self._most, len(keys)):
            seen.popitem(last=False)

    def admitted(self, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
        """Those that enough requests had, in their order."""
        if self._threshold == 1:
            return keys
        return [key for key in keys if self._seen.get(key, 0) >= self._threshold]

    def reset(self) -> None:
        """Nothing was seen."""
        self._seen.clear()
