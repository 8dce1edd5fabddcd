"""How the members of a group find each other and connect: a store of torch's, whose address the rendezvous carries.

Imported by `session`; imports torch. The store lives in rank 0 and serves this group in this epoch only. Its record is
in the rendezvous while the group forms, and no longer: a later group never finds it.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final, NoReturn

import msgspec
import torch.distributed

from tensorway.eplb import Group
from tensorway.errors import DeadlineExceeded, TensorwayError
from tensorway.rendezvous import Rendezvous
from tensorway.rendezvous.hosts import HostChoice, meeting
from tensorway_gloo.mesh import Mesh, said
from tensorway_gloo.options import GlooOptions

#: torch says what is in it in some builds only.
dist: Final[Any] = torch.distributed
#: The record ends by itself so many seconds after rank 0 was killed.
_TTL: Final = 10.0
_PAUSE: Final = 0.02
_CONNECT: Final = 2.0


class _Address(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the store listens; the token tells it from another that has come to listen there."""

    host: str
    port: int
    token: str


_DECODE_ADDRESS: Final = msgspec.msgpack.Decoder(_Address).decode


def form(group: Group, rendezvous: Rendezvous, options: GlooOptions, deadline: float) -> Mesh | None:
    """Connect to all other members; None if there are none. Raises `DeadlineExceeded` with the names of the missing."""
    if not group.others:
        return None
    return _Formation(group, rendezvous, options, min(deadline, options.timeout_s)).mesh()


class _Formation:
    def __init__(self, group: Group, rendezvous: Rendezvous, options: GlooOptions, seconds: float) -> None:
        self.group = group
        self.rendezvous = rendezvous
        self.seconds = seconds
        self.until = time.monotonic() + seconds
        self.key = f"{group.path}/gloo/{group.epoch}"
        self.choice = meeting(rendezvous.address, options.policy)

    def mesh(self) -> Mesh:
        try:
            with self._store() as store:
                self._gather(store)
                return Mesh(self._process_group(store), len(self.group.members), self.group.me)
        except RuntimeError as error:
            if isinstance(error, TensorwayError):
                raise
            self._fail(f"gloo says: {said(error)}", error)

    @contextlib.contextmanager
    def _store(self) -> Iterator[Any]:
        if self.group.me:
            yield self._joined()
            return
        token = secrets.token_hex(16)
        store = _hosted(self.choice, self._left())
        store.set(token, b"")
        record = msgspec.msgpack.encode(_Address(self.choice.advertise, store.port, token))
        can_lease = "lease" in self.rendezvous.abilities
        lease = self.rendezvous.lease(_TTL, self._left()) if can_lease else None
        try:
            self.rendezvous.put(self.key, record, lease=lease, deadline=self._left())
            yield store
        finally:
            try:
                if lease is None:
                    self.rendezvous.delete(self.key)
                else:
                    self.rendezvous.end(lease)
            except TensorwayError:
                pass  # the group is formed, or has failed for a reason that is told; the token unmasks what stays

    def _joined(self) -> Any:
        """The store of rank 0. A record may be left over from one that was killed, so it is read again and again."""
        while (left := self._left()) > 0:
            try:
                record = self.rendezvous.wait(self.key, left)
            except DeadlineExceeded as error:
                self._fail(f"Rank 0, {self.group.members[0]}, has not come.", error)
            address = _DECODE_ADDRESS(record.value)
            try:
                # First without torch, which writes a page to stderr when nobody listens.
                socket.create_connection((address.host, address.port), min(left, _CONNECT)).close()
                store = dist.TCPStore(
                    address.host, address.port, None, False, timedelta(seconds=min(left, _CONNECT)), False
                )
                if store.check([address.token]):
                    store.set_timeout(timedelta(seconds=left))
                    return store
            except (OSError, RuntimeError):
                pass  # nobody, or a stranger: the next record will be the right one
            time.sleep(_PAUSE)
        self._fail(f"The store of rank 0, {self.group.members[0]}, cannot be reached.", None)

    def _gather(self, store: Any) -> None:
        """Wait until everybody is here; gloo would wait as long, and not say for whom."""
        store.set(f"here/{self.group.me}", b"")
        missing = list(range(len(self.group.members)))
        while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
            if self._left() <= 0:
                self._fail(f"Not here: {', '.join(self.group.members[rank] for rank in missing)}.", None)
            time.sleep(_PAUSE)

    def _process_group(self, store: Any) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=max(0.1, self._left()))
        options._threads = 1  # they run collectives, of which there are none
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.choice.bind)]
        prefixed = dist.PrefixStore("gloo", store)
        return dist.ProcessGroupGloo(prefixed, self.group.me, len(self.group.members), options)

    def _left(self) -> float:
        return self.until - time.monotonic()

    def _fail(self, true: str, cause: BaseException | None) -> NoReturn:
        raise DeadlineExceeded(
            f"{self.group.name} was to connect to the other {len(self.group.others)} members of {self.group.path}, "
            f"epoch {self.group.epoch}, over gloo.",
            f"It could not within {self.seconds:g} s. {true}",
            "See whether all members run, were given the same members and epoch, and reach "
            f"{self.choice.advertise} ({self.choice.source}); option `interface` or `host` chooses another.",
        ) from cause


def _hosted(choice: HostChoice, seconds: float) -> Any:
    """A store that listens on the chosen address only; torch by itself would listen on all."""
    family = socket.AF_INET6 if ":" in choice.bind else socket.AF_INET
    listener = socket.create_server((choice.bind, 0), family=family)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=max(0.1, seconds))
    return dist.TCPStore(choice.bind, port, None, True, timeout, False, master_listen_fd=listener.detach())
