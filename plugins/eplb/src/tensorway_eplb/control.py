"""Short messages between members through the rendezvous, for communicators that have no channel of their own.

May import the core. Each member has one record for each other member and keeps the last message in it: reports say all
that there is to say, so that one that was overwritten is not missed.
"""

from __future__ import annotations

import struct
from typing import Final

from tensorway._logging import logger
from tensorway.eplb import Group
from tensorway.errors import TensorwayError, Unsupported
from tensorway.rendezvous import Rendezvous
from tensorway.rendezvous.rendezvous import Watch
from tensorway_eplb.records import OwnRecords

_log = logger("eplb")
#: So that two equal messages are two changes, and one of an earlier epoch is told from ours.
_HEAD: Final = struct.Struct("<qq")


class StoreControl:
    """See `tensorway.eplb.contract.Control`."""

    def __init__(self, rendezvous: Rendezvous, group: Group) -> None:
        if "watch" not in rendezvous.abilities:
            raise Unsupported(
                f"Members were to talk through the rendezvous {rendezvous.name}.",
                "It has no watches.",
                "Use direct, etcd or redis; or a communicator that has a channel of its own, as onesided.",
            )
        self._group, self._sent = group, 0
        self._records = OwnRecords(rendezvous)
        self._watch: Watch = rendezvous.watch(f"{group.path}/mail/{group.name}/")

    def send(self, peer: int, payload: bytes, deadline: float) -> None:
        """Put it where the member looks."""
        self._sent += 1
        key = f"{self._group.path}/mail/{self._group.members[peer]}/{self._group.name}"
        value = _HEAD.pack(self._group.epoch, self._sent) + payload
        # What a rendezvous may take is not what a fabric takes.
        self._records.put(key, value, max(deadline, 1.0))

    def receive(self) -> list[tuple[int, bytes]]:
        """What was put since."""
        ranks = {name: rank for rank, name in enumerate(self._group.members)}
        heard = []
        for event in self._watch.next(0.0):
            if event.kind == "put" and event.record is not None and len(event.record.value) >= _HEAD.size:
                sender = event.key.rpartition("/")[2]
                epoch, _ = _HEAD.unpack_from(event.record.value)
                if sender in ranks and epoch == self._group.epoch:
                    heard.append((ranks[sender], event.record.value[_HEAD.size :]))
        return heard

    def regroup(self, group: Group) -> None:
        """Other members from now on."""
        self._group = group

    def close(self) -> None:
        """No more; what was sent is taken back."""
        try:
            self._watch.close()
            self._records.close()
        except TensorwayError as error:  # the rendezvous may be gone before us, and our lease ends by itself
            _log.debug("What was sent was not taken back: %s", error)
