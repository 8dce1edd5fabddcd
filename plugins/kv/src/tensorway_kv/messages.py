"""What engines tell each other about hand-overs: typed, versioned, bounded, and read without ever raising.

May import the core's ground and msgspec. Messages are the payloads of a transport's notifications, so that their sender
is known; each also names its sender, and `Reader.checked` refuses one that names another. What a message says about a
lease is believed only by who granted it (`leases`), because its epoch is known to nobody but the ticket's holder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal, get_args

import msgspec

from tensorway.decoding import UNREADABLE

#: Written before each message. Semantics that change need another number.
VERSION: Final = 1
#: Versions that are read: ours and the one before, so that engines can be upgraded one by one.
ACCEPTED: Final = frozenset({VERSION, VERSION - 1} - {0})
_MAGIC: Final = b"tkv"
_HEAD: Final = len(_MAGIC) + 1

#: No transport carries a longer notification.
MAX_BYTES: Final = 65_536
MAX_HELD: Final = 4096
MAX_GROUPS: Final = 256
#: Blocks that one registration may name.
MAX_BLOCKS: Final = 1 << 20
MAX_RANKS: Final = 65_536

#: Why a message was refused. `foreign`: not ours, or of a version that is not read; `forged`: it names another sender
#: than the one it came from.
Cause = Literal["malformed", "truncated", "foreign", "forged"]
#: What a consumer's rank says of what it read: the blocks are there; it needed none; it reads no more and does without.
Outcome = Literal["received", "unneeded", "failed"]
#: Why a producer writes nothing, or nothing more. `unknown`, `epoch`, `ended`, `expired`: there is no such lease, or no
#: more; `tokens`: it has others than are wanted; `aborted`: it gave the request up; `geometry`: what it has cannot be
#: written there; `deadline`, `failed`: it did not come to an end; `withdrawn`: nobody wants it any more.
RefusalCause = Literal[
    "unknown", "epoch", "ended", "expired", "tokens", "aborted", "geometry", "deadline", "failed", "withdrawn"
]

_Incarnation = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
#: A client may have written it, whatever is in it.
_Request = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Epoch = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
_Readers = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Run(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Blocks whose ids are neighbors."""

    first: _Count
    count: _Positive


_Landing = Annotated[tuple[tuple[Run, ...], ...], msgspec.Meta(min_length=1, max_length=MAX_GROUPS)]


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A lease, as its consumer knows it."""

    request: _Request
    epoch: _Epoch


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="heartbeat"):
    """A consumer still wants these."""

    #: The life of the engine that says it, here and in all others.
    sender: _Incarnation
    rank: _Rank
    held: Annotated[tuple[Held, ...], msgspec.Meta(min_length=1, max_length=MAX_HELD)]


class Ack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ack"):
    """A rank of a consumer needs nothing more of a rank of the producer for this request."""

    sender: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch
    #: The rank of the producer that is told.
    producer_rank: _Rank
    #: How many ranks of the consumer tell it.
    readers: _Readers
    outcome: Outcome


class PushRegistration(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="push"):
    """A rank of a consumer has landing memory ready, into which a rank of the producer is to write."""

    sender: _Incarnation
    #: What the consumer is called, so that it can be found; that it lives this life, the rendezvous says.
    engine: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch
    #: For each cache group the ids of the blocks, as runs of neighbors.
    landing: _Landing
    #: The tokens that are wanted: from `first` to before `stop`.
    first: _Count
    stop: _Count
    #: After so many seconds nobody waits for them any more.
    seconds: _Seconds

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The ids, one by one."""
        return ids(self.landing)


class Greeting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="greeting"):
    """A rank of a consumer would have a rank of the producer write, and asks whether it is connected for that."""

    sender: _Incarnation
    engine: _Incarnation
    rank: _Rank


class Ready(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ready"):
    """A rank of the producer is connected to the rank that is told, and can answer it."""

    sender: _Incarnation
    rank: _Rank


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ask"):
    """A rank of a consumer would read these blocks of a rank of the producer, which is to write them to it instead.

    Nothing is granted by it: the consumer may read them, and finds out by the words beside them whether it was in time.
    """

    sender: _Incarnation
    engine: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch
    #: For each cache group the ids of the blocks here, of so many tokens, and of those that they are written to.
    theirs: _Landing
    tokens: _Count
    landing: _Landing
    first: _Count
    stop: _Count
    seconds: _Seconds


class Unask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="unask"):
    """A rank of a consumer wants no more of what it asked for; it is to be told when nothing is written."""

    sender: _Incarnation
    engine: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch


class Pushed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="pushed"):
    """A rank of the producer has written all that it had to, to the rank that is told, and will write no more."""

    sender: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch


class Withdraw(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="withdraw"):
    """A rank of a consumer wants no more of what it registered for; it is to be told when nothing is written."""

    sender: _Incarnation
    engine: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch


class Refusal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="refusal"):
    """A rank of the producer writes nothing, or nothing more, of this request to the rank that is told."""

    sender: _Incarnation
    rank: _Rank
    request: _Request
    epoch: _Epoch
    cause: RefusalCause


Message = Heartbeat | Ack | PushRegistration | Greeting | Ready | Ask | Unask | Pushed | Withdraw | Refusal

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(Message).decode


def encode(message: Message, version: int = VERSION) -> bytes:
    """A message as the payload of a notification."""
    return _MAGIC + bytes((version,)) + _ENCODE(message)


def runs(ids: Sequence[Sequence[int]]) -> tuple[tuple[Run, ...], ...]:
    """Ids of each group as runs of neighbors, in their order."""
    made: list[tuple[Run, ...]] = []
    for group in ids:
        found: list[list[int]] = []
        for one in group:
            if found and one == sum(found[-1]):
                found[-1][1] += 1
            else:
                found.append([one, 1])
        made.append(tuple(Run(first, count) for first, count in found))
    return tuple(made)


def ids(landing: Sequence[Sequence[Run]]) -> tuple[tuple[int, ...], ...]:
    """The same one by one."""
    return tuple(tuple(one for run in runs for one in range(run.first, run.first + run.count)) for runs in landing)


def heartbeats(sender: str, rank: int, held: Iterable[Held], limit: int = MAX_BYTES) -> Iterator[bytes]:
    """Payloads that say that all of these are still wanted, none longer than the transport takes."""
    # Ids are mostly short. What is too long is halved until it fits; one alone always does.
    waiting = [tuple(held)]
    while waiting:
        some = waiting.pop()
        payload = encode(Heartbeat(sender, rank, some)) if some else b""
        if len(some) > 1 and (len(payload) > limit or len(some) > MAX_HELD):
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
        elif some:
            yield payload


class Reader:
    """Reads what comes from peers, and counts what it refuses. One thread uses it."""

    def __init__(self) -> None:
        #: Messages that were not believed, by cause.
        self.refused: dict[Cause, int] = dict.fromkeys(get_args(Cause), 0)

    def decode(self, payload: object) -> Message | None:
        """The message that these bytes are; None, and counted, if they are none. Never raises."""
        message = _read(payload)
        if isinstance(message, str):
            self.refused[message] += 1
            return None
        return message

    def checked(self, message: Message, sender: str) -> Message | None:
        """The message, if it came from who it says it is from; `sender` is the incarnation that the transport knows."""
        if message.sender != sender:
            self.refused["forged"] += 1
            return None
        return message


def _read(payload: object) -> Message | Cause:
    if not isinstance(payload, bytes) or len(payload) > MAX_BYTES:
        return "malformed"
    if len(payload) < _HEAD and _MAGIC.startswith(payload[: len(_MAGIC)]):
        return "truncated"
    if not payload.startswith(_MAGIC) or payload[_HEAD - 1] not in ACCEPTED:
        return "foreign"
    try:
        message: Message = _DECODE(memoryview(payload)[_HEAD:])
    except UNREADABLE as error:
        return "truncated" if "truncated" in str(error) else "malformed"
    if isinstance(message, PushRegistration | Ask) and not _lands(message):
        return "malformed"
    return message


def _lands(message: PushRegistration | Ask) -> bool:
    """Whether it names no block twice, into which two would be written, and no more blocks than there can be."""
    if isinstance(message, Ask) and sum(run.count for runs in message.theirs for run in runs) > MAX_BLOCKS:
        return False
    for runs in message.landing:
        in_order = sorted((run.first, run.first + run.count) for run in runs)
        if any(stop > begin for (_, stop), (begin, _) in pairwise(in_order)):
            return False
    return sum(run.count for runs in message.landing for run in runs) <= MAX_BLOCKS and message.first < message.stop
