"""What a planner says of blocks that another engine can fetch: stored when they are kept, removed when the lease ends.

May import the core. Leases of common prefixes name the same blocks: a hash is said once, and again when the last lease
that holds it has ended.
"""

from __future__ import annotations

from collections import Counter

from tensorway.kv import Event, RankGeometry, RequestView


class Stored:
    """Hashes of blocks that are kept, by lease."""

    def __init__(self, geometry: RankGeometry) -> None:
        #: Requests come with hashes of the blocks of one group: the first that counts tokens.
        sizes = [(group.block_tokens, number) for number, group in enumerate(geometry.groups) if group.block_tokens]
        self._block_tokens, self._group = sizes[0] if sizes else (0, 0)
        self._held: dict[str, tuple[str, tuple[bytes, ...]]] = {}
        self._holders: Counter[tuple[str, bytes]] = Counter()
        self._events: list[Event] = []

    def kept(self, request: RequestView, tokens: int) -> None:
        """A request's blocks are kept for others; its tokens fill so many of them."""
        full = tokens // self._block_tokens if self._block_tokens else 0
        hashes = tuple(dict.fromkeys(request.hashes[:full]))
        if not hashes or request.id in self._held:
            return
        self._held[request.id] = (request.salt, hashes)
        self._say("stored", request.salt, tuple(each for each in hashes if not self._holders[request.salt, each]))
        self._holders.update((request.salt, each) for each in hashes)

    def let_go(self, request: str) -> None:
        """Its lease has ended."""
        salt, hashes = self._held.pop(request, ("", ()))
        self._holders.subtract((salt, each) for each in hashes)
        gone = tuple(each for each in hashes if self._holders[salt, each] <= 0)
        for each in gone:
            del self._holders[salt, each]
        self._say("removed", salt, gone)

    def take(self) -> list[Event]:
        """What was said since the last call."""
        said, self._events = self._events, []
        return said

    def _say(self, what: str, salt: str, hashes: tuple[bytes, ...]) -> None:
        if hashes:
            kind = "stored" if what == "stored" else "removed"
            event = Event(kind, hashes, self._group, block_tokens=self._block_tokens, salt=salt)  # type: ignore[arg-type]
            self._events.append(event)
