"""What goes between the scheduler's side and the workers in each step. May import vllm; all of it is data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from tensorway.kv import Result


@attrs.frozen
class Step(KVConnectorMetadata):
    """Of one step, from the scheduler to all workers."""

    #: Which planner decides, counted from 1; a mover is of one planner's life. 0 if there is none.
    life: int
    #: For `Mover.submit`, in their order.
    plans: Sequence[bytes] = ()
    #: Whether movers may have something to say.
    listen: bool = False
    #: Requests that all workers are to report: whose kept pages are free, and whose pages have come or will not.
    sent: Collection[str] = ()
    received: Collection[str] = ()
    failed: Collection[str] = ()
    #: Pages of requests that were received in part, from the first bad one on.
    bad: Collection[int] = ()


@attrs.frozen
class Said:
    """What one worker says."""

    #: Of which planner's life its mover is.
    life: int
    results: Sequence[Result] = ()
    #: The mover was made since the last time.
    ready: bool = False
    #: Why there is no mover, if it could not be made or broke.
    broken: str = ""


@attrs.frozen
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What movers say, by their ranks."""

    said: Mapping[int, Sequence[Said]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of several workers."""
        assert isinstance(other, WorkerMetadata)
        ranks = {*self.said, *other.said}
        return WorkerMetadata({rank: (*self.said.get(rank, ()), *other.said.get(rank, ())) for rank in ranks})
