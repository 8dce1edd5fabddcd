"""What a rank of a producer writes to others, by order of its planner.

May import the core and this package's pushes, boards and writing. It decides nothing but whether a push has come to its
end well, which only the words beside its own blocks can say.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from tensorway.metrics import Counters
from tensorway_kv.board import Board
from tensorway_kv.linking import Links
from tensorway_kv.orders import Orders, Refuse, Target
from tensorway_kv.pushes import Push, refusal
from tensorway_kv.writing import Writer, Written

#: Lives of engines whose names are remembered.
_NAMES: Final = 4096
#: A request, its lease, and a consumer's life and rank.
_Key: TypeAlias = tuple[str, int, str, int]


class Serving:
    """All pushes of one rank."""

    def __init__(self, writer: Writer, board: Board, counts: Counters) -> None:
        self.links: Links[Written] = Links(writer)
        self._writer, self._board, self._counts = writer, board, counts
        self._pushes: dict[_Key, Push] = {}
        #: What lives of engines say that they are called. One that says another name later is not listened to: each
        #: name costs a connection, and whoever is not who it says would have as many as it likes.
        self._names: dict[str, str] = {}

    def submit(self, what: Orders) -> None:
        """Begin what is to be written, and end what is not."""
        for order in what.pushes:
            target = order.target
            key = target.request, target.epoch, target.incarnation, target.reader
            if order.rank == self._writer.rank and key not in self._pushes and self._named(target):
                link = self.links.to(target.engine, target.incarnation)
                self._pushes[key] = Push(target, link, self._writer, self._board)
        for send in what.sends:
            for push in self._pushes.values():
                if push.target.request == send.request and push.target.epoch in send.names:
                    push.add(send)
        for refuse in what.refusals:
            if refuse.rank == self._writer.rank and self._named(refuse):
                self._refuse(refuse)

    def after_layer(self, layer: int) -> None:
        """A layer of this step's tokens is computed."""
        for push in self._pushes.values():
            push.after_layer(layer)

    def advance(self, now: float) -> None:
        """Do what can be done now."""
        for key, push in list(self._pushes.items()):
            if push.advance(now):
                del self._pushes[key]
                labels = {"direction": "push", "peer": push.link.engine}
                self._counts.add("kv_transfers_total", **labels, cause=push.failure or "none")

    def tidy(self) -> None:
        """Let go of lives that are over."""
        self.links.tidy({push.link for push in self._pushes.values()})

    def _named(self, who: Target | Refuse) -> bool:
        """Whether a life has the name that it had before."""
        known = self._names.setdefault(who.incarnation, who.engine)
        while len(self._names) > _NAMES:
            del self._names[next(iter(self._names))]
        return known == who.engine

    def _refuse(self, order: Refuse) -> None:
        push = self._pushes.get((order.request, order.epoch, order.incarnation, order.reader))
        if push is not None:
            push.refuse(order.cause)
            return
        link = self.links.to(order.engine, order.incarnation)
        me = self._writer
        link.send(order.reader, refusal(me.incarnation, me.rank, order.request, order.epoch, order.cause))
