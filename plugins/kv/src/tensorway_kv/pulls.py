"""One request as one rank fetches it: connected, read, found in time, acknowledged; or failed, once its pages are safe.

May import the core and this package's links, boards and mathematics. `advance` never waits and never raises for what a
peer or a transfer does. Data is read first and the words beside it afterwards, so that a word which still holds says
that the data was whole; only then is anything reported as received. Where data may come later than the ticket, the
words are read before it, too: then a word that is not written yet says that there is nothing to read.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import attrs

from tensorway.errors import DeadlineExceeded, Incompatible, MemoryInvalid, PeerLost, TensorwayError
from tensorway.kv import Result
from tensorway.transport import State, Transfer
from tensorway_kv import messages
from tensorway_kv.asking import Asking, Moving
from tensorway_kv.board import starts, verdict
from tensorway_kv.bound import Bound
from tensorway_kv.failover import Cause
from tensorway_kv.links import Link, Reader
from tensorway_kv.observed import Ended, moved
from tensorway_kv.orders import Fetch
from tensorway_kv.reads import Held
from tensorway_kv.staging import Staging

#: Seconds between two looks at words that were not written yet, from the first to the longest.
_LOOK_AGAIN: Final = (1e-3, 0.05)
Phase = Literal["handshake", "posted", "done"]
_CAUSES: Final[tuple[tuple[type[TensorwayError], Cause], ...]] = (
    (PeerLost, "lost"),
    (DeadlineExceeded, "deadline"),
    (MemoryInvalid, "refused"),
    (Incompatible, "incompatible"),
)


@attrs.frozen
class _Words:
    """Words of one producer rank that one transfer fetches: of a group, and which of the request's blocks they are."""

    producer: int
    group: int
    first: int
    ids: Sequence[int]


@attrs.define
class _Look:
    """Words that are being fetched."""

    words: _Words
    place: int
    transfer: Transfer


class Pull:
    """A fetch that is under way."""

    def __init__(
        self,
        fetch: Fetch,
        link: Link[Bound],
        reader: Reader,
        *,
        layerwise: bool = False,
        staging: Staging | None = None,
        asking: Asking | None = None,
    ) -> None:
        """`layerwise`: read one layer after the other, so that `has` is true of the first before the last is here.

        `staging`: where what is fetched arrives, if that is not in the pages. `asking`: where reading is slow.
        """
        self.fetch, self.link, self._reader = fetch, link, reader
        self._layerwise, self._staging, self._asking = layerwise, staging, asking
        self._begun = time.monotonic()
        self._until = self._begun + fetch.want.seconds
        #: Seconds that each phase took, of those that have ended.
        self.seconds: dict[Phase, float] = {}
        self._bound: Bound | None = None
        self._transfers: list[Moving] = []
        #: The same by layer, if layers are read one by one.
        self._of_layer: dict[int, list[Moving]] = {}
        self._looks: list[_Words] = []
        self._look: _Look | None = None
        self._look_at, self._pause = 0.0, _LOOK_AGAIN[0]
        self._failure: tuple[str, str] | None = None
        self._posted = self._arrived = False
        self._good = fetch.start
        link.hold(fetch.want)

    @property
    def safe(self) -> bool:
        """Whether nothing is written to its pages any more: from staging memory only it copies to them."""
        return self.fetch.pages is not None or self._released

    def let_go(self) -> bool:
        """Of one that has ended: whether nothing is written any more to what it had of staging memory, either."""
        return self._released and self._look_released()

    @property
    def failing(self) -> bool:
        """Whether it has failed, and only waits for its pages to be safe."""
        return self._failure is not None

    def has(self, layer: int) -> bool:
        """Whether its pages of that layer have arrived, or are not waited for: nothing was missing, or it failed."""
        if self.failing or self.fetch.start >= self.fetch.stop:
            return True
        if self.fetch.pages is not None or not self._posted:
            return False  # what arrives in staging memory is in the pages only when all of it is
        transfers = self._of_layer.get(layer, []) if self._layerwise else self._transfers
        return self._arrived or all(transfer.poll() is State.DONE for transfer in transfers)

    def cancel(self) -> None:
        """Give it up."""
        self.fail("cancelled", "nobody wants it any more")

    def fail(self, cause: str, why: str) -> None:
        """It cannot be had; `advance` says so when its pages are safe."""
        if self._failure is None:
            self._failure = (cause, f"Engine {self.link.engine}, incarnation {self.link.incarnation[:12]}: {why}")
            for transfer in [*self._transfers, *([self._look.transfer] if self._look else [])]:
                transfer.cancel()

    def advance(self, now: float) -> Result | None:
        """Do what can be done now; what became of it, once."""
        if self._failure is None:
            try:
                problem = self._problem(now)
                if problem is not None:
                    self.fail(*problem)
                elif self._step(now):
                    self._copy_out(self.fetch.stop)
                    return self._end("")
            except TensorwayError as error:
                cause = next((cause for kind, cause in _CAUSES if isinstance(error, kind)), "failed")
                self.fail(cause, error.true)
        if self._failure is not None and self.safe and (self.fetch.pages is not None or self._look_released()):
            return self._end(*self._failure)
        return None

    # -- steps

    def _problem(self, now: float) -> tuple[str, str] | None:
        """Why it cannot go on, if it cannot."""
        problem = self.link.problem(now, self._until)
        if problem is not None or now < self._until:
            return problem
        reading = self._posted and not self._arrived
        late = "its blocks had not all arrived" if reading else "what it keeps had not all been marked"
        return "deadline", f"{late} within {self.fetch.want.seconds:g} s"

    def _step(self, now: float) -> bool:
        """Whether everything is here, and was in time."""
        if self._bound is None:
            if self.link.bound is None:
                return False
            self._bound = self.link.bound
            self.seconds["handshake"] = now - self._begun
            if self._asking is not None:
                self._asking.greet(self.link)
            if self.fetch.later and self.fetch.start < self.fetch.stop:
                self._looks = list(self._words(self._bound))
        if not self._posted:
            if not self._look_on(self._bound, now):
                return False
            begun, self._posted = time.monotonic(), True
            self._post(self._bound, now)
            self.seconds["posted"] = time.monotonic() - begun
            if not self._transfers:
                return True  # nothing was missing
        if not self._arrived:  # a post that copies is done by now, and need not wait for the engine's next step
            states = [transfer.poll() for transfer in self._transfers]
            if State.FAILED in states:
                raise next(transfer.error for transfer in self._transfers if transfer.error is not None)
            if State.PENDING in states:
                return False
            self._arrived = True
            self._looks = list(self._words(self._bound))
        return self._look_on(self._bound, now)

    def _post(self, bound: Bound, now: float) -> None:
        if self.fetch.start >= self.fetch.stop:
            return
        if not self._layerwise:
            self._read(bound, now)
            return
        for layer in bound.reads.layers:
            before = len(self._transfers)
            self._read(bound.layer(layer, self._reader.endpoint), now)
            self._of_layer[layer] = self._transfers[before:]

    def _read(self, bound: Bound, now: float) -> None:
        fetch = self.fetch
        plan = bound.reads.plan(
            Held.ending(fetch.blocks, fetch.stop, self._reader.topology.ranks[0].groups),
            Held.ending(fetch.their_blocks, fetch.tokens, bound.info.ranks[0].groups),
            fetch.start,
            fetch.stop,
            states=fetch.stop == fetch.tokens,
        )
        left = max(1e-3, self._until - now)
        for producer, batches in plan.items():
            if self._asking is not None and not self._layerwise:
                asked = self._asking.instead(self.link, fetch, producer, batches, self._until)
                if asked is not None:
                    self._transfers.append(asked)
                    continue
            for batch in batches:
                ids = [array("q", side.astype("q").tobytes()) for side in (batch.local, batch.remote)]
                route = bound.routes[producer][batch.route]
                self._transfers.append(self._reader.endpoint.read(route, *ids, deadline=left))

    @property
    def _released(self) -> bool:
        return all(transfer.released for transfer in self._transfers)

    # -- words

    def _words(self, bound: Bound) -> Iterator[_Words]:
        """Those of exactly the blocks that were read, of each rank that they were read from."""
        fetch, most = self.fetch, self._reader.scratch.words
        for producer in bound.reads.producers:
            rank = bound.info.ranks[producer]
            for group, (about, count) in enumerate(zip(rank.groups, rank.blocks, strict=True)):
                ids = fetch.their_blocks[group] if count else ()
                first, each = 0, about.block_tokens
                if not each:
                    ids = ids[-1:] if fetch.stop == fetch.tokens else ()
                else:
                    begin = max(fetch.start, fetch.stop - about.window) if about.window else fetch.start
                    shift = max(0, -(-fetch.tokens // each) - len(ids))
                    first = begin // each
                    ids = ids[max(0, first - shift) : -(-fetch.stop // each) - shift]
                for at in range(0, len(ids), most):
                    yield _Words(producer, group, first + at, ids[at : at + most])

    def _look_on(self, bound: Bound, now: float) -> bool:
        """Fetch words, one transfer after the other; whether all of them hold."""
        while self._failure is None:
            if self._look is None:
                if not self._looks:
                    return True
                if now < self._look_at or not self._begin_look(bound, now):
                    return False
            look = self._look
            assert look is not None
            state = look.transfer.poll()
            if state is State.PENDING:
                return False
            if look.transfer.error is not None:
                raise look.transfer.error
            if not look.transfer.released:
                return False
            self._judge(look, bound, now)
        return False

    def _begin_look(self, bound: Bound, now: float) -> bool:
        place = self._reader.scratch.take()
        if place is None:
            return False
        words = self._looks[0]
        first = starts(bound.info.ranks[words.producer].blocks)[words.group]
        local = self._reader.scratch.ids(place, len(words.ids))
        try:
            transfer = self._reader.endpoint.read(
                bound.boards[words.producer],
                array("q", local),
                array("q", [first + block for block in words.ids]),
                deadline=max(1e-3, self._until - now),
            )
        except TensorwayError:
            self._reader.scratch.give(place)
            raise
        self._look = _Look(words, place, transfer)
        return True

    def _judge(self, look: _Look, bound: Bound, now: float) -> None:
        found = self._reader.scratch.read(look.place, len(look.words.ids))
        self._reader.scratch.give(look.place)
        self._look = None
        verdicts = [verdict(word, self.fetch.want.epoch) for word in found]
        if "late" in verdicts:
            good = self._prefix(look.words, verdicts.index("late"), bound) if self._arrived else self.fetch.start
            self._copy_out(good)
            self._good = good
            self.fail("stale", "it had given the blocks away before they were read, or while they were")
        elif "early" in verdicts:
            self._look_at, self._pause = now + self._pause, min(2 * self._pause, _LOOK_AGAIN[1])
        else:
            self._looks.pop(0)

    def _prefix(self, words: _Words, late: int, bound: Bound) -> int:
        """Tokens that are good although a later block was not: only if each block alone is of use, and all is known."""
        groups = bound.info.ranks[0].groups
        plain = all(group.block_tokens and not group.window for group in groups)
        if not plain or len(groups) > 1 or len(bound.reads.producers) > 1:
            return self.fetch.start
        return max(self.fetch.start, min(self.fetch.stop, (words.first + late) * groups[0].block_tokens))

    def _look_released(self) -> bool:
        if self._look is not None:
            if not self._look.transfer.released:
                return False
            self._reader.scratch.give(self._look.place)
            self._look = None
        return True

    # -- the end

    def seen(self, result: Result, deadline: float) -> Ended:
        """What is told of it; `deadline`: of a whole request, of which the planner has taken off what it waited."""
        waited, took = max(0.0, deadline - self.fetch.want.seconds), time.monotonic() - self._begun
        seconds = {str(phase): each for phase, each in self.seconds.items()}
        return Ended("pull", self.link.engine, result, waited, seconds, took, *moved(self._transfers))

    def _copy_out(self, stop: int) -> None:
        """What was found to be whole goes from staging memory to the pages, if that is where it was read to."""
        fetch, staging = self.fetch, self._staging
        if fetch.pages is None or staging is None or fetch.start >= stop:
            return
        groups = staging.geometry.groups
        staged, pages = (Held.ending(ids, fetch.stop, groups) for ids in (fetch.blocks, fetch.pages))
        staging.copy_out(staged, pages, fetch.start, stop, states=stop == fetch.tokens)

    def _end(self, cause: str, why: str = "") -> Result:
        fetch, want = self.fetch, self.fetch.want
        outcome: messages.Outcome = "failed" if cause else ("received" if self._transfers else "unneeded")
        self._reader.acknowledge(self.link, want, outcome)
        if not cause:
            self.seconds["done"] = time.monotonic() - self._begun - sum(self.seconds.values())
            return Result(want.request, "received", tokens=fetch.stop)
        return Result(want.request, "received", cause, why, self._tokens())

    def _tokens(self) -> int:
        """What is good of a request that failed. A state that was being overwritten is not, and nothing without it."""
        if self._transfers and any(not group.block_tokens for group in self._reader.topology.ranks[0].groups):
            return 0
        return self._good
