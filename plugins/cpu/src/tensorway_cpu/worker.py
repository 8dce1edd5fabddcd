"""The worker: beside one rank's pages it copies blocks to rows of host memory, and back.

May import the core and this package. It decides nothing, and believes nothing: what a spec says is checked against the
pages and rows that there are, and what cannot be copied is a result with a cause.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection
from functools import partial
from typing import Final

import numpy as np

from tensorway.errors import Closed, TensorwayError
from tensorway.exports import export
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, LoadStoreSpec, OffloadContext, TransferResult
from tensorway_cpu.canonical import canonical
from tensorway_cpu.devices import Means, means
from tensorway_cpu.jobs import Job, Jobs, Slice
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.pages import Blocks, RankPages, What
from tensorway_cpu.region import open_rows

_MEDIUM: Final = "cpu"
#: Bytes of rows that a thread copies before it looks for what is more urgent.
_SLICE: Final = 16 << 20


class CPUWorker:
    """See `tensorway.offload.OffloadingWorker`."""

    def __init__(self, options: CPUOptions, context: OffloadContext) -> None:
        canon = canonical(context.ranks, context.pages_per_block, options.order)
        self._means: Means = means(context.ranks[context.rank], context.copier)
        self._rows = open_rows(options, context, canon)
        self._pages = RankPages(canon, context.ranks, context.rank, self._rows.memory, self._rows.blocks)
        self._jobs = Jobs(options.threads)
        self._counts = Counters(METRICS, backend=_MEDIUM, engine=context.engine, rank=str(context.rank))
        self._each = max(1, _SLICE // canon.row_bytes)
        self._pid, self._closed = os.getpid(), False
        export("worker", self.statistics, METRICS)

    def store(self, job: int, source: LoadStoreSpec, target: LoadStoreSpec) -> None:
        """Begin to copy pages to rows."""
        self._begin(job, source, target, "store")

    def load(self, job: int, source: LoadStoreSpec, target: LoadStoreSpec) -> None:
        """Begin to copy rows to pages."""
        self._begin(job, source, target, "load")

    def _begin(self, number: int, source: LoadStoreSpec, target: LoadStoreSpec, what: What) -> None:
        self._check(f"Job {number} was to {what} blocks.")
        job = Job(number, what, deque(), 0)
        try:
            blocks, refused = self._pages.checked(source, target, what)
        except TensorwayError as error:
            job.fails([], "refused", error.true)
        except Exception as error:  # a spec may be anything that came from another process
            job.fails([], "refused", f"They cannot be read: {type(error).__name__}: {error}.")
        else:
            job.blocks = len(blocks.rows)
            if len(refused):
                true = f"{len(refused)} blocks have rows or pages that there are none of, or pages that are missing."
                job.fails(refused.tolist(), "refused", true)
            self._cut(job, blocks)
        self._jobs.submit(job)

    def _cut(self, job: Job, blocks: Blocks) -> None:
        after = self._means.mark() if len(blocks.rows) else None
        for begin in range(0, len(blocks.rows), self._each):
            some = blocks.select(np.s_[begin : begin + self._each])
            job.slices.append(Slice(partial(self._copied, some, job.what, after), some.positions.tolist()))

    def _copied(self, blocks: Blocks, what: What, after: object) -> int:
        return self._means.copy(self._pages.moves(blocks, what), after)

    def poll(self) -> list[TransferResult]:
        """Jobs that have ended."""
        self._check("Jobs were asked for.")
        return [self._told(job) for job in self._jobs.take()]

    def _told(self, job: Job) -> TransferResult:
        counts = self._counts
        counts.add("offload_bytes_total", job.nbytes, medium=_MEDIUM, what=job.what)
        counts.took("offload_seconds", job.seconds, medium=_MEDIUM, what=job.what)
        if job.cause:
            failed = len(job.failed) or 1
            counts.add("offload_failures_total", failed, medium=_MEDIUM, what=job.what, cause=job.cause)
        return TransferResult(job.number, job.cause, job.why, sorted(job.failed), job.nbytes, job.seconds)

    def wait(self, jobs: Collection[int], deadline: float) -> None:
        """Until these have ended."""
        self._check(f"{len(jobs)} jobs were waited for.")
        self._jobs.wait(jobs, deadline)

    def statistics(self) -> list[Sample]:
        """What was copied, and what is under way."""
        for what in ("load", "store"):
            self._counts.set("offload_queue_blocks", self._jobs.blocks(what), medium=_MEDIUM, what=what)
        return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End; raises `DeadlineExceeded` if a copy does not, and then rows stay mapped."""
        if self._closed or os.getpid() != self._pid:
            return  # threads of a forked child's parent are not here
        self._closed = True
        idle = False
        try:
            self._jobs.close(deadline)
            idle = True
        finally:
            self._rows.close(still_used=not idle)

    def _check(self, asked: str) -> None:
        if os.getpid() != self._pid:
            raise Closed(asked, "This process was forked from the worker's.", "Make a worker of its own.")
        if self._closed:
            raise Closed(asked, "The worker is closed.", "Make another one.")
