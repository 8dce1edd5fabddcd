"""What travels through a router: where a request's blocks are, sealed, so that a client's JSON addresses nothing.

May import the core's ground, attrs and msgspec. A ticket goes from the producer to a router or a client and from there
to the consumer, as JSON that anybody on the way can read and write. So nothing in it is believed before the seal is
checked, and the seal is over the text as it is: the body is one string, which no router's JSON library words anew.

It is no key by itself. The lease that it names decides whether the blocks are still there, and the transport lets only
members of the deployment read them.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
from collections.abc import Mapping
from typing import Annotated, Any, Final

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import TicketInvalid, Unauthenticated

#: Of the envelope and the body. While engines are upgraded one by one, the new ones issue the version before.
VERSION: Final = 1
#: Versions that are read: ours and the one before.
ACCEPTED: Final = frozenset({VERSION, VERSION - 1} - {0})
#: The key whose value is the version, and by which a ticket of ours is told from what others send along.
MARK: Final = "tensorway_kv"

MAX_GROUPS: Final = 256
_SEAL: Final = 32
#: What blake2b derives keys for. Other purposes of the same secret have other texts.
_TICKET: Final = b"tensorway ticket"
_TENANT: Final = b"tensorway tenant"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Path = Annotated[str, msgspec.Meta(max_length=512)]
#: A client may have written it, whatever is in it.
_Request = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Digest = Annotated[str, msgspec.Meta(max_length=128)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Ranks = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
_Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Epoch = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
#: Seconds since 1970, by the producer's clock.
_Time = Annotated[float, msgspec.Meta(ge=0, lt=1e11)]


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a consumer is told of a request whose blocks a producer keeps."""

    #: The producer, and its life: another life of it has none of these blocks.
    engine: _Name
    incarnation: _Name
    #: Where producer and consumer meet: the path of their group in the rendezvous.
    group: _Path
    #: The request, as the producer calls it, and the lease under which its blocks are kept.
    request: _Request
    epoch: _Epoch
    #: Tokens whose KV the blocks hold, from the first on.
    tokens: _Positive
    #: For each cache group, in the order of its tokens.
    blocks: Annotated[tuple[tuple[_Block, ...], ...], msgspec.Meta(min_length=1, max_length=MAX_GROUPS)]
    tp: _Ranks = 1
    pp: _Ranks = 1
    #: Of the producer's geometry, so that one who knows another says so before it plans.
    geometry: _Digest = ""
    issued: _Time
    expires: _Time
    #: See `tenant_of`: tickets of one tenant are of no use to another.
    tenant: _Digest = ""
    #: Whether its blocks are still to be computed: they cannot be read, and are pushed to who registers for them.
    push_only: bool = False
    #: Whether its blocks may be filled after this was issued: not before the words beside them say so.
    later: bool = False
    #: Of the tokens, if the producer knows one: KV of one prompt is not taken for that of another.
    content: _Digest = ""


@attrs.frozen
class Limits:
    """What a consumer takes."""

    #: Characters of the body: about 150,000 block ids.
    max_length: int = 1 << 20
    #: Seconds that a ticket may be good for.
    max_life: float = 3600.0
    #: Seconds by which clocks of two hosts may differ.
    skew: float = 5.0
    #: What the ticket must say, unless None.
    group: str | None = None
    tenant: str | None = None
    content: str | None = None


_USUAL: Final = Limits()
_ENCODE: Final = msgspec.json.Encoder().encode
_DECODE: Final = msgspec.json.Decoder(Ticket).decode


def tenant_of(salt: str, secret: str) -> str:
    """What a ticket says of a tenant's salt: equal for equal salts, and telling nobody the salt itself."""
    return hashlib.blake2b(
        salt.encode(errors="surrogatepass"), digest_size=16, key=_key(secret, _TENANT), person=_TENANT
    ).hexdigest()


def issue(ticket: Ticket, secret: str, version: int = VERSION) -> dict[str, Any]:
    """The ticket as it travels; raises `TicketInvalid` for one that nobody would open."""
    try:
        body = _ENCODE(ticket)
    except UnicodeEncodeError as error:
        raise _invalid("malformed", f"It cannot be written: {error.reason}.") from None
    _check(_read(body), ticket.issued, Limits(max_life=float("inf")))
    return {
        MARK: version,
        "length": len(body.decode()),
        "body": body.decode(),
        "seal": _seal(version, body, secret),
    }


def open(mapping: object, secret: str, now: float, limits: Limits = _USUAL) -> Ticket:
    """The ticket that came with a request; raises `TicketInvalid` unless we sealed it, and it is good now and here.

    `now` is in seconds since 1970. Block ids are within range of some engine; `within` says whether of the producer.
    """
    if not isinstance(mapping, Mapping):
        raise _invalid("malformed", f"It is of type {type(mapping).__name__}, not a mapping.")
    version, text, length, seal = (mapping.get(name) for name in (MARK, "body", "length", "seal"))
    if MARK not in mapping:
        raise _invalid("foreign", f"It has no {MARK!r}: another connector made it.")
    if type(version) is not int or version not in ACCEPTED:
        raise _invalid("foreign", f"This engine reads version {_listed(ACCEPTED)}, and it is of another.")
    if text is None or length is None or seal is None:
        raise _invalid("truncated", "Its body, length or seal is missing.")
    if not isinstance(text, str) or type(length) is not int or not isinstance(seal, str):
        raise _invalid("malformed", "Its body, length or seal is of a wrong type.")
    if len(text) > limits.max_length:
        raise _invalid("malformed", f"It has {len(text):,} characters, and none has more than {limits.max_length:,}.")
    if len(text) < length:
        raise _invalid("truncated", f"Its body has {len(text):,} characters, and says that it has more.")
    # Halves of surrogate pairs, which JSON can carry and UTF-8 cannot, become something that no seal fits.
    body = text.encode(errors="replace")
    if not hmac.compare_digest(_seal(version, body, secret).encode(), seal.encode(errors="replace")):
        raise _invalid("forged", "Its seal does not fit: it was changed, or sealed with another secret.")
    ticket = _read(body)
    _check(ticket, now, limits)
    return ticket


class Seen:
    """Which tickets were used, and by which request: one that comes again for another request is a replay."""

    def __init__(self, capacity: int = 65_536, skew: float = Limits().skew) -> None:
        """`skew`: as in the `Limits` of those who open; before it has passed a ticket is not forgotten."""
        self._capacity, self._skew = capacity, skew
        self._users: dict[tuple[str, str, int], str] = {}
        self._ends: list[tuple[float, tuple[str, str, int]]] = []

    def __len__(self) -> int:
        return len(self._users)

    def use(self, ticket: Ticket, request: str, now: float) -> None:
        """The request uses the ticket, perhaps again; raises `TicketInvalid` if another one did."""
        while self._ends and self._ends[0][0] < now:
            del self._users[heapq.heappop(self._ends)[1]]
        key = (ticket.incarnation, ticket.request, ticket.epoch)
        user = self._users.get(key)
        if user == request:
            return
        if user is not None:
            raise _invalid("replayed", "Another request has used it.")
        if len(self._users) >= self._capacity:
            # To forget one before its time would let it be used twice.
            raise _invalid("replayed", f"{self._capacity:,} tickets are in use, as many as are told from replays.")
        self._users[key] = request
        heapq.heappush(self._ends, (ticket.expires + self._skew, key))


def _read(body: bytes) -> Ticket:
    try:
        return _DECODE(body)
    except UNREADABLE as error:
        raise _invalid("malformed", f"It cannot be read: {str(error).splitlines()[0]}.") from None


def _check(ticket: Ticket, now: float, limits: Limits) -> None:
    for group, ids in enumerate(ticket.blocks):
        if len(set(ids)) != len(ids):
            raise _invalid("malformed", f"A block of group {group} is in it twice.")
    life = ticket.expires - ticket.issued
    if not 0 < life <= limits.max_life:
        raise _invalid("malformed", f"It is good for {life:,.0f} s; expected are up to {limits.max_life:,.0f}.")
    if ticket.issued > now + limits.skew:
        raise _invalid("malformed", f"It was issued {ticket.issued - now:,.0f} s from now: clocks differ.")
    if now >= ticket.expires + limits.skew:
        raise _invalid("expired", f"It expired {now - ticket.expires:,.0f} s ago.")
    expected = {"group": limits.group, "tenant": limits.tenant, "content": limits.content}
    for name, value in expected.items():
        if value is not None and getattr(ticket, name) != value:
            raise _invalid("foreign", f"It is for another {name}.")


def _key(secret: str, purpose: bytes) -> bytes:
    if not secret:
        raise Unauthenticated(
            "A ticket for a hand-over was to be sealed or opened.",
            "There is no secret, and anybody could seal one.",
            "Set TENSORWAY_SECRET to the same long random text in every process of the deployment.",
        )
    return hashlib.blake2b(secret.encode(), digest_size=_SEAL, person=purpose).digest()


def _seal(version: int, body: bytes, secret: str) -> str:
    sealed = b"%d\n%b" % (version, body)
    return hashlib.blake2b(sealed, digest_size=_SEAL, key=_key(secret, _TICKET), person=_TICKET).hexdigest()


_TO_DO: Final = {
    "forged": "Give every engine the same TENSORWAY_SECRET, and let routers pass tickets on unchanged.",
    "expired": "Raise the producer's lease, or let requests wait less; the prompt can be computed here.",
    "truncated": "Let routers pass tickets on whole.",
    "foreign": "Send the ticket to an engine of the group, tenant and version that it was made for.",
    "malformed": "Compare the versions and clocks of both engines; if they agree, report this.",
    "replayed": "Use a ticket for one request; that request may try again.",
}


def _invalid(cause: str, true: str) -> TicketInvalid:
    return TicketInvalid("A ticket for a hand-over came with a request.", true, _TO_DO[cause], cause)


def _listed(versions: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(versions)))
