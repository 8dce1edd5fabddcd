"""The threads of a planner of `shared-store`: one looks for blocks, one says what our files hold and keeps the quota.

May import the core and this package's meeting and store. What they find is read without a lock: each value is written
once, or only grows.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.errors import TensorwayError
from tensorway_kv.meeting import Ground
from tensorway_kv.store.catalogue import Catalogue
from tensorway_kv.store.folder import Entry, Folder
from tensorway_kv.store.looks import Look
from tensorway_kv.store.seals import Seals
from tensorway_kv.store.sections import sections

_log = logger("kv")
#: Seconds between two looks at how much is stored; longer if looking takes long.
_SWEEP: Final = 1.0
_REST: Final = 10
#: What is left of the quota when something had to be removed, so that not every block removes another.
_LEAVE: Final = 0.9
#: Seconds after which a file that is still being written is nobody's.
_ABANDONED: Final = 3600.0
#: Removed blocks that wait for somebody who asks for events.
_TOLD: Final = 1 << 17
_TURN: Final = 0.5


@attrs.frozen
class Whose:
    """Whose blocks are looked for and kept."""

    engine: str
    incarnation: str
    ranks: int
    facts: Mapping[str, str]


@attrs.frozen
class Kept:
    """What is to be kept in the folder."""

    #: Whether anything is saved, so that others must know what it is.
    saves: bool
    #: Bytes that there may be; 0 for no end.
    quota: int


class Keeper:
    """Both threads, and what they know."""

    def __init__(self, whose: Whose, kept: Kept, ground: Ground, seals: Seals, folders: tuple[Folder, Folder]) -> None:
        self._whose, self._kept, self._ground, self._seals = whose, kept, ground, seals
        self._trouble = ""
        self._manifests, self._blocks = folders
        #: What can be loaded; None until all ranks have said what they hold.
        self.catalogue: Catalogue | None = None
        #: Layout and name of blocks that were removed for the quota.
        self.removed: deque[tuple[str, bytes]] = deque(maxlen=_TOLD)
        #: Bytes in the folder, as far as it is known: without a quota nobody counts.
        self.stored: int | None = None
        self._ended = threading.Event()
        self._looks: queue.SimpleQueue[Look | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"tensorway-kv-{name}", daemon=True)
            for name, target in (("look", self._look_on), ("keep", self._keep))
        ]
        for thread in self._threads:
            thread.start()

    def look(self, look: Look) -> None:
        """Find out what is stored of a request."""
        self._looks.put(look)

    def close(self, deadline: float) -> None:
        """End the threads; one that hangs is left."""
        self._ended.set()
        self._looks.put(None)
        until = time.monotonic() + deadline
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    # -- looking

    def _look_on(self) -> None:
        while (look := self._looks.get()) is not None:
            try:
                self._find(look)
            except OSError as error:
                look.why = str(error)
                _log.debug("Blocks of %s could not be looked for: %s", look.request, error)
            except Exception as error:  # the thread serves other requests, too
                look.why = repr(error)
                _log.exception("blocks could not be looked for")
            look.end()

    def _find(self, look: Look) -> None:
        while self.catalogue is None and not self._done(look):
            self._ended.wait(0.01)
        catalogue = self.catalogue
        if catalogue is None or self._done(look):
            return
        catalogue.refresh(self._manifests)
        for block in look.hashes:
            if self._done(look):
                return
            name = self._seals.name(block, look.tenant)
            row = {group: catalogue.have(self._blocks, group, name) for group in catalogue.groups}
            look.found.append(row)
            look.names.append(name)
            if look.useless(row):
                return

    def _done(self, look: Look) -> bool:
        return look.over or self._ended.is_set() or time.monotonic() >= look.until

    # -- keeping

    def _keep(self) -> None:
        told, pause = not self._kept.saves, 0.0
        while not self._ended.wait(pause):
            begun, pause = time.monotonic(), _TURN
            try:
                if self.catalogue is None:
                    self.catalogue, pause = self._meet(), 0.0
                elif not told:
                    self.catalogue.tell(self._manifests)
                    told, pause = True, 0.0
                else:
                    self._sweep()
                    pause = max(_SWEEP, _REST * (time.monotonic() - begun))
            except TensorwayError as error:  # ranks that have not said what they hold, or a rendezvous that is away
                _log.debug("%s", error)
                pause = max(0.0, begun + _TURN - time.monotonic())  # what was waited for is part of the turn
            except OSError as error:
                if str(error) != self._trouble:  # once, and not as long as it lasts
                    _log.warning("A shared folder does not do what it should: %s", error)
                self._trouble = str(error)
            except Exception:  # without this thread nothing more would be found
                _log.exception("a shared folder could not be kept")

    def _meet(self) -> Catalogue:
        whose = self._whose
        told = self._ground.ranks(whose.engine, whose.incarnation, whose.ranks, time.monotonic() + _TURN)
        ranks = [record.geometry for record in told]
        return Catalogue(ranks, sections(ranks, whose.facts, self._seals), whose.facts, self._seals)

    def _sweep(self) -> None:
        self._blocks.tidy(_ABANDONED)
        self._manifests.tidy(_ABANDONED)
        if not self._kept.quota:
            return
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self._blocks.list():
            found[entry.key].append(entry)
        self.stored = sum(entry.nbytes for entries in found.values() for entry in entries)
        if self.stored <= self._kept.quota:
            return
        for key in sorted(found, key=lambda key: max(entry.used for entry in found[key])):
            if self.stored <= self._kept.quota * _LEAVE or self._ended.is_set():
                break
            self._remove(key, found[key])
            self.stored -= sum(entry.nbytes for entry in found[key])

    def _remove(self, key: str, entries: list[Entry]) -> None:
        for entry in entries:
            self._blocks.remove(key, entry.rank)
        layout, _, name = key.partition("/")
        if len(name) == 40:
            self.removed.append((layout, bytes.fromhex(name)))
