"""Groups of processes that each have a session: opened at once, let move rows, formed anew; and what they were told.

Room `testing`; see `session_ranks` for what a process does. For `SessionSuite` and for tests of communicators.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from tensorway.eplb import Capabilities
from tensorway.testing import session_ranks as does
from tensorway.testing.ranks import Place, RankProcess, Ranks
from tensorway.testing.session_ranks import Move, Shape, Told


@attrs.define
class Members:
    """A group: the numbers of its processes, in the order of their ranks."""

    ranks: Ranks
    path: str
    indices: tuple[int, ...]
    #: What all of them opened.
    opening: tuple[Any, ...]
    capabilities: Capabilities
    control: bool
    #: All that have a session, also those that were left out since.
    opened: set[int]
    epoch: int = 0

    @classmethod
    def enter(
        cls,
        ranks: Ranks,
        indices: Sequence[int],
        opening: tuple[str, Mapping[str, object], Shape],
        function: Callable[..., Any] = does.open_session,
    ) -> Members:
        """Open a session in each of these processes: of this communicator, with these options, for such weights."""
        ranks.grow(max(indices) + 1)
        path = f"/suite/{uuid.uuid4().hex}"
        for index in indices:
            ranks[index].start(function, place(path, indices, index), *opening)
        answers = [ranks[index].result() for index in indices]
        assert all(answer == answers[0] for answer in answers), "members of one group can do different things"
        capabilities, control = answers[0]
        return cls(ranks, path, tuple(indices), opening, capabilities, control, set(indices))

    @property
    def both(self) -> bool:
        """Whether rows move only if the sender takes part."""
        return self.capabilities.initiator == "both"

    def __getitem__(self, index: int) -> RankProcess:
        return self.ranks[index]

    def place(self, index: int) -> Place:
        """Where a process is in the group."""
        return place(self.path, self.indices, index, self.epoch)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let all call this at once."""
        return self.ranks.each(self.indices, function, *arguments)

    def exchange(self, moves: Sequence[Move], cycle: int, lost: Sequence[int] = ()) -> list[str]:
        """A cycle of all; what went wrong anywhere."""
        for index in self.indices:
            self[index].start(does.exchange, self.place(index), moves, cycle, lost)
        return [text for index in self.indices for text in self[index].result()]

    def regroup(self, indices: Sequence[int]) -> dict[int, list[Told]]:
        """Go on as these; who is new opens. What each was told."""
        self.indices, self.epoch = tuple(indices), self.epoch + 1
        for index in indices:
            if index in self.opened:
                self[index].start(does.regroup, self.place(index))
            else:
                self[index].start(does.open_session, self.place(index), *self.opening)
        told = {index: self[index].result() for index in indices}
        self.opened |= (new := set(indices) - self.opened)
        return {index: [] if index in new else told[index] for index in indices}


def place(path: str, indices: Sequence[int], index: int, epoch: int = 0) -> Place:
    """Members are called by the numbers of their processes."""
    return Place(path, tuple(f"p{each}" for each in indices), list(indices).index(index), epoch)


@contextlib.contextmanager
def lent(ranks: Ranks) -> Iterator[Ranks]:
    """For one test: who is left in the middle of something is ended, and so replaced when ranks grow again."""
    yield ranks
    for index in range(len(ranks)):
        if not ranks[index].at_rest:
            ranks[index].close()


def kinds(told: Sequence[Told]) -> list[str]:
    """Only what each is."""
    return [each.kind for each in told]
