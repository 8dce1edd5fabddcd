"""How engines find each other: an engine's life, its ranks, and what each rank holds, as records in the rendezvous.

May import the core, msgspec and this package's topology. Below the path of a deployment, `engines/NAME` says which life
an engine lives; `ranks/NAME/LIFE/` is the directory in which its ranks, and the ranks that read from it, are members;
`held/NAME/LIFE/rN` says what a rank holds. All are under leases, so that nothing stays of who died.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Final, TypeVar

import msgspec

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded, DescriptionInvalid, TensorwayError
from tensorway.kv import RankGeometry
from tensorway.rendezvous import Directory, Fact, Lease, Rendezvous, Watch
from tensorway.transport import Transport
from tensorway_kv.decoding import decoded
from tensorway_kv.topology import MAX_RANKS

_log = logger("kv")
#: Records of another version are of an engine that cannot be read from.
VERSION: Final = 1
#: Seconds between two looks at what changed, also where nothing wakes whoever looks.
_LOOK: Final = 0.5

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Address = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]


class EngineRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which life an engine lives."""

    version: int
    incarnation: _Name
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]


class RankRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a rank of it holds."""

    version: int
    #: Of its endpoint: an address means something in that process only.
    incarnation: _Name
    geometry: RankGeometry
    #: Where its generation board begins.
    board: _Address
    #: Staging pages, into which others may write; None if it has none.
    landing: RankGeometry | None = None


_Record = TypeVar("_Record", EngineRecord, RankRecord)
_ENGINE: Final = msgspec.msgpack.Decoder(EngineRecord)
_RANK: Final = msgspec.msgpack.Decoder(RankRecord)


class Ground:
    """Where the engines of a deployment meet, and the one thread that looks at what is written there."""

    def __init__(self, rendezvous: Rendezvous, path: str, presence: float, facts: Mapping[str, str]) -> None:
        self.rendezvous, self.path, self._ttl = rendezvous, path, presence
        self._facts = {name: Fact(value) for name, value in facts.items()}
        self._told: dict[str, bytes] = {}
        self._lease: Lease | None = None
        self._watch: Watch | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def engine_key(self, engine: str) -> str:
        """Where an engine says which life it lives."""
        return f"{self.path}/engines/{engine}"

    def rank_key(self, engine: str, incarnation: str, rank: int) -> str:
        """Where a rank says what it holds."""
        return f"{self.path}/held/{engine}/{incarnation}/r{rank}"

    def tell(self, key: str, record: EngineRecord | RankRecord, deadline: float) -> None:
        """Write a record, and keep it there until the end."""
        self._told[key] = msgspec.msgpack.encode(record)
        self._put(deadline)

    def follow(self, lives: Callable[[str, str], None] | None = None) -> None:
        """Keep what was told, and say which life each engine lives, whenever that changes, on a thread of its own."""
        self._thread = threading.Thread(target=self._follow, args=(lives,), name="tensorway-kv-meeting", daemon=True)
        self._thread.start()

    def engine(self, engine: str, deadline: float) -> EngineRecord | None:
        """Which life it lives now; None if none is known."""
        record = self.rendezvous.get(self.engine_key(engine), deadline)
        return _read(record.value, _ENGINE, engine) if record is not None else None

    def wait_engine(self, engine: str, deadline: float) -> EngineRecord:
        """The same, as soon as it lives."""
        return _read(self.rendezvous.wait(self.engine_key(engine), deadline).value, _ENGINE, engine)

    def ranks(self, engine: str, incarnation: str, count: int, until: float) -> list[RankRecord]:
        """What all its ranks hold, as soon as all have said it."""
        found = []
        for rank in range(count):
            left = until - time.monotonic()
            if left <= 0:
                true = f"{rank} of its {count} ranks have said what they hold."
                raise DeadlineExceeded(f"Engine {engine} was to be reached.", true, "See whether all have started.")
            value = self.rendezvous.wait(self.rank_key(engine, incarnation, rank), left).value
            found.append(_read(value, _RANK, f"{engine}, rank {rank}"))
        return found

    def join(self, endpoint: Transport, engine: str, incarnation: str, name: str, says: Mapping[str, str]) -> Directory:
        """Become a member of an engine's directory. `says`: what is for information, and need not be equal."""
        facts = {"kv": Fact(VERSION), **self._facts, **{key: Fact(value, "inform") for key, value in says.items()}}
        group = f"{self.path}/ranks/{engine}/{incarnation}"
        return Directory(self.rendezvous, endpoint, name, group, facts, self._ttl)

    def close(self, deadline: float) -> None:
        """Take back what was told."""
        self._ended.set()
        if self._watch is not None:
            self._watch.close()
        until = time.monotonic() + deadline
        if self._thread is not None:
            self._thread.join(deadline)
        try:
            for key, value in self._told.items():
                record = self.rendezvous.get(key, max(0.0, until - time.monotonic()))
                if record is not None and record.value == value:  # a successor may have written its own
                    self.rendezvous.delete(key, deadline=max(0.0, until - time.monotonic()))
            if self._lease is not None:
                self.rendezvous.end(self._lease, max(0.0, until - time.monotonic()))
        except TensorwayError as error:
            _log.debug("What was told ends with its lease: %s", error)

    def _put(self, deadline: float) -> None:
        if "lease" in self.rendezvous.abilities and (self._lease is None or self._lease.lost):
            self._lease = self.rendezvous.lease(self._ttl, deadline)
        for key, value in self._told.items():
            self.rendezvous.put(key, value, lease=self._lease, deadline=deadline)

    def _tell_again(self) -> None:
        """Our lease was lost, perhaps because we stood still; what a successor says by now stays as it is."""
        for key, value in list(self._told.items()):
            record = self.rendezvous.get(key, _LOOK * 4)
            if record is not None and record.value != value:
                _log.error("What was told under %s is told by another process now; this one is no longer heard.", key)
                del self._told[key]
        self._put(_LOOK * 4)

    def _follow(self, lives: Callable[[str, str], None] | None) -> None:
        known: dict[str, bytes] = {}
        changed = True
        while not self._ended.is_set():
            try:
                if lives is not None and self._watch is None and "watch" in self.rendezvous.abilities:
                    self._watch, changed = self.rendezvous.watch(self.engine_key("")), True
                if lives is not None and changed:
                    self._look(known, lives)
                if self._lease is not None and self._lease.lost:
                    self._tell_again()
                if self._watch is not None:
                    changed = bool(self._watch.next(_LOOK))
                    continue
            except TensorwayError as error:
                # The rendezvous is away; what is connected goes on, and what changed is read when it is back.
                _log.debug("The rendezvous does not answer: %s", error)
                changed = True
            self._ended.wait(_LOOK)

    def _look(self, known: dict[str, bytes], lives: Callable[[str, str], None]) -> None:
        prefix = self.engine_key("")
        for record in self.rendezvous.list(prefix, _LOOK * 4):
            name = record.key.removeprefix(prefix)
            if known.get(name) == record.value:
                continue
            known[name] = record.value
            try:
                lives(name, _read(record.value, _ENGINE, name).incarnation)
            except DescriptionInvalid as error:
                _log.warning("%s", error)


def _read(value: bytes, decoder: msgspec.msgpack.Decoder[_Record], whose: str) -> _Record:
    asked, to_do = f"What {whose} says of itself was read.", "Install one version of tensorway-kv everywhere."
    return decoded(decoder, value, VERSION, asked, to_do)
