"""How the ranks of one of vLLM's groups find each other: over that group, once, before anything of ours connects.

May import torch, the core and this package's options. Each exchange is of short words of all ranks, with a deadline,
and what keeps one rank out keeps all out: so none waits for one that will not come.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

import attrs
import msgspec
import torch

import tensorway
from tensorway.decoding import UNREADABLE
from tensorway.eplb import Group
from tensorway.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    DescriptionInvalid,
    Incompatible,
    PeerLost,
    TensorwayError,
)
from tensorway.platforms import boot_id
from tensorway.rendezvous import Rendezvous
from tensorway.rendezvous.hosts import policy_of
from tensorway_vllm.eplb.options import EplbOptions

_KIND: Final = "eplb_communicator"
#: Chosen by measuring, by all ranks together: see `tensorway_eplb.choice`.
MEASURED: Final = "measured"
_ASKED: Final = "Ranks of vLLM's expert balancing were to meet."
#: A word is never longer.
_ROOM: Final = 2048
_HEAD: Final = 4
_WHY: Final = 600
_T = TypeVar("_T")


class _Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a rank can do."""

    host: str
    communicator: str
    version: str
    why: str


class _Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where to meet, as the first rank says; of the others only why they cannot go on."""

    path: str = ""
    address: str = ""
    secret: str = ""
    why: str = ""


_DECODE_HELLO: Final = msgspec.msgpack.Decoder(_Hello).decode
_DECODE_PLACE: Final = msgspec.msgpack.Decoder(_Place).decode


@attrs.frozen
class Met:
    """What came of it, at one rank."""

    group: Group
    rendezvous: Rendezvous
    #: The communicator that all of them can use.
    communicator: str


class Meeting:
    """One rank's side. All ranks go through the same steps."""

    def __init__(self, coordinator: Any, options: EplbOptions, device: str) -> None:
        """`coordinator` is vLLM's `GroupCoordinator` of these ranks; words go over its group of processors.

        `device` is the kind of memory that weights are in, as torch calls it.
        """
        self._group, self._options = coordinator.cpu_group, options
        self._device = "rocm" if device == "cuda" and torch.version.hip is not None else device
        self._me, self._size = int(coordinator.rank_in_group), int(coordinator.world_size)
        self._until = time.monotonic() + options.open_seconds

    @property
    def left(self) -> float:
        """Seconds that opening may still take."""
        return max(1e-3, self._until - time.monotonic())

    def meet(self) -> Met:
        """Agree on a communicator, and on a place; raises what keeps any rank out."""
        name, why = _usable(self._options.communicator, self._device)
        hellos = self._all(_Hello(boot_id(), name, tensorway.__version__, why[:_WHY]), _DECODE_HELLO)
        self._check([hello.why for hello in hellos])
        self._agree(hellos)
        one_host = len({hello.host for hello in hellos}) == 1
        mine, own = self._opened(one_host) if self._me == 0 else (_Place(), None)
        try:
            place, *_ = self._all(mine, _DECODE_PLACE)
            self._check([place.why])
            rendezvous = own or self._entered(place)
        except BaseException:
            if own is not None:
                own.close()
            raise
        members = tuple(f"rank-{rank}" for rank in range(self._size))
        return Met(Group(place.path, members, self._me), rendezvous, name)

    def settle(self, act: Callable[[], _T]) -> _T:
        """Do something that may fail, on every rank; it counts if none did. What this one raised comes first."""
        failed: BaseException | None = None
        done: list[_T] = []
        try:
            done.append(act())
        except Exception as error:  # a backend raises what it likes, and the others must hear of it
            failed = error
        try:
            # Who failed says so at once; the others may need all of their time until they know.
            words = self._all(_Place(why=_true(failed)), _DECODE_PLACE, 2 * self._options.open_seconds)
        except TensorwayError:
            if failed is None:
                raise
            words = []
        if failed is not None:
            raise failed
        self._check([word.why for word in words])
        return done[0]

    # -- steps

    def _check(self, whys: Sequence[str]) -> None:
        if kept := [f"rank {rank}: {why}" for rank, why in enumerate(whys) if why]:
            to_do = "Make it usable on every rank (tensorway vllm doctor), or ask for another."
            raise BackendUnavailable(_ASKED, f"{'; '.join(kept)}", to_do)

    def _agree(self, hellos: Sequence[_Hello]) -> None:
        for what, said in (
            ("the communicator", [hello.communicator for hello in hellos]),
            ("tensorway", [hello.version for hello in hellos]),
        ):
            if len(set(said)) > 1:
                true = f"Ranks differ in {what}: {', '.join(f'{rank}: {each}' for rank, each in enumerate(said))}."
                to_do = "Install the same on every host, and name the communicator instead of auto."
                raise Incompatible(_ASKED, true, to_do)

    def _opened(self, one_host: bool) -> tuple[_Place, Rendezvous | None]:
        """The first rank's place; if it has none, all hear why."""
        path = f"/vllm/eplb/{uuid.uuid4().hex}"
        if self._options.rendezvous:
            return _Place(path), None
        secret = secrets.token_hex(16)
        try:
            own: Rendezvous = tensorway.create("rendezvous", "direct", {"secret": secret, "host": self._host(one_host)})
        except TensorwayError as error:
            return _Place(why=_true(error)), None
        return _Place(path, own.address, secret), own

    def _host(self, one_host: bool) -> str:
        if self._options.host != "auto":
            return self._options.host
        if policy := "loopback" if one_host else policy_of(""):
            return policy
        from vllm.utils.network_utils import get_ip

        return f"addr:{get_ip()}"

    def _entered(self, place: _Place) -> Rendezvous:
        name, options = self._options.rendezvous, dict(self._options.rendezvous_options)
        if not name:
            name, options = "direct", {"address": place.address, "secret": place.secret}
        found: Rendezvous = tensorway.create("rendezvous", name, options)
        return found

    def _all(self, word: _Hello | _Place, decode: Callable[[bytes], _T], seconds: float | None = None) -> list[_T]:
        """What all say, by rank."""
        payload = msgspec.msgpack.encode(word)
        assert len(payload) <= _ROOM - _HEAD, "words are short"
        mine = torch.zeros(_ROOM, dtype=torch.uint8)
        framed = len(payload).to_bytes(_HEAD, "big") + payload
        mine[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        theirs = [torch.zeros_like(mine) for _ in range(self._size)]
        self._gathered(theirs, mine, self.left if seconds is None else seconds)
        return [_word(bytes(each.tolist()), rank, decode) for rank, each in enumerate(theirs)]

    def _gathered(self, theirs: list[torch.Tensor], mine: torch.Tensor, seconds: float) -> None:
        began = time.monotonic()
        try:
            work = torch.distributed.all_gather(theirs, mine, group=self._group, async_op=True)
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if time.monotonic() - began >= seconds:
                true = f"Not all of the {self._size} ranks came within {seconds:.0f} s ({text})."
                raise DeadlineExceeded(_ASKED, true, "See whether all of them run; raise open_seconds.") from error
            raise PeerLost(_ASKED, f"vLLM's group is broken: {text}", "Start the engine again.") from error


def _usable(name: str, device: str) -> tuple[str, str]:
    """Which communicator this rank would use for such memory, and why it cannot."""
    try:
        import tensorway_eplb  # noqa: F401
    except ImportError as error:
        return name, f'tensorway-eplb cannot be loaded ({error}); pip install "tensorway[eplb]"'
    if name == MEASURED:
        return name, ""
    decision = tensorway.decide(_KIND, name, device=device)
    if decision.winner is not None:
        return decision.winner.name, ""
    asked = [loser for loser in decision.losers if name in ("auto", loser.candidate.name, loser.candidate.label)]
    reasons = "; ".join(f"{loser.candidate.name}: {loser.reason}" for loser in asked)
    return name, f"{_KIND} {name} cannot be used: {reasons or 'it is not installed'}"


def _true(error: BaseException | None) -> str:
    if error is None:
        return ""
    return (error.true if isinstance(error, TensorwayError) else f"{type(error).__name__}: {error}")[
        :_WHY
    ] or "it failed"


def _word(framed: bytes, rank: int, decode: Callable[[bytes], _T]) -> _T:
    length = int.from_bytes(framed[:_HEAD], "big")
    try:
        return decode(framed[_HEAD : _HEAD + length])
    except UNREADABLE as error:
        true = f"What rank {rank} says cannot be read: {str(error).splitlines()[0]}"
        raise DescriptionInvalid(_ASKED, true, "Install one version of tensorway everywhere.") from None
