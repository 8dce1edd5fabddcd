"""vLLM's worker over ours: pages of its jobs in our words, and what failed as blocks that it computes again.

May import vllm, the core and this package. One thread calls it, beside one rank's memory.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import attrs
import vllm.v1.kv_offload.base as theirs

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded
from tensorway.offload import METRICS, EngineSpec, OffloadingWorker, TransferResult
from tensorway_vllm import metrics
from tensorway_vllm.counting import Counting
from tensorway_vllm.offloading.faults import Faults
from tensorway_vllm.offloading.pages import pages_of
from tensorway_vllm.offloading.words import Carried, Outcome

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

    def __init__(
        self,
        worker: OffloadingWorker,
        pages_per_block: int,
        flush_seconds: float,
        memory: object,
        backend: str = "cpu",
    ) -> None:
        """`memory`: what the pages belong to, kept so that it stays."""
        self.worker, self._memory = worker, memory
        self._pages_per_block, self._flush_seconds = pages_per_block, flush_seconds
        self._jobs: dict[int, _Job] = {}
        self._faults = Faults(backend)
        self._counting = Counting(partial(self._faults.beside, worker.statistics), METRICS)
        #: Jobs that never began: loads that had nowhere to come from, and what the backend refused.
        self._ended: list[TransferResult] = []
        #: The backend could not say what has ended, and was closed.
        self._closed = False
        #: Somebody takes `outcome` and `bad_pages`. Without, vLLM must be told of failures, which end the engine.
        self.heard = False
        self._warned = False
        self._seen: set[tuple[str, str]] = set()
        self._outcomes: list[Outcome] = []
        self._bad: set[int] = set()
        self._bad_jobs: set[int] = set()

    def submit_store(self, job_id: int, src_spec: theirs.GPULoadStoreSpec, dst_spec: theirs.LoadStoreSpec) -> bool:
        """Begin to copy pages away."""
        source, target = pages_of(src_spec, self._pages_per_block), _carried(dst_spec)
        self._begin(job_id, _Job(target.number, False, source), target)
        return True

    def submit_load(self, job_id: int, src_spec: theirs.LoadStoreSpec, dst_spec: theirs.GPULoadStoreSpec) -> bool:
        """Begin to copy blocks into pages."""
        source, target = _carried(src_spec), pages_of(dst_spec, self._pages_per_block)
        self._begin(job_id, _Job(source.number, True, target), source)
        return True

    def _begin(self, number: int, job: _Job, there: Carried) -> None:
        """A job that cannot begin has failed, as one that ends so."""
        if not self.heard and not self._warned:
            self._warned = True
            _log.warning(
                "A block that cannot be copied will end the engine, for vLLM's OffloadingConnector has no way to say "
                "so. Name TensorwayOffloadingConnector as kv_connector, and it is computed."
            )
        self._jobs[number] = job
        if there.spec is None:
            self._ended.append(TransferResult(number, "lost", "Its blocks had gone."))
        elif self._closed:
            self._ended.append(TransferResult(number, "lost", "The backend was closed."))
        else:
            try:
                if job.load:
                    self.worker.load(number, there.spec, job.engine)
                else:
                    self.worker.store(number, job.engine, there.spec)
            except Exception as error:  # a backend is a plugin of anybody
                self._faults.raised("load" if job.load else "store", error)
                self._ended.append(TransferResult(number, "refused", f"{type(error).__name__}: {error}"))

    def get_finished(self) -> list[theirs.TransferResult]:
        """Jobs that have ended. A failure is a success to vLLM where somebody hears of it otherwise."""
        polled: list[TransferResult] = []
        try:
            polled = [] if self._closed else self.worker.poll()
        except Exception as error:  # a backend is a plugin of anybody
            self._give_up("poll", error)
        ended, self._ended = self._ended, []
        return [self._told(result, self._jobs.pop(result.job)) for result in [*ended, *polled] if self._is_new(result)]

    def _is_new(self, result: TransferResult) -> bool:
        if result.job in self._jobs:
            return True
        self._faults.count("poll", "refused")  # a backend has told of it twice
        return False

    def _give_up(self, what: str, error: Exception) -> None:
        """The backend does not know any more what it does. When it is closed no page is touched, and all has failed.

        If it cannot be closed, that is raised: pages of requests might be written to at any time.
        """
        self._faults.raised(what, error)
        self._closed = True
        self.worker.close(self._flush_seconds)
        known = {result.job for result in self._ended}
        why = "The backend was closed after an error."
        self._ended += [TransferResult(job, "lost", why) for job in self._jobs if job not in known]

    def _told(self, result: TransferResult, job: _Job) -> theirs.TransferResult:
        places: frozenset[int] = frozenset()
        if result.cause or job.spoiled:
            everything = range(len(job.engine))
            named = [place for place in result.failed if place in everything]
            places = frozenset(everything if job.spoiled or not named else named)
            self._warn(job, result, len(places))
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

    def _warn(self, job: _Job, result: TransferResult, count: int) -> None:
        """Once for each kind of failure; backends count them all."""
        what = "loaded" if job.load else "stored"
        if (what, result.cause) not in self._seen:
            self._seen.add((what, result.cause))
            total = len(job.engine)
            _log.warning("%d of %d blocks were not %s: %s. %s", count, total, what, result.cause or "late", result.why)

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
        """vLLM wants pages back. A store that is late is spoiled; a load that is late would write to others' pages.

        So the backend is closed for it, after which no page is touched, and the engine goes on without offloading.
        """
        over = {result.job for result in self._ended}
        known = [job for job in job_ids if job in self._jobs and job not in over]
        try:
            if known:
                self.worker.wait(known, self._flush_seconds)
        except DeadlineExceeded as error:
            if any(self._jobs[job].load for job in known):
                self._give_up("wait", error)
                return
            _log.warning("%d stores are late, and their blocks are given up.", len(known))
            for job in known:
                self._jobs[job].spoiled = True
        except Exception as error:  # a backend is a plugin of anybody
            self._give_up("wait", error)

    def shutdown(self) -> None:
        """End; no page is touched afterwards."""
        self._faults.asked(None, self.worker.close)


def _carried(spec: theirs.LoadStoreSpec) -> Carried:
    assert isinstance(spec, Carried), f"a spec of another backend: {spec!r}"
    return spec
