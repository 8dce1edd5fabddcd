"""What every worker of an offloading must do: each byte of each page, or a cause; and it ends when it is told to.

Room `testing`. Subclass `OffloadingWorkerSuite`, set `name` (and `options`), install your dist; or give `make`. KV
pages are in host memory, and every byte of them is known. Places come from the backend's own manager.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import attrs
import pytest

import tensorway
from tensorway.errors import TensorwayError
from tensorway.metrics import total
from tensorway.offload import (
    CAUSES,
    EngineSpec,
    LoadStoreSpec,
    OffloadContext,
    OffloadingManager,
    OffloadingWorker,
    OffloadKey,
    TransferResult,
)
from tensorway.testing.connector_memory import BLOCKS, Memory, Shape
from tensorway.testing.offload_ground import chain, refusal, request, unknown_values
from tensorway.testing.suite import Suite

LONG: Final = 60.0
CAPACITY: Final = 12


@attrs.frozen
class Foreign:
    """Where blocks are, in a medium that no worker knows."""

    medium: str = "nowhere"

    def __len__(self) -> int:
        return 2


class Engine:
    """An engine of one process: pages of each rank, a worker beside each, and one manager."""

    def __init__(self, make: Callable[[OffloadContext], Any], shape: Shape, pages_per_block: int = 1) -> None:
        self.memories = [Memory(shape, rank) for rank in range(shape.tp)]
        self.tokens, self._pages = shape.page_tokens * pages_per_block, pages_per_block
        ranks = tuple(memory.geometry for memory in self.memories)
        context = OffloadContext(f"suite-{uuid.uuid4().hex}", "manager", ranks, pages_per_block=pages_per_block)
        self.manager: OffloadingManager = make(context)
        self.workers: list[OffloadingWorker] = [
            make(attrs.evolve(context, role="worker", rank=rank)) for rank in range(shape.tp)
        ]
        self._job = 0

    # -- what it does

    def compute(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Fill pages: by what stands for the content, the pages of each block."""
        each = self.tokens // self._pages
        for memory in self.memories:
            for salt, pages in blocks.items():
                for at in (at for at, page in enumerate(pages) if page >= 0):
                    memory.fill(pages, at * each, (at + 1) * each, salt)

    def store(self, blocks: Mapping[int, Sequence[int]]) -> list[TransferResult]:
        """Compute these and store what is not there; what each rank says."""
        self.compute(blocks)
        req = request(f"store {self._job}")
        self.manager.begins(req)
        out = self.manager.prepare_store([key_of(salt) for salt in blocks], req)
        assert out is not None, "there is room, and it was refused"
        pages = {key_of(salt): list(each) for salt, each in blocks.items()}
        results = self.run("store", spec([pages[key] for key in out.keys]), out.target)
        self.manager.complete_store(out.ticket, failed_of(results, out.keys))
        self.manager.ended(req)
        return results

    def load(self, blocks: Mapping[int, Sequence[int]]) -> list[TransferResult]:
        """Load these into pages; what each rank says."""
        keys, req = [key_of(salt) for salt in blocks], request(f"load {self._job}")
        self.manager.begins(req)
        assert len(keys) == self.manager.lookup_prefix(keys, req).ready, "it is not there"
        out = self.manager.prepare_load(keys, req)
        assert out is not None
        results = self.run("load", out.source, spec(list(blocks.values())))
        self.manager.complete_load(out.ticket, failed_of(results, keys))
        self.manager.ended(req)
        return results

    def run(self, what: str, source: LoadStoreSpec, target: LoadStoreSpec) -> list[TransferResult]:
        """One job of all ranks, until it has ended."""
        job = self.begin(what, source, target)
        return [result for worker in self.workers for result in finish(worker, [job])]

    def begin(self, what: str, source: LoadStoreSpec, target: LoadStoreSpec) -> int:
        """The number of a job that has begun."""
        self._job += 1
        for worker in self.workers:
            (worker.store if what == "store" else worker.load)(self._job, source, target)
        return self._job

    # -- what must be so

    def wipe(self) -> None:
        """Let no page hold anything."""
        for memory in self.memories:
            memory.wipe()

    def wrong(self, blocks: Mapping[int, Sequence[int]], beside: Sequence[int] = ()) -> list[str]:
        """Where pages hold something else than these blocks and nothing; but for pages that may hold anything."""
        spans = [(list(pages), 0, self.tokens, salt) for salt, pages in blocks.items()]
        return [found for memory in self.memories if (found := memory.wrong(spans, beside))]

    def close(self) -> None:
        """End it."""
        for worker in self.workers:
            worker.close()
        self.manager.close()


def key_of(salt: int) -> OffloadKey:
    """The key of the block with this content."""
    return chain(f"content {salt}", 1)[0]


def spec(pages: Sequence[Sequence[int]]) -> EngineSpec:
    """Blocks of the only cache group in these pages."""
    return EngineSpec([0] * len(pages), pages)


def finish(worker: OffloadingWorker, jobs: Sequence[int]) -> list[TransferResult]:
    """What a worker says of these jobs, each once, checked against what it may say."""
    worker.wait(jobs, LONG)
    results = worker.poll()
    assert sorted(jobs) == sorted(result.job for result in results), f"jobs {jobs} were waited for: {results}"
    for result in results:
        assert not result.cause or result.cause in CAUSES, f"{result.cause!r} is no cause of the vocabulary"
        assert not result.cause or result.why, f"{result} does not say why"
        assert result.cause or not result.failed, f"{result} says no cause"
    return results


def failed_of(results: Sequence[TransferResult], keys: Sequence[OffloadKey]) -> list[OffloadKey]:
    """What any rank could not move."""
    places = [place for each in results if each.cause for place in each.failed or range(len(keys))]
    return [keys[place] for place in sorted(set(places))]


class OffloadingWorkerSuite(Suite):
    """The contract of `tensorway.offload.OffloadingWorker`."""

    #: The backend's name, as `tensorway.create("offloading", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}

    def options_for(self, capacity: int) -> dict[str, object]:
        """Options with room for so many blocks; override it if yours is not called `capacity_blocks`."""
        return {**self.options, "capacity_blocks": capacity}

    def make(self, context: OffloadContext, capacity: int) -> Any:
        """The side of `context.role`; override it for one that is not installed."""
        return tensorway.create("offloading", self.name, self.options_for(capacity), context)

    @pytest.fixture
    def open_engine(self) -> Iterator[Callable[..., Engine]]:
        """Open an engine; all are closed at the end of the test."""
        opened: list[Engine] = []

        def made(shape: Shape = Shape(), pages_per_block: int = 1, capacity: int = CAPACITY) -> Engine:  # noqa: B008
            opened.append(Engine(lambda context: self.make(context, capacity), shape, pages_per_block))
            return opened[-1]

        yield made
        for each in opened:
            each.close()

    @pytest.fixture
    def engine(self, open_engine: Callable[..., Engine]) -> Engine:
        """One rank, one page for each block."""
        return open_engine()

    # -- bytes

    @pytest.mark.parametrize("order", ["NHD", "HND"])
    @pytest.mark.parametrize(("ranks", "pages"), [(1, 1), (1, 3), (2, 1), (3, 2)])
    def test_every_byte_comes_back_to_any_page_and_no_other_is_written(
        self, open_engine: Callable[..., Engine], ranks: int, pages: int, order: Any
    ) -> None:
        """Stored from some pages, loaded into others in another order, by all ranks.

        *If this fails:* the message says which byte of which page; compare how pages are addressed on both ways.
        """
        engine = open_engine(Shape(ranks, order=order), pages)
        rng = random.Random(ranks * 10 + pages)
        places = rng.sample(range(BLOCKS), 5 * pages)
        before = {salt: places[at * pages : (at + 1) * pages] for at, salt in enumerate(range(1, 6))}
        self._good(engine.store(before))
        assert [] == engine.wrong(before), "a store wrote to pages"
        engine.wipe()
        places = rng.sample(range(BLOCKS), 4 * pages)
        after = {salt: places[at * pages : (at + 1) * pages] for at, salt in enumerate((5, 1, 4, 2))}
        self._good(engine.load(after))
        assert [] == engine.wrong(after)

    def test_whatever_is_stored_evicted_and_stored_again_a_load_is_right(self, engine: Engine) -> None:
        """Twenty-four kinds of content, room for twelve: rows are used again and again.

        *If this fails:* take rows from the specs alone, and remember nothing of them.
        """
        rng, req = random.Random(6), request("is it here")
        for _ in range(60):
            engine.wipe()
            salts = rng.sample(range(1, 25), rng.randrange(1, 8))
            here = [salt for salt in salts if engine.manager.lookup(key_of(salt), req).value == "hit"]
            engine.manager.ended(req)
            blocks = dict(zip(salts, ([page] for page in rng.sample(range(BLOCKS), len(salts))), strict=True))
            if here and rng.random() < 0.6:
                blocks = {salt: blocks[salt] for salt in here}
                self._good(engine.load(blocks))
            else:
                self._good(engine.store(blocks))
            assert [] == engine.wrong(blocks)

    def test_a_page_that_is_not_wanted_is_left_alone(self, open_engine: Callable[..., Engine]) -> None:
        """-1 in a load: the others of its block are filled.

        *If this fails:* skip what is -1, and go on with the next page of the block.
        """
        engine = open_engine(pages_per_block=2)
        self._good(engine.store({1: [0, 1], 2: [2, 3]}))
        engine.wipe()
        self._good(engine.load({1: [8, -1], 2: [-1, 9]}))
        halves = [([8], 0, 4, 1), ([0, 9], 4, 8, 2)]
        assert "" == engine.memories[0].wrong(halves)

    def test_what_lacks_a_page_is_never_stored(self, open_engine: Callable[..., Engine]) -> None:
        """-1 in a store: that block fails, with a cause; others of the job may be stored.

        *If this fails:* refuse the block, in `failed`, by its place in the specs.
        """
        engine = open_engine(pages_per_block=2)
        (result,) = engine.store({1: [0, 1], 2: [2, -1], 3: [4, 5]})
        assert result.cause and (not result.failed or 1 in result.failed), result
        req = request("after")
        keys = [key_of(salt) for salt in (1, 2, 3)]
        here = [found.value == "hit" for found in engine.manager.lookup_many(keys, req)]
        assert not here[1]
        engine.manager.ended(req)
        engine.wipe()
        blocks = {salt: [8 + 2 * salt, 9 + 2 * salt] for salt, is_here in zip((1, 2, 3), here, strict=True) if is_here}
        self._good(engine.load(blocks))
        assert [] == engine.wrong(blocks)

    # -- jobs

    def test_several_jobs_end_each_once(self, engine: Engine) -> None:
        """Six at once, waited for in another order; `wait` does not keep what they became from `poll`.

        *If this fails:* hand out a result in `poll` alone, and forget it then.
        """
        (worker,), req = engine.workers, request("r")
        engine.compute({salt: [salt] for salt in range(1, 7)})
        outs = [engine.manager.prepare_store([key_of(salt)], req) for salt in range(1, 7)]
        jobs = [
            engine.begin("store", spec([[salt]]), out.target) for salt, out in enumerate(outs, 1) if out is not None
        ]
        assert 6 == len(jobs)
        worker.wait(jobs[::-1], LONG)
        worker.wait(jobs[:2], 0.0)
        results = finish(worker, jobs)
        assert [""] * 6 == [result.cause for result in results]
        assert [] == worker.poll()
        for out in outs:
            assert out is not None
            engine.manager.complete_store(out.ticket)
        engine.wipe()
        blocks = {salt: [20 + salt] for salt in range(1, 7)}
        self._good(engine.load(blocks))
        assert [] == engine.wrong(blocks)

    def test_waiting_has_an_end(self, engine: Engine) -> None:
        """For nothing, for what is unknown, for what may not have ended: it returns, or says so in words of ours.

        *If this fails:* count unknown jobs as ended; raise `DeadlineExceeded` for the others.
        """
        (worker,), req = engine.workers, request("r")
        worker.wait([], 0.0)
        engine.compute({1: [1]})
        out = engine.manager.prepare_store([key_of(1)], req)
        assert out is not None
        job = engine.begin("store", spec([[1]]), out.target)
        began = time.monotonic()
        assert refusal(lambda: worker.wait([job], 0.0)) in ("", "DeadlineExceeded")
        for jobs in ([job, 10_000], [-1]):
            refusal(lambda jobs=jobs: worker.wait(jobs, 0.0))  # type: ignore[misc]
        assert time.monotonic() - began < LONG / 2, "deadlines of zero took half a minute"
        self._good(finish(worker, [job]))

    # -- what cannot be

    @pytest.mark.parametrize("page", [BLOCKS, -2, 1 << 40, -(1 << 63)])
    @pytest.mark.parametrize("what", ["store", "load"])
    def test_a_page_that_there_is_none_of_is_refused(self, engine: Engine, what: str, page: int) -> None:
        """The block fails, and nothing is written anywhere but to the pages of the others.

        *If this fails:* compare each page with how many the geometry has, before the first is copied.
        """
        self._good(engine.store({1: [1], 2: [2], 3: [3]}))
        engine.wipe()
        if what == "store":
            req = request("r")
            out = engine.manager.prepare_store([key_of(4), key_of(5)], req)
            assert out is not None
            (result,) = self._refused(engine, "store", spec([[page], [5]]), out.target)
            engine.manager.complete_store(out.ticket, failed_of([result], out.keys))
        else:
            (result,) = engine.load({1: [11], 2: [page], 3: [13]})
        assert result.cause and (not result.failed or [int(what == "load")] == list(result.failed)), result
        assert [] == engine.wrong({}, beside=[11, 13])

    def test_specs_that_do_not_fit_are_refused(self, engine: Engine) -> None:
        """Lists of unequal lengths, an unknown group, pages too many for a block, another medium, no spec at all.

        *If this fails:* check both specs whole; make a result with a cause, or raise an error of ours.
        """
        self._good(engine.store({1: [1], 2: [2]}))
        engine.wipe()
        req = request("r")
        out = engine.manager.prepare_load([key_of(1), key_of(2)], req)
        assert out is not None
        nothing: Any = None
        bad: list[Any] = [
            spec([[5]]), spec([[5], [6], [7]]), EngineSpec([0, 7], [[5], [6]]), EngineSpec([0, -1], [[5], [6]]),
            EngineSpec([0], [[5], [6]]), spec([[5], [6, 7]]), spec([[5], []]), spec([["5"], [6]]),  # type: ignore[list-item]
            spec([[5], [6.5]]), spec([[5], [None]]), spec([[5], nothing]), Foreign(), nothing, out.source,  # type: ignore[list-item]
        ]  # fmt: skip
        for target in bad:
            results = self._refused(engine, "load", out.source, target)
            assert all(result.cause for result in results), f"{target} was taken"
            assert [] == engine.wrong({}, beside=[5, 6])
        for source in (Foreign(), nothing, spec([[5], [6]])):
            results = self._refused(engine, "load", source, spec([[8], [9]]))
            assert all(result.cause for result in results), f"{source} was taken"
        assert [] == engine.wrong({}, beside=[5, 6])
        engine.wipe()
        self._good(engine.run("load", out.source, spec([[8], [9]])))
        assert [] == engine.wrong({1: [8], 2: [9]}), "and afterwards what is right is not taken"

    def test_rows_that_there_are_none_of_are_refused(self, open_engine: Callable[..., Engine]) -> None:
        """A spec of a manager that has more rows than this worker: each block behind the end fails.

        *If this fails:* compare each row with how many there are, whatever process the spec came from.
        """
        engine, larger = open_engine(capacity=4), open_engine(capacity=BLOCKS - 8)
        req = request("r")
        out = larger.manager.prepare_store(chain("many", BLOCKS - 8), req)
        assert out is not None
        pages = [[page] for page in range(BLOCKS - 8)]
        for what in ("store", "load"):
            source, target = (spec(pages), out.target) if what == "store" else (out.target, spec(pages))
            for result in self._refused(engine, what, source, target):
                assert result.cause and (not result.failed or len(result.failed) >= BLOCKS - 12), result

    # -- the end

    def test_who_is_closed_refuses_and_touches_nothing(self, open_engine: Callable[..., Engine]) -> None:
        """Closed twice while a job is under way; afterwards no page changes, and calls raise `Closed`.

        *If this fails:* end or finish copies in `close`, and remember that it is closed.
        """
        engine = open_engine()
        (worker,), blocks = engine.workers, {salt: [salt] for salt in range(1, 11)}
        self._good(engine.store(blocks))
        out = engine.manager.prepare_load([key_of(salt) for salt in blocks], request("r"))
        assert out is not None
        target = spec(list(blocks.values()))
        worker.load(77, out.source, target)
        worker.close()
        worker.close(0.0)
        engine.wipe()
        for call in (lambda: worker.load(78, out.source, target), lambda: worker.store(79, target, out.source)):
            assert "Closed" == refusal(call)
        time.sleep(0.1)
        assert [] == engine.wrong({}), "a page was written to after the end"

    def test_statistics_are_values_of_the_vocabulary(self, engine: Engine) -> None:
        """Names and labels are those of `tensorway.offload.METRICS`; bytes that were copied are counted.

        *If this fails:* count with `tensorway.metrics.Counters` over `METRICS`.
        """
        (result,) = engine.store({1: [1], 2: [2]})
        self._good(engine.load({1: [5]}))
        assert [] == unknown_values(samples := engine.workers[0].statistics())
        assert total(samples, "offload_bytes_total") >= result.nbytes > 0

    @staticmethod
    def _good(results: Sequence[TransferResult]) -> None:
        assert [] == [result for result in results if result.cause], "it failed"

    @staticmethod
    def _refused(engine: Engine, what: str, source: Any, target: Any) -> list[TransferResult]:
        """What becomes of a job that cannot be: results, or nothing if it was not taken at all."""
        try:
            return engine.run(what, source, target)
        except TensorwayError as error:
            return [TransferResult(0, "refused", str(error))]
