"""vLLM's worker over ours: pages of its jobs in our words, and what failed as blocks that it computes again.

May import vllm, the core and this package. One thread calls it, beside one rank's memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import attrs
import vllm.v1.kv_offload.base as theirs

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded
from tensorway.offload import METRICS, EngineSpec, OffloadingWorker, TransferResult
from tensorway_vllm import metrics
from tensorway_vllm.counting import Counting
from tensorway_vllm.pages import pages_of
from tensorway_vllm.words import Carried, Outcome

_log = logger("vllm")


@attrs.define
class _Job:
    """One that was submitted, and that vLLM has not been told the end of."""

    ticket: int
    load: bool
    engine: EngineSpec
    #: Its pages were given to others before it had ended: whatever it has stored is wrong.
    spoiled: bool = False


class WorkerAdapter(theirs.OffloadingWorker):
    """See `vllm.v1.kv_offload.base.OffloadingWorker`."""

    def __init__(self, worker: OffloadingWorker, pages_per_block: int, flush_seconds: float, memory: object) -> None:
        """`memory`: what the pages belong to, kept so that it stays."""
        self.worker, self._memory = worker, memory
        self._pages_per_block, self._flush_seconds = pages_per_block, flush_seconds
        self._jobs: dict[int, _Job] = {}
        self._counting = Counting(worker.statistics, METRICS)
        #: Loads that had nowhere to come from.
        self._lost: list[int] = []
        #: Somebody takes `outcome` and `bad_pages`. Without, vLLM must be told of failures, which end the engine.
        self.heard = False
        self._outcomes: list[Outcome] = []
        self._bad: set[int] = set()
        self._bad_jobs: set[int] = set()

    def submit_store(self, job_id: int, src_spec: theirs.GPULoadStoreSpec, dst_spec: theirs.LoadStoreSpec) -> bool:
        """Begin to copy pages away."""
        source, target = pages_of(src_spec, self._pages_per_block), _carried(dst_spec)
        assert target.spec is not None
        self._jobs[job_id] = _Job(target.number, False, source)
        self.worker.store(job_id, source, target.spec)
        return True

    def submit_load(self, job_id: int, src_spec: theirs.LoadStoreSpec, dst_spec: theirs.GPULoadStoreSpec) -> bool:
        """Begin to copy blocks into pages."""
        source, target = _carried(src_spec), pages_of(dst_spec, self._pages_per_block)
        self._jobs[job_id] = _Job(source.number, True, target)
        if source.spec is None:
            self._lost.append(job_id)
        else:
            self.worker.load(job_id, source.spec, target)
        return True

    def get_finished(self) -> list[theirs.TransferResult]:
        """Jobs that have ended. A failure is a success to vLLM where somebody hears of it otherwise."""
        gone = [TransferResult(job, "lost", "Its blocks had gone.") for job in self._lost]
        self._lost.clear()
        return [self._told(result) for result in [*gone, *self.worker.poll()]]

    def _told(self, result: TransferResult) -> theirs.TransferResult:
        job = self._jobs.pop(result.job)
        places: frozenset[int] = frozenset()
        if result.cause or job.spoiled:
            places = frozenset(range(len(job.engine)) if job.spoiled or not result.failed else result.failed)
            what = "loaded" if job.load else "stored"
            _log.warning(
                "%d of %d blocks were not %s: %s %s", len(places), len(job.engine), what, result.cause, result.why
            )
        if job.load and places:
            self._bad_jobs.add(result.job)
            self._bad.update(page for place in places for page in job.engine.pages[place] if page >= 0)
        if self.heard:
            self._outcomes.append(Outcome({job.ticket: 1}, {job.ticket: places} if places else {}))
        return theirs.TransferResult(
            job_id=result.job,
            success=self.heard or not places,
            transfer_size=result.nbytes,
            transfer_time=result.seconds,
        )

    def stats(self) -> Any:
        """What was counted since the last call, for vLLM's own metrics; None if nothing was."""
        return metrics.offloading_stats(self._counting.changes())

    def outcome(self) -> Outcome:
        """What has become of jobs since the last call."""
        told, self._outcomes = Outcome.of(self._outcomes), []
        return told

    def bad_pages(self) -> set[int]:
        """Pages that were to be loaded and were not, since the last call."""
        bad, self._bad = self._bad, set()
        return bad

    def bad_jobs(self) -> set[int]:
        """Loads of which something failed, since the last call."""
        bad, self._bad_jobs = self._bad_jobs, set()
        return bad

    def wait(self, job_ids: Collection[int]) -> None:
        """vLLM wants pages back. A store that is late is spoiled; a load that is late would write to others' pages."""
        known = [job for job in job_ids if job in self._jobs and job not in self._lost]
        try:
            self.worker.wait(known, self._flush_seconds)
        except DeadlineExceeded:
            if any(self._jobs[job].load for job in known):
                raise
            _log.warning("%d stores are late, and their blocks are given up.", len(known))
            for job in known:
                self._jobs[job].spoiled = True

    def shutdown(self) -> None:
        """End; no page is touched afterwards."""
        self.worker.close()


def _carried(spec: theirs.LoadStoreSpec) -> Carried:
    assert isinstance(spec, Carried), f"a spec of another backend: {spec!r}"
    return spec
