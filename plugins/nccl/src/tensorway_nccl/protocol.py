"""When a round is put on the device, and what a member knows of all its moves: one side of what `messages` says.

Pure: no socket, no thread, no library; may import `tensorway.eplb`, `lanes` and `messages`. Places are taken in the
order of ranks, so no members wait for each other in a circle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import attrs

from tensorway.eplb import Drained, Event, Failed, Fetch, Filled, PeerFailed, Send, Served
from tensorway_nccl.lanes import Piece
from tensorway_nccl.messages import Accept, Ask, Done, Go, Item, Key, Message, Propose, Ready, Refuse, Void

#: Pieces of one round, and their bytes: what was started cannot be given up, so it must not take long.
ROUND: Final = 64
ROUND_BYTES: Final = 64 << 20
#: Rounds of a member at once. Their kernels must all find a place on the device beside each other, or members would
#: wait in a circle after all.
PLACES: Final = 4
#: Seconds after which a proposal without an answer is withdrawn, so that the place is free for others.
ANSWER: Final = 1.0

_State = Literal["idle", "waiting", "proposed", "withdrawn", "asked", "accepted", "running", "over"]


class Broken(Exception):
    """A member has said what cannot be; there is no going on with it."""


@attrs.define(eq=False)
class Move:
    """A fetch or a send that is under way; both ends cut it into the same pieces."""

    subject: Fetch | Send
    key: Key
    pieces: Sequence[Piece]
    #: The first piece that has not arrived or left.
    next: int = 0
    #: Nobody wants the rest: of a fetch `Failed` is out.
    given_up: bool = False


@attrs.define(eq=False)
class _Link:
    """All that is between this member and another."""

    peer: int
    #: Whether it is this one that proposes.
    lower: bool
    fetches: dict[Key, Move] = attrs.field(factory=dict)
    sends: dict[Key, Move] = attrs.field(factory=dict)
    #: Slots that the other wants, and what it does not want any more, of moves that are not served here yet.
    asked: dict[Key, int] = attrs.field(factory=dict)
    voided: set[Key] = attrs.field(factory=set)
    #: Moves that both ends have, in the order in which that was known: whether they go up, and which.
    ready: deque[tuple[bool, Key]] = attrs.field(factory=deque)
    state: _State = "idle"
    items: tuple[Item, ...] = ()
    since: float = 0.0
    theirs_over: bool = False
    #: Why the member is lost, if it is.
    lost: str = ""

    def move(self, item: Item) -> Move | None:
        """This end of an item."""
        return (self.sends if item.up == self.lower else self.fetches).get(item.key)

    def possible(self, items: Iterable[Item]) -> tuple[Item, ...]:
        """Those whose move is still wanted here."""
        kept = []
        for item in items:
            move = self.move(item)
            if move is None or move.given_up:
                continue
            if not move.next == item.start < item.stop <= len(move.pieces):
                raise Broken(f"pieces {item.start} to {item.stop} of {item.key} were proposed, and {move.next} is next")
            kept.append(item)
        return tuple(kept)

    def committed(self, key: Key, *, fetch: bool) -> bool:
        """Whether a round that has this move cannot be left any more. What is sent is in it until it has arrived."""
        states = ("accepted", "running") if fetch else ("accepted", "running", "over")
        up = self.lower != fetch
        return self.state in states and any((up, key) == (item.up, item.key) for item in self.items)


class Conductor:
    """One member's part. What follows from a call is in `outbox`, `starts`, `stops` and `events`, in order."""

    def __init__(self, me: int, peers: Iterable[int], clock: Callable[[], float] = time.monotonic) -> None:
        self.me = me
        self.outbox: deque[tuple[int, Message]] = deque()
        #: Rounds to be put on a stream now: with whom, and what.
        self.starts: deque[tuple[int, tuple[Item, ...]]] = deque()
        #: Members whose round is to be aborted.
        self.stops: deque[int] = deque()
        self.events: deque[Event] = deque()
        self._links = {peer: _Link(peer, me < peer) for peer in peers}
        self._places = PLACES
        self._waiting: deque[_Link] = deque()
        self._clock = clock

    @property
    def proposes(self) -> bool:
        """Whether a proposal waits for its answer."""
        return any(link.state == "proposed" for link in self._links.values())

    # -- what this member wants

    def post(self, fetch: Fetch, key: Key, pieces: Sequence[Piece]) -> None:
        """Rows are to come."""
        link = self._links[fetch.peer]
        if link.lost:
            self.events.append(Failed(fetch, "the member was lost before", released=True))
            return
        link.fetches[key] = Move(fetch, key, pieces)
        self._say(link, Ask(key, len(fetch.slots)))

    def serve(self, send: Send, key: Key, pieces: Sequence[Piece]) -> None:
        """Rows may go."""
        link = self._links[send.peer]
        if link.lost:
            return
        if key in link.voided:
            link.voided.remove(key)
            self.events.append(Served(send))
            return
        link.sends[key] = Move(send, key, pieces)
        self._match(link, key)

    def cancel(self, fetch: Fetch, why: str) -> None:
        """Give a fetch up; one that has ended is not known any more."""
        link = self._links[fetch.peer]
        move = next((move for move in link.fetches.values() if move.subject is fetch), None)
        if move is None or move.given_up:
            return
        move.given_up = True
        committed = link.committed(move.key, fetch=True)
        self.events.append(Failed(fetch, why, released=not committed))
        if not committed:
            self._drop(link, move)

    def forget(self, cycle: int) -> None:
        """What is left of cycles before this one concerns nobody."""
        for link in self._links.values():
            link.voided = {key for key in link.voided if key[0] >= cycle}

    # -- what others say

    def hear(self, peer: int, message: Message) -> None:
        """A message has come; raises `Broken` if it cannot be."""
        link = self._links[peer]
        if link.lost:
            return
        match message:
            case Ask(key, slots):
                link.asked[key] = slots
                self._match(link, key)
            case Void(key):
                self._voided(link, key)
            case Ready(key):
                if key in link.fetches and not link.fetches[key].given_up:
                    link.ready.append((False, key))
                    self._plan(link)
            case Refuse(key, why):
                if (move := link.fetches.pop(key, None)) is not None and not move.given_up:
                    self.events.append(Failed(_fetch(move), why, released=True))
            case Propose(items):
                self._expect(link, message, not link.lower and link.state == "idle")
                link.possible(items)
                link.items, link.state = items, "asked"
                self._waiting.append(link)
                self._admit()
            case Accept(items):
                self._accepted(link, items)
            case Go(items):
                self._expect(link, message, not link.lower and (link.state == "accepted" or not items))
                self._told_to_go(link, items)
            case Done():
                self._expect(link, message, link.state in ("running", "over"))
                link.theirs_over = True
                if link.state == "over":
                    self._close_round(link)

    def tick(self) -> None:
        """Withdraw proposals that have waited for too long."""
        for link in self._links.values():
            if link.state == "proposed" and self._clock() - link.since >= ANSWER:
                link.state = "withdrawn"
                self._give_place()

    def lose(self, peer: int, why: str) -> None:
        """A member is gone, or must be taken for that. What is on a stream with it is to be aborted, then it fails."""
        link = self._links[peer]
        if not link.lost:
            self.events.append(PeerFailed(peer, why))
            self._part(link, why)

    def leave(self, why: str) -> None:
        """The same for all, and nobody is to blame."""
        for link in self._links.values():
            if not link.lost:
                self._part(link, why)

    def abandon(self) -> None:
        """Rounds that were to end have not: their rows may be written to for ever."""
        for link in self._links.values():
            self._fail_all(link, released=False)

    def _part(self, link: _Link, why: str) -> None:
        link.lost = why
        running = link.state == "running"
        if running:
            self.stops.append(link.peer)
        for move in list(link.fetches.values()):
            if not (running and link.committed(move.key, fetch=True)):
                del link.fetches[move.key]
                self._fail(move, why, released=True)
        link.sends.clear()
        link.ready.clear()
        if link in self._waiting:
            self._waiting.remove(link)
        place, link.state = link.state in ("proposed", "accepted"), "running" if running else "idle"
        if place:
            self._give_place()

    # -- rounds

    def over(self, peer: int, why: str = "", *, released: bool = True) -> None:
        """A round that was started has ended, or has failed; if it is not `released`, its rows may be written to."""
        link = self._links[peer]
        if why:
            self.lose(peer, why)
        self._give_place()
        if link.lost:
            link.state = "idle"
            self._fail_all(link, released=released)
            return
        for item in link.items:
            move = link.move(item)
            if move is not None and isinstance(move.subject, Fetch):
                move.next = item.stop
                self._settle_fetch(link, move)
        link.state = "over"
        self._say(link, Done())
        if link.theirs_over:
            self._close_round(link)

    def pieces(self, peer: int, items: Iterable[Item]) -> tuple[list[Piece], list[Piece]]:
        """What a round sends, and what it receives."""
        link, sends, receives = self._links[peer], list[Piece](), list[Piece]()
        for item in items:
            move = link.move(item)
            assert move is not None, "a round has moves of both ends"
            (sends if item.up == link.lower else receives).extend(move.pieces[item.start : item.stop])
        return sends, receives

    def _match(self, link: _Link, key: Key) -> None:
        move, slots = link.sends.get(key), link.asked.get(key)
        if move is None or slots is None:
            return
        del link.asked[key]
        if slots != len(move.subject.slots):
            del link.sends[key]
            why = f"it wants {slots} slots of layer {key[1]}, and {len(move.subject.slots)} were served"
            self._say(link, Refuse(key, why))
            self.events.append(Served(_send(move)))
        elif link.lower:
            link.ready.append((True, key))
            self._plan(link)
        else:
            self._say(link, Ready(key))

    def _voided(self, link: _Link, key: Key) -> None:
        link.asked.pop(key, None)
        move = link.sends.get(key)
        if move is None:
            link.voided.add(key)
        elif link.committed(key, fetch=False):
            move.given_up = True
        else:
            self._drop(link, move)

    def _drop(self, link: _Link, move: Move) -> None:
        """A move that is in no round, and shall be in none."""
        fetch = isinstance(move.subject, Fetch)
        if (ready := (link.lower != fetch, move.key)) in link.ready:
            link.ready.remove(ready)
        del (link.fetches if fetch else link.sends)[move.key]
        if isinstance(move.subject, Send):
            self.events.append(Served(move.subject))
        else:
            self._say(link, Void(move.key))

    def _plan(self, link: _Link) -> None:
        if link.lower and link.state == "idle" and link.ready and not link.lost:
            link.state = "waiting"
            self._waiting.append(link)
            self._admit()

    def _admit(self) -> None:
        """Give places to who waits for one, in the order in which they came."""
        while self._places and self._waiting:
            link = self._waiting.popleft()
            items = self._chosen(link) if link.state == "waiting" else link.possible(link.items)
            if items:
                self._places -= 1
                link.items, link.since = items, self._clock()
            if link.state == "asked":
                link.state = "accepted" if items else "idle"
                self._say(link, Accept(items))
            else:
                link.state = "proposed" if items else "idle"
                if items:
                    self._say(link, Propose(items))

    def _give_place(self) -> None:
        self._places += 1
        self._admit()

    @staticmethod
    def _chosen(link: _Link) -> tuple[Item, ...]:
        """The next pieces of the moves that are ready; at least one, however long."""
        chosen, pieces, nbytes = [], 0, 0
        for up, key in link.ready:
            move = (link.sends if up else link.fetches)[key]
            start = stop = move.next
            while (
                stop < len(move.pieces)
                and pieces < ROUND
                and (not pieces or nbytes + move.pieces[stop].nbytes <= ROUND_BYTES)
            ):
                nbytes += move.pieces[stop].nbytes
                pieces, stop = pieces + 1, stop + 1
            if stop > start:
                chosen.append(Item(up, key, start, stop))
            if stop < len(move.pieces):
                break
        return tuple(chosen)

    def _accepted(self, link: _Link, items: tuple[Item, ...]) -> None:
        self._expect(
            link, Accept, link.lower and link.state in ("proposed", "withdrawn") and set(items) <= {*link.items}
        )
        go = link.possible(items) if link.state == "proposed" else ()
        self._say(link, Go(go))
        if go:
            self._start(link, go)
            return
        proposed, link.state = link.state == "proposed", "idle"
        self._plan(link)
        if proposed:
            self._give_place()

    def _told_to_go(self, link: _Link, items: tuple[Item, ...]) -> None:
        if link.state != "accepted":
            return  # of a proposal of which nothing could be
        self._expect(link, Go, set(items) <= {*link.items})
        left = [item for item in link.items if item not in items]
        if items:
            self._start(link, items)
        else:
            link.state = "idle"
            self._give_place()
        for item in left:  # what was given up here after it had been accepted
            if (move := link.move(item)) is not None and move.given_up:
                self._end_given_up(link, move)

    def _start(self, link: _Link, items: tuple[Item, ...]) -> None:
        link.items, link.state, link.theirs_over = items, "running", False
        self.starts.append((link.peer, items))

    def _settle_fetch(self, link: _Link, move: Move) -> None:
        if move.next < len(move.pieces):
            if move.given_up:
                self._end_given_up(link, move)
        elif move.given_up:
            del link.fetches[move.key]
            self.events.append(Drained(_fetch(move)))
        else:
            del link.fetches[move.key]
            self.events.append(Filled(_fetch(move)))

    def _close_round(self, link: _Link) -> None:
        """Both are through: what was sent has arrived."""
        link.state = "idle"
        for item in link.items:
            if (move := link.sends.get(item.key)) is not None and item.up == link.lower:
                move.next = item.stop
                if move.given_up or move.next == len(move.pieces):
                    del link.sends[move.key]
                    self.events.append(Served(_send(move)))
        link.items = ()
        if link.lower:
            known = {True: link.sends, False: link.fetches}
            link.ready = deque((up, key) for up, key in link.ready if key in known[up])
            self._plan(link)

    def _end_given_up(self, link: _Link, move: Move) -> None:
        """A move that had been in a round when it was given up, and is in none now."""
        if isinstance(move.subject, Fetch):
            self.events.append(Drained(move.subject))
        self._drop(link, move)

    def _fail_all(self, link: _Link, *, released: bool) -> None:
        moves, link.fetches = list(link.fetches.values()), {}
        for move in moves:
            self._fail(move, link.lost, released=released)

    def _fail(self, move: Move, why: str, *, released: bool) -> None:
        if not move.given_up:
            self.events.append(Failed(_fetch(move), why, released))
        elif released:
            self.events.append(Drained(_fetch(move)))

    def _say(self, link: _Link, message: Message) -> None:
        self.outbox.append((link.peer, message))

    @staticmethod
    def _expect(link: _Link, message: object, holds: bool) -> None:
        if not holds:
            name = message.__name__ if isinstance(message, type) else type(message).__name__
            raise Broken(f"it said {name} when a round was {link.state}")


def _fetch(move: Move) -> Fetch:
    assert isinstance(move.subject, Fetch)
    return move.subject


def _send(move: Move) -> Send:
    assert isinstance(move.subject, Send)
    return move.subject
