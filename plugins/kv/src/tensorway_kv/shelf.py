"""What a producer keeps in staging memory: its engine has its own blocks back as soon as all ranks have copied them.

May import the core, attrs, and this package's staging and orders. One thread uses it; it moves nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from tensorway.kv import Group
from tensorway_kv.orders import Copy, Ids, Mark
from tensorway_kv.staging import Pool


@attrs.define(eq=False)
class _Kept:
    """What one lease has in staging memory."""

    copy: Copy
    #: What is to be written beside the blocks once all ranks have copied them: until then nobody may believe them.
    mark: Mark
    #: The ranks that have not said what became of their copies.
    missing: set[int]
    failed: bool = False
    ended: bool = False


@attrs.frozen
class Copied:
    """All ranks have said what became of their copies."""

    request: str
    #: Nothing if the copies are of no use: one has failed, or the lease has ended meanwhile.
    mark: Mark | None


class Shelf:
    """Leases over blocks of staging memory, by their epochs."""

    def __init__(self, pool: Pool, groups: Sequence[Group]) -> None:
        self._pool, self._groups = pool, groups
        self._kept: dict[int, _Kept] = {}

    @property
    def busy(self) -> bool:
        """Whether a copy is under way."""
        return any(kept.missing for kept in self._kept.values())

    def copying(self, request: str) -> bool:
        """Whether an engine's blocks of this request are still being copied."""
        return any(kept.copy.request == request and kept.missing for kept in self._kept.values())

    def take(self, blocks: Ids, tokens: int) -> Ids | None:
        """Staging memory for an engine's blocks, as far as they hold tokens; None if there is no room."""
        counts = [
            min(len(ids), -(-tokens // group.block_tokens) if group.block_tokens else 1)
            for ids, group in zip(blocks, self._groups, strict=True)
        ]
        return self._pool.take(counts)

    def give(self, staged: Ids) -> None:
        """What was taken, and nothing is to be kept in."""
        self._pool.give(staged)

    def put(self, copy: Copy, mark: Mark, ranks: Iterable[int]) -> None:
        """Keep a lease's blocks there; these ranks copy them."""
        self._kept[copy.epoch] = _Kept(copy, mark, set(ranks))

    def said(self, rank: int, epoch: int, cause: str) -> Copied | None:
        """What became of a rank's copy; once all have said it, what that means. Raises `KeyError` for what is none."""
        kept = self._kept[epoch]
        kept.missing.remove(rank)
        kept.failed = kept.failed or bool(cause)
        if kept.missing:
            return None
        out = Copied(kept.copy.request, None if kept.failed or kept.ended else kept.mark)
        if kept.ended:
            self._give_back(epoch)
        return out

    def end(self, epoch: int) -> bool:
        """The lease has ended; whether it was one of these. What is still being copied to is given back later."""
        kept = self._kept.get(epoch)
        if kept is None:
            return False
        kept.ended = True
        if not kept.missing:
            self._give_back(epoch)
        return True

    def _give_back(self, epoch: int) -> None:
        self._pool.give(self._kept.pop(epoch).copy.staged)
