"""The thin adapter between Ray Direct Transport and a transport. Imports Ray; `direct_transport` imports it when asked.

May import tensorway's ground, `transport` and its own package. Ray makes one of these in each process: it describes the
tensors that an actor returns, fetches them elsewhere, and says when they are no more. The interface is alpha in Ray;
`direct_transport` refuses every other than the one that this was written for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import ray
from ray.exceptions import RayDirectTransportError
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    FetchRequest,
    TensorTransportManager,
    TensorTransportMetadata,
)

import tensorway
from tensorway.errors import BackendUnavailable, DeadlineExceeded, TensorwayError, Unsupported
from tensorway.memory import Region
from tensorway.transport import Transport
from tensorway_ray.fetches import Fetch, Wanted
from tensorway_ray.held import Held
from tensorway_ray.landing import Landing
from tensorway_ray.sources import Sources

#: Tensors of an object begin at multiples of this, as torch's own do.
_ALIGNED = 64
#: Objects that are smaller are left to torch, which has memory for them at hand; they would each take a huge page.
_SMALL = 1 << 20
#: How long an actor may take to make its endpoint, beside what its transport is given for a transfer.
_STARTS = 60.0


@dataclasses.dataclass(eq=False)
class Described(TensorTransportMetadata):
    """What Ray carries from the actor that has the tensors to those that fetch them."""

    description: bytes = b""
    number: int = 0
    places: tuple[tuple[int, int, str], ...] = ()


@dataclasses.dataclass(eq=False)
class Request(FetchRequest):
    """A fetch, given up when Ray lets go of this without having waited for it."""

    fetch: Fetch | None = None
    #: Where Ray's caller wants them instead, if it does.
    targets: list[Any] | None = None

    def __del__(self) -> None:
        if self.fetch is not None:
            self.fetch.end()


class Tensors(TensorTransportManager):
    """One transport in one process; what it is, is written into a class of its own by `direct_transport.register`."""

    label: ClassVar[str]
    transport: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]
    seconds: ClassVar[float]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: Transport | None = None
        self._held, self._sources, self._landing = Held(), Sources(), Landing()
        self._fetches: weakref.WeakSet[Fetch] = weakref.WeakSet()
        self._able: set[str] = set()

    def endpoint(self) -> Transport:
        """This process's end, made when it is first needed: whoever only passes references on needs none."""
        with self._lock:
            if self._made is None:
                self._made = tensorway.create("transport", self.transport, dict(self.options))
            return self._made

    # -- what it is

    def tensor_transport_backend(self) -> str:
        """Ray's name for it."""
        return self.label

    @staticmethod
    def is_one_sided() -> bool:
        """Who fetches reads; who has them does nothing."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """A fetch can be given up, and no actor has to be killed for it."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Let the actor make its end. Raises `BackendUnavailable` with its reason, which Ray would not ask for."""
        actor_id = actor._actor_id.hex()
        if actor_id not in self._able:
            asked = actor.__ray_call__.options(concurrency_group="_ray_system").remote(_obstacle, self.label)
            try:
                refused = ray.get(asked, timeout=_STARTS + self.seconds)
            except ray.exceptions.GetTimeoutError as error:
                raise DeadlineExceeded(
                    f"The actor {actor_id[:12]} was to use the tensor transport {self.label}.",
                    f"It did not start it within {_STARTS + self.seconds:g} s.",
                    "See what its node is busy with; on the node: tensorway doctor",
                ) from error
            if refused is not None:
                raise BackendUnavailable(*refused)
            self._able.add(actor_id)
        return True

    # -- where the tensors are

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> Described:
        """Register the tensors, and say where they are."""
        if not rdt_object:
            return Described(tensor_meta=[], tensor_device=None)
        device = _one_device(rdt_object)
        if device == "cuda":
            import torch

            for index in {tensor.device for tensor in rdt_object}:
                torch.cuda.synchronize(index)  # what fetches them knows no stream of this process
        regions = [Region.of(tensor) for tensor in rdt_object if tensor.numel()]
        # Each as it is fetched, and no storage as a whole: who has read from here before knows memory that has gone
        # since, and NIXL does not find a part of a region in which an earlier one began.
        described, number = self._held.hold(obj_id, self.endpoint(), regions)
        places = tuple((region.address, region.nbytes, region.device) for region in regions)
        meta = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        return Described(tensor_meta=meta, tensor_device=device, description=described, number=number, places=places)

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None:
        """Nobody has a reference any more."""
        self._held.free(obj_id)

    def send_multiple_tensors(
        self, tensors: list[Any], tensor_transport_metadata: Any, communicator_metadata: Any
    ) -> None:
        """Nobody calls it for one that is one-sided."""
        raise Unsupported(f"{self.label} was to send tensors.", "Who wants them reads them.", "Pass the reference.")

    # -- where they are wanted

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        """There is no communicator."""
        return CommunicatorMetadata()

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: Any,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> Request:
        """Begin to fetch; returns at once."""
        tensors = _room(tensor_transport_metadata, target_buffers, self._landing)
        into = [Region.of(tensor) for tensor in tensors if tensor.numel()]
        if not into:
            return Request(obj_id, tensors)
        described = tensor_transport_metadata
        wanted = Wanted(obj_id, described.description, described.number, tuple(described.places))
        fetch = Fetch(wanted, into, self.endpoint, self._sources, self.seconds)
        self._fetches.add(fetch)
        return Request(obj_id, tensors, fetch, target_buffers)

    def wait_fetch_complete(self, fetch_request: Any, timeout: float = -1) -> list[Any]:
        """The tensors; raises `TimeoutError` when Ray's time is over, and Ray's own error when the transfer failed."""
        fetch, tensors, targets = fetch_request.fetch, fetch_request.tensors, fetch_request.targets
        if fetch is not None:
            try:
                # Its own deadline ends it; this is the time after which that is known here.
                fetch.wait(timeout if timeout >= 0 else 2 * self.seconds + _STARTS)
            except TensorwayError as error:
                raise RayDirectTransportError(str(error)) from error
            finally:
                fetch.end()
        if targets is None:
            return list(tensors)
        # Only what has arrived is copied: a transfer that is given up may still write, and not into what is a caller's.
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
        return list(targets)

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: Any,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Fetch and wait."""
        request = self.fetch_multiple_tensors(obj_id, tensor_transport_metadata, communicator_metadata, target_buffers)
        tensors: list[Any] = self.wait_fetch_complete(request)
        return tensors

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """Give up what is under way for an object."""
        for fetch in list(self._fetches):
            if fetch.name == obj_id:
                fetch.end()


def _obstacle(_actor: Any, label: str) -> tuple[str, str, str] | None:
    """In the actor: why it cannot have an end; None if it has. One that is not told of yet is told later."""
    from ray.experimental.rdt.util import get_tensor_transport_manager

    with contextlib.suppress(ValueError):
        try:
            get_tensor_transport_manager(label).endpoint()
        except TensorwayError as error:
            return (error.asked, error.true, error.to_do)
    return None


def _one_device(tensors: Sequence[Any]) -> str:
    kinds = sorted({str(tensor.device.type) for tensor in tensors})
    if len(kinds) > 1:
        raise Unsupported(
            f"{len(tensors)} tensors were to be passed as one object.",
            f"They are on devices of several kinds: {', '.join(kinds)}.",
            "Pass those of each kind in an object of their own.",
        )
    return kinds[0]


def _room(described: Any, targets: list[Any] | None, landing: Landing) -> list[Any]:
    """Memory of our own to fetch into: on the device of the targets, where there are any."""
    import torch

    shapes = described.tensor_meta
    devices = [each.device for each in targets] if targets is not None else [described.tensor_device] * len(shapes)
    lengths = [shape.numel() * dtype.itemsize for shape, dtype in shapes]
    places = [0, *accumulate(-(-length // _ALIGNED) * _ALIGNED for length in lengths)]
    if places[-1] < _SMALL or {str(device) for device in devices} != {"cpu"}:
        return [torch.empty(shape, dtype=dtype, device=to) for (shape, dtype), to in zip(shapes, devices, strict=True)]
    lent = landing.take(places[-1])
    return [
        torch.frombuffer(lent, dtype=torch.uint8, count=length, offset=at).view(dtype).reshape(shape)
        if length
        else torch.empty(shape, dtype=dtype)
        for (shape, dtype), length, at in zip(shapes, lengths, places[:-1], strict=True)
    ]
