"""One object on its way here: read in a thread of its own, so that whoever waits for it can stop waiting.

May import tensorway's ground, `transport` and its own package; no Ray. A fetch that is given up keeps the memory that
it reads into, registered and its own, until the transport says that nothing will be written there any more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import attrs

from tensorway.errors import DeadlineExceeded, DescriptionInvalid, TensorwayError, TransferCancelled, TransferFailed
from tensorway.memory import Region
from tensorway.transport import BlockTable, Transfer, Transport
from tensorway.transport.contract import Registration
from tensorway_ray.sources import Sources

#: How often a fetch that was given up looks whether its memory is its own again.
_LOOK: Final = 0.02
#: How long a registration may take to end once nothing uses it.
_ENDS: Final = 30.0


@attrs.frozen
class Wanted:
    """An object as its actor describes it."""

    name: str
    description: bytes = attrs.field(repr=False)
    #: Of the description; grows with each that the actor makes.
    number: int
    #: Address, length and device of each of its tensors there.
    places: tuple[tuple[int, int, str], ...] = attrs.field(repr=False)


class Fetch:
    """`wait` for it, then `end`; `end` before it is done gives it up. Threads may share it."""

    def __init__(
        self,
        wanted: Wanted,
        into: list[Region],
        endpoint: Callable[[], Transport],
        sources: Sources,
        seconds: float,
    ) -> None:
        self.name = wanted.name
        self._wanted = wanted
        self._into = into
        self._seconds = seconds
        self._transfers: list[Transfer] = []
        self._error: TensorwayError | None = None
        self._begun, self._over, self._released = threading.Event(), threading.Event(), threading.Event()
        arguments = (endpoint, sources)
        threading.Thread(target=self._run, args=arguments, name="tensorway-ray-fetch", daemon=True).start()

    @property
    def released(self) -> bool:
        """Whether nothing will be written to its memory any more, and nothing of it is registered."""
        return self._released.is_set()

    def wait(self, seconds: float) -> None:
        """Return when all of it is here. Raises what it failed with, or `TimeoutError` when it is still on its way."""
        until = time.monotonic() + seconds
        if not self._begun.wait(max(0.0, seconds)):
            raise TimeoutError(f"{self.name} is still on its way after {seconds:g} s")
        if self._error is not None:
            raise self._error
        for transfer in self._transfers:
            try:
                transfer.wait(max(0.0, until - time.monotonic()))
            except DeadlineExceeded:
                if not transfer.pending:
                    raise
                raise TimeoutError(f"{self.name} is still on its way after {seconds:g} s") from None

    def end(self) -> None:
        """Nobody waits any more; what is still under way is cancelled."""
        self._over.set()
        for transfer in list(self._transfers):
            transfer.cancel()

    # -- its thread

    def _run(self, endpoint: Callable[[], Transport], sources: Sources) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self._begin(endpoint(), sources, stack)
            except TensorwayError as error:
                self._error = error
            except Exception as error:  # or whoever waits would never hear of it
                true = f"{type(error).__name__}: {error}"
                self._error = TransferFailed(self._asked(), true, "Report this to the transport's author.")
                self._error.__cause__ = error
            self._begun.set()
            if self._error is None:
                self._over.wait()
            for transfer in self._transfers:
                transfer.cancel()
            for transfer in self._transfers:
                if transfer.error is not None:
                    sources.doubt(transfer.route.peer)
            while not all(transfer.released for transfer in self._transfers):
                time.sleep(_LOOK)
        self._released.set()

    def _begin(self, endpoint: Transport, sources: Sources, stack: contextlib.ExitStack) -> None:
        until, places = time.monotonic() + self._seconds, self._wanted.places
        if [nbytes for _, nbytes, _ in places] != [region.nbytes for region in self._into]:
            true = "Its tensors are not as long as it says that they are."
            raise DescriptionInvalid(self._asked(), true, "Install one version of tensorway-ray in the whole cluster.")
        peer = stack.enter_context(
            sources.using(endpoint, self._wanted.description, self._wanted.number, self._seconds)
        )
        registration = endpoint.register(*self._into)
        stack.callback(_closed, registration)
        alike: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
        for (address, nbytes, device), region in zip(places, self._into, strict=True):
            alike.setdefault((nbytes, device, region.device), []).append((region.address, address))
        for (nbytes, there, here), pairs in alike.items():
            ours, theirs = zip(*pairs, strict=True)
            # Tensors of one length are one route, and each of its ids is one of them.
            local = BlockTable(tuple(ours), nbytes, nbytes, 1, here, stacked=True)
            remote = BlockTable(tuple(theirs), nbytes, nbytes, 1, there, stacked=True)
            if self._over.is_set():
                raise TransferCancelled(self._asked(), "Nobody waits for it any more.", "Nothing is owed.")
            ids, left = range(len(pairs)), max(0.0, until - time.monotonic())
            route = endpoint.prepare(peer, local, remote)
            self._transfers.append(endpoint.read(route, ids, ids, deadline=left))

    def _asked(self) -> str:
        return f"The tensors of {self.name[:24]} were to be fetched."


def _closed(registration: Registration) -> None:
    registration.close(_ENDS)
