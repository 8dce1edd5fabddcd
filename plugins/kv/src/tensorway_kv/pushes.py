"""One request as our rank writes it to one rank of a consumer: all at once, or layer by layer while it is computed.

May import the core and this package's links, boards and writing. `advance` never waits and never raises for what a peer
or a transfer does. What is written to is staging memory of the consumer. It is told that all is there only after our
own words have said that nothing was taken from us meanwhile; and it is told anything at all only when nothing of ours
is written there any more.
"""

from __future__ import annotations

import time
from typing import Final, get_args

from tensorway.errors import DeadlineExceeded, Incompatible, LayoutInvalid, MemoryInvalid, TensorwayError
from tensorway.transport import State, Transfer
from tensorway_kv import messages
from tensorway_kv.board import Board
from tensorway_kv.links import Link
from tensorway_kv.orders import Send, Target
from tensorway_kv.reads import Held
from tensorway_kv.writing import Way, Writer, Written

_CAUSES: Final[tuple[tuple[type[TensorwayError], messages.RefusalCause], ...]] = (
    (DeadlineExceeded, "deadline"),
    (MemoryInvalid, "geometry"),
    (LayoutInvalid, "geometry"),
    (Incompatible, "geometry"),
)
_KNOWN: Final[dict[str, messages.RefusalCause]] = {cause: cause for cause in get_args(messages.RefusalCause)}


def refusal(incarnation: str, rank: int, request: str, epoch: int, cause: str) -> bytes:
    """What a consumer's rank is told that will get nothing, or nothing more."""
    return messages.encode(messages.Refusal(incarnation, rank, request, epoch, _KNOWN.get(cause, "failed")))


class Push:
    """A request that is being written to a rank."""

    def __init__(self, target: Target, link: Link[Written], writer: Writer, board: Board) -> None:
        self.target, self.link, self._writer, self._board = target, link, writer, board
        self._until = time.monotonic() + target.seconds
        #: What this step computes, and the layers of it that were sent.
        self._chunk: Send | None = None
        self._layers: set[int] = set()
        #: Tokens of which all layers were sent, and the last blocks that any were sent from.
        self._spans: list[tuple[int, int]] = []
        self._before: Send | None = None
        #: Everything, once it is computed and kept; and whether what was missing of it is on its way.
        self._whole: Send | None = None
        self._posted = False
        self._transfers: list[Transfer] = []
        #: Why it will not be; empty while it may.
        self.failure = ""
        link.need(target.seconds)

    def add(self, send: Send) -> None:
        """Tokens that are computed in this step, or all of them."""
        if self._whole is not None:
            return
        if self._before is not None and not self._continues(self._before, send):
            # It was taken from its blocks and begun anew: what was read from them may have been anybody's.
            self._spans.clear()
        self._before, self._layers = send, set()
        self._chunk, self._whole = (None, send) if send.word else (send, None)

    def after_layer(self, number: int) -> None:
        """A layer of this step's tokens is computed: send it on. What goes wrong is found by `advance`."""
        send, way = self._chunk, self._way
        if send is None or way is None or self.failure or number not in way.layers - self._layers:
            return
        start, stop = max(send.first, self.target.first), min(send.stop, self.target.stop)
        try:
            if start < stop:
                own = Held.ending(send.blocks, send.stop, self._writer.groups)
                self._transfers += way.layer(number).write(
                    own, self._landing(way), start, stop, self._until, states=False, clip=True
                )
        except TensorwayError as error:
            self.refuse(_cause(error))
            return
        self._layers.add(number)
        if self._layers == way.layers and self._complete(send):
            self._spans.append((send.first, send.stop))

    def refuse(self, cause: str) -> None:
        """Write nothing more; who is to have it is told so as soon as that is true."""
        if not self.failure:
            self.failure = cause
            for transfer in self._transfers:
                transfer.cancel()

    def advance(self, now: float) -> bool:
        """Do what can be done now; whether it is over, and who is to know has been told."""
        if not self.failure:
            try:
                if self.link.hopeless is not None or self.link.lost:
                    self.refuse("lost")
                elif now >= self._until:
                    self.refuse("deadline")
                elif self._step():
                    self._say(messages.encode(messages.Pushed(*self._name)))
                    return True
            except TensorwayError as error:
                self.refuse(_cause(error))
        if self.failure and self.released:
            self._say(refusal(*self._name, self.failure))
            return True
        return False

    @property
    def released(self) -> bool:
        """Whether nothing that has begun is still under way."""
        return all(transfer.released for transfer in self._transfers)

    # -- inside

    @property
    def _name(self) -> tuple[str, int, str, int]:
        writer, target = self._writer, self.target
        return writer.incarnation, writer.rank, target.request, target.epoch

    @property
    def _way(self) -> Way | None:
        bound = self.link.bound
        return bound.ways.get(self.target.reader) if bound is not None else None

    def _say(self, payload: bytes) -> None:
        self.link.send(self.target.reader, payload)

    def _step(self) -> bool:
        """Whether everything was written, from blocks that were held all the time."""
        if self.link.bound is None:
            return False
        if self._way is None:
            raise MemoryInvalid("A rank asked for blocks.", "It takes none from this rank.", "Ask who has them.")
        states = [transfer.poll() for transfer in self._transfers]
        if State.FAILED in states:
            raise next(transfer.error for transfer in self._transfers if transfer.error is not None)
        self._transfers = [transfer for transfer in self._transfers if transfer.pending or not transfer.released]
        if self._whole is None or self._transfers:
            return False
        if not self._posted:
            # Not before all that was sent earlier is there: what is sent again is to be what stays.
            self._posted = True
            self._transfers = self._post(self._way, self._whole)
            return self._step()
        if not self._held(self._whole):
            self.refuse("expired")
            return False
        return True

    def _held(self, send: Send) -> bool:
        """Whether nothing was taken from us while it was written."""
        return self._board.holds(send.blocks, send.word)

    def _post(self, way: Way, send: Send) -> list[Transfer]:
        """Send what was not sent yet."""
        target, landing = self.target, self._landing(way)
        own = Held.ending(send.blocks, send.stop, self._writer.groups)
        states = target.stop == send.stop
        if not self._spans:
            return way.write(own, landing, target.first, target.stop, self._until, states=states)
        # Raises, as the line above would, unless both sides have blocks for all of it.
        way.reads.plan(landing, own, target.first, target.stop, states=states)
        found = way.write(own, landing, target.stop, target.stop, self._until, states=states)
        for start, stop in _between(self._spans, target.first, target.stop):
            found += way.write(own, landing, start, stop, self._until, states=False, clip=True)
        return found

    def _landing(self, way: Way) -> Held:
        return Held.ending(self.target.landing, self.target.stop, way.groups)

    def _complete(self, send: Send) -> bool:
        """Whether lists of groups without a window are of all tokens: what a shorter one lacks was not sent."""
        return all(
            group.window or len(ids) * group.block_tokens >= send.stop
            for group, ids in zip(self._writer.groups, send.blocks, strict=False)
            if group.block_tokens
        )

    def _continues(self, before: Send, send: Send) -> bool:
        """Whether it goes on where it was, in the blocks that it had."""
        if send.word == 0 and send.first < before.stop:
            return False
        old, new = (Held.ending(one.blocks, one.stop, self._writer.groups) for one in (before, send))
        for group, had, has, first, begin in zip(
            self._writer.groups, old.blocks, new.blocks, old.first, new.first, strict=False
        ):
            shift = max(first, begin)
            both = list(zip(had[shift - first :], has[shift - begin :], strict=False))
            if group.block_tokens and any(one != other for one, other in both):
                return False
        return True


def _between(spans: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """What of the tokens from `start` to before `stop` is in none of the spans."""
    found = []
    for first, end in sorted(spans):
        if start < min(first, stop):
            found.append((start, min(first, stop)))
        start = max(start, end)
    if start < stop:
        found.append((start, stop))
    return found


def _cause(error: TensorwayError) -> messages.RefusalCause:
    return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), "failed")
