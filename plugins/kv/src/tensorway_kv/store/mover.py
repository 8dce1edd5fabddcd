"""The mover of `shared-store`: beside one rank's memory, it loads blocks from files and saves them there.

May import the core and this package's meeting and store. It decides nothing: which blocks there are the planner has
seen, and a file that is gone or damaged by now is a failure with the tokens that are good. The disk is waited for on
threads, never in a call of the engine.
"""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Final

from tensorway import settings
from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded, Incompatible
from tensorway.exports import export
from tensorway.kv import METRICS, Capabilities, KVContext, Result
from tensorway.metrics import Counters, Sample
from tensorway_kv.meeting import VERSION, Ground, RankRecord
from tensorway_kv.store import orders
from tensorway_kv.store.jobs import Direction, Failed, Job, Pool
from tensorway_kv.store.opening import folders
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.pages import Layout, Pages
from tensorway_kv.store.seals import OVERHEAD, Seals
from tensorway_kv.store.sections import check, read_manifest, sections

_log = logger("kv")
#: A record of a rank says where words are that its readers read; here nobody reads any.
_NO_WORDS: Final = 1
#: Seconds of a turn in which something is waited for.
_TURN: Final = 1e-3


class SharedStoreMover:
    """See `tensorway.kv.contract.Mover`."""

    def __init__(self, options: SharedStoreOptions, context: KVContext) -> None:
        until = time.monotonic() + context.deadline
        geometry = check(context)
        self._options, self._tokens = options, geometry.groups[0].block_tokens
        self.capabilities = Capabilities(pull=False, by_content=True, media=frozenset({"cpu"}))
        self._seals = Seals(options.secret or settings.secret())
        self._manifests, self._blocks = folders(options, context.facts, self._seals, context.deadline)
        self._counts = Counters(METRICS, backend="shared-store", engine=context.engine, rank=str(context.rank))
        self._pool, self._jobs = Pool(options.threads, "tensorway-kv-store"), dict[tuple[Direction, str], Job]()
        self._layouts: dict[tuple[int, str], Layout] = {}
        self._closed = False
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        try:
            #: This life of the engine; the planner chose it.
            self.incarnation = self._ground.wait_engine(context.engine, context.deadline).incarnation
            key = self._ground.rank_key(context.engine, self.incarnation, context.rank)
            record = RankRecord(version=VERSION, incarnation=uuid.uuid4().hex, geometry=geometry, board=_NO_WORDS)
            self._ground.tell(key, record, max(0.1, until - time.monotonic()))
            self._ground.follow()
            told = self._ground.ranks(context.engine, self.incarnation, context.ranks, until)
            ranks, me = [record.geometry for record in told], context.rank
            found = sections(ranks, context.facts, self._seals)
            held = [one for one in found if one.places[me] is not None]
            self._pages = {one.group: Pages(ranks, me, one, context.copier) for one in held}
            self._writes = {one.group: one.writers[me] for one in held}
            #: For each group how many of the last tokens count; 0 for all.
            self._windows = [group.window for group in geometry.groups]
            self._me = me
        except BaseException:
            self.close()
            raise
        export("mover", self.statistics, METRICS)

    # -- what the planner says

    def submit(self, plan: bytes) -> None:
        """Begin what is to be loaded and saved; raises only for a plan that is none."""
        self._check()
        what = orders.decode(plan, self.incarnation)
        for load in what.loads:
            self._begin("load", load.request, load.seconds, load.start, partial(self._load, load))
        for save in what.saves:
            self._begin("save", save.request, save.seconds, 0, partial(self._save, save))
        for request in what.cancels:
            self.cancel(request)

    def _begin(self, direction: Direction, request: str, seconds: float, good: int, work: partial[None]) -> None:
        if (direction, request) not in self._jobs:
            job = self._jobs[direction, request] = Job(request, direction, time.monotonic() + seconds, good)
            self._pool.do(partial(job.run, work))

    def cancel(self, request: str) -> None:
        """Give up what is under way for it."""
        for direction in ("load", "save"):
            if (job := self._jobs.get((direction, request))) is not None:
                job.give_up("cancelled", "nobody wants it any more")

    def poll(self) -> list[Result]:
        """What has ended."""
        self._check()
        now, results = time.monotonic(), []
        for key, job in list(self._jobs.items()):
            if job.finished(now):
                del self._jobs[key]
                results.append(self._ended(job, now))
        return results

    def flush(self, deadline: float) -> None:
        """Wait until no page of what failed or was given up is touched any more."""
        until = time.monotonic() + deadline
        for job in [job for job in self._jobs.values() if job.unwanted is not None]:
            while not job.finished(time.monotonic(), _TURN):
                if time.monotonic() >= until:
                    raise DeadlineExceeded(
                        "Pages were to be overwritten.",
                        f"Some of them are still copied after {deadline:g} s.",
                        "Leave these pages alone until the mover has said that their requests failed.",
                    )

    def statistics(self) -> list[Sample]:
        """What became of loads and saves, and what was not believed."""
        for direction in ("load", "save"):
            waiting = sum(one == direction for one, _ in self._jobs)
            self._counts.set("kv_requests_waiting", waiting, direction=direction)
        return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End; pages are safe afterwards, and what was not saved yet is not."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline
        for job in self._jobs.values():
            job.give_up("cancelled", "the mover was closed")
        for job in self._jobs.values():
            while not job.finished(time.monotonic(), _TURN) and time.monotonic() < until:
                pass
        self._pool.close(until)
        self._ground.close(max(0.1, until - time.monotonic()))

    def _ended(self, job: Job, now: float) -> Result:
        cause, why = job.ended or ("failed", "")
        labels, counts = {"direction": job.direction, "peer": self._options.label}, self._counts
        counts.add("kv_transfers_total", **labels, cause=cause or "none")
        counts.add("kv_bytes_total", job.nbytes, **labels)
        counts.add("kv_pieces_total", job.files, **labels)
        counts.took("kv_phase_seconds", now - job.begun, **labels, phase="done")
        for refused, count in job.refused.items():
            counts.add("kv_blocks_refused_total", count, peer=self._options.label, cause=refused)
        if why:
            why = f"Store {self._options.label}: {why}"
        return Result(job.request, "received" if job.direction == "load" else "sent", cause, why, job.good)

    # -- on threads

    def _load(self, load: orders.Load, job: Job) -> None:
        tokens = self._tokens
        first, plain = load.start // tokens, not any(self._windows)
        end = -(-load.stop // tokens)
        shifts = [max(0, end - len(ids)) for ids in load.blocks]
        for index in range(first, end):
            start, stop = max(load.start, index * tokens), min(load.stop, (index + 1) * tokens)
            for group, pages in self._pages.items():
                window = self._windows[group]
                begin = max(start, load.stop - window) if window else start
                if begin < stop:
                    layout = self._layout_of(load, index - first, group)
                    at = index - shifts[group]
                    if not 0 <= at < len(load.blocks[group]):
                        raise Failed("refused", f"block {index} of group {group} was not given")
                    block = load.blocks[group][at]
                    pages.check(block)
                    within = (begin - index * tokens, stop - index * tokens)
                    self._load_block(job, pages, block, layout, load.names[index - first], within)
            if plain:
                job.good = stop
        job.good = load.stop

    def _load_block(
        self, job: Job, pages: Pages, block: int, layout: tuple[str, Layout], name: bytes, within: tuple[int, int]
    ) -> None:
        files = {}
        for rank in layout[1].files:
            job.check()
            files[rank] = self._read(job, layout, name, rank)
        with job.touching():
            job.nbytes += pages.put(block, layout[1], files, *within)

    def _read(self, job: Job, layout: tuple[str, Layout], name: bytes, rank: int) -> bytearray:
        """What a file holds; one that is not what it should be is removed, and is as if it were not there."""
        key = f"{layout[0]}/{name.hex()}"
        length = layout[1].manifest.nbytes(rank) + OVERHEAD
        data = self._blocks.get(key, rank, length)
        if data is None:
            raise Failed("missing", f"the file of a block is gone; {job.good} tokens are good")
        job.files += 1
        cause = "torn" if len(data) != length else self._seals.refuses(bytes.fromhex(layout[0]), name, rank, data)
        if cause is not None:
            job.refused[cause] += 1
            try:
                self._blocks.remove(key, rank)
            except OSError as error:
                _log.warning("A file of store %s is %s, and stays: %s", self._options.label, cause, error)
            raise Failed("corrupt", f"a file was {cause} and is not used; {job.good} tokens are good")
        return data

    def _layout_of(self, load: orders.Load, index: int, group: int) -> tuple[str, Layout]:
        """How files of a block are read into a group; learned from the folder once. Threads may learn it twice."""
        row = load.which[index]
        which = row[group] if group < len(row) else -1
        if which < 0:
            raise Failed("missing", f"block {index} of group {group} is not stored")
        name, pages = load.layouts[which], self._pages[group]
        known = self._layouts.get((group, name))
        if known is None:
            try:
                own = name == pages.section.layout
                manifest = pages.section.manifest if own else read_manifest(self._manifests, self._seals, name)
                if manifest is None:
                    raise Failed("missing", f"nobody says what files of layout {name[:12]} hold")
                known = pages.layout(name, manifest, pages.section.places[self._me] if own else None)
            except Incompatible as error:
                raise Failed("incompatible", error.true) from error
            self._layouts[group, name] = known
        return name, known

    def _save(self, save: orders.Save, job: Job) -> None:
        tokens = self._tokens
        shifts = [max(0, -(-save.tokens // tokens) - len(ids)) for ids in save.blocks]
        for index, name in enumerate(save.names, save.first):
            for group, pages in self._pages.items():
                if not self._writes[group] or index < shifts[group]:
                    continue
                block = save.blocks[group][index - shifts[group]]
                pages.check(block)
                self._save_block(job, pages, block, name)
            job.good = (index + 1) * tokens

    def _save_block(self, job: Job, pages: Pages, block: int, name: bytes) -> None:
        section = pages.section
        rank = section.places[self._me]
        key = f"{section.layout}/{name.hex()}"
        job.check()
        if rank is None or self._blocks.has(key, rank):
            return
        with job.touching():
            data = pages.take(block)
        self._blocks.put(key, rank, [self._seals.seal(section.fingerprint, name, rank, data), data])
        job.nbytes += len(data)
        job.files += 1

    def _check(self) -> None:
        if self._closed:
            raise Closed("A mover of KV blocks was used.", "It is closed.", "Open another.")
