"""The layouts in a folder whose files an engine can load, its own first, and which of them has a block.

May import the core and this package's store. It asks the file system, so only threads use it that may wait.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

from tensorway._logging import logger
from tensorway.errors import DescriptionInvalid, Incompatible, LayoutInvalid
from tensorway.kv import RankGeometry
from tensorway_kv.store.folder import Folder
from tensorway_kv.store.seals import Seals
from tensorway_kv.store.sections import Section, read_manifest, register, topology, write_manifest

_log = logger("kv")
#: Layouts that one group is loaded from; more are of configurations that nobody has at once.
_MOST: Final = 64
#: Seconds until one that could not be read is read again.
_AGAIN: Final = 10.0
#: Seconds for which the list of layouts is good.
_FRESH: Final = 0.25


class Catalogue:
    """What an engine can load. One thread uses it, and others read `groups`."""

    def __init__(
        self, ranks: Sequence[RankGeometry], own: Sequence[Section], facts: Mapping[str, str], seals: Seals
    ) -> None:
        self.own, self._seals = tuple(own), seals
        self._facts = tuple(sorted(facts.items()))
        self._topologies = {one.group: topology(ranks, one.group, _first(one)) for one in own}
        #: For each group of the engine the layouts that it is loaded from, with how many files a block has.
        self.groups: dict[int, tuple[tuple[str, int], ...]] = {
            one.group: ((one.layout, len(one.manifest.info.ranks)),) for one in own
        }
        self._known = {one.layout for one in own}
        self._looked = 0.0
        #: When layouts that could not be read are tried again: who wrote one may write it anew.
        self._again: dict[str, float] = {}

    def tell(self, folder: Folder) -> None:
        """Write down what our own files hold, unless it is there."""
        for one in self.own:
            write_manifest(folder, self._seals, one)

    def refresh(self, folder: Folder) -> None:
        """See which layouts there are."""
        now = time.monotonic()
        if now - self._looked < _FRESH:
            return
        for entry in folder.list():
            new = entry.key not in self._known and now >= self._again.get(entry.key, 0.0)
            if new and len(entry.key) == 40 and len(self._known) + len(self._again) < _MOST * 2:
                self._learn(folder, entry.key, now)
        self._looked = now

    def have(self, blocks: Folder, group: int, name: bytes) -> str:
        """The layout in which a block is stored whole; empty if it is not."""
        for layout, files in self.groups[group]:
            if all(blocks.has(f"{layout}/{name.hex()}", rank) for rank in range(files)):
                return layout
        return ""

    def _learn(self, folder: Folder, layout: str, now: float) -> None:
        try:
            manifest = read_manifest(folder, self._seals, layout)
        except (DescriptionInvalid, LayoutInvalid) as error:
            _log.warning("%s", error)
            self._again[layout] = now + _AGAIN
            return
        self._known.add(layout)
        self._again.pop(layout, None)
        if manifest is None or manifest.facts != self._facts:
            return
        for group, into in self._topologies.items():
            try:
                register(into, layout, manifest)
            except (Incompatible, LayoutInvalid) as error:
                _log.debug("Group %d is not loaded from layout %s: %s", group, layout[:12], error)
                continue
            if len(self.groups[group]) < _MOST:
                self.groups[group] = (*self.groups[group], (layout, len(manifest.info.ranks)))


def _first(section: Section) -> int:
    """A rank that has pages of it."""
    return next(rank for rank, place in enumerate(section.places) if place is not None)
