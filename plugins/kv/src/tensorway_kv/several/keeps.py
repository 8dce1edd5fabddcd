"""Requests that have ended and whose blocks children keep: until every one of them has let go.

May import nothing. A request is released once, after the last of those that said that they keep it.
"""

from __future__ import annotations


class Keeps:
    """Who keeps what."""

    def __init__(self) -> None:
        #: By what children call the request: what the engine calls it, and who keeps it.
        self._kept: dict[str, tuple[str, set[str]]] = {}
        self._released: list[str] = []

    def __len__(self) -> int:
        return len(self._kept) + len(self._released)

    def keep(self, inner: str, request: str, children: set[str]) -> None:
        """These keep its blocks."""
        if children:
            _, known = self._kept.setdefault(inner, (request, set()))
            known |= children

    def keepers(self, inner: str) -> set[str]:
        """Who keeps it now."""
        return set(self._kept[inner][1]) if inner in self._kept else set()

    def released(self, child: str, inner: str) -> bool:
        """A child has let go of it; whether it kept it."""
        request, known = self._kept.get(inner, ("", set[str]()))
        if child not in known:
            return False
        known.remove(child)
        if not known:
            del self._kept[inner]
            self._released.append(request)
        return True

    def lost(self, child: str) -> None:
        """A child has ended on all ranks, and keeps nothing any more."""
        for inner in list(self._kept):
            self.released(child, inner)

    def take(self) -> list[str]:
        """Whose blocks are free since the last call."""
        out, self._released = self._released, []
        return out
