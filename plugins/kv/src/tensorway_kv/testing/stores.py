"""Engines that share a folder: requests with hashes, and what goes wrong in the processes of their ranks.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from tensorway.kv import Copier, KVContext, Match, RankGeometry, RequestView, Result, Retention, Step
from tensorway.rendezvous import Rendezvous
from tensorway.testing.ranks import Rank
from tensorway_kv.store.mover import SharedStoreMover
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.planner import SharedStorePlanner
from tensorway_kv.testing.engine import PATIENCE, SECRET, Engine, fill, until
from tensorway_kv.testing.memory import JUNK, Ids, Shaped, memory_of, salted

#: Tokens of a block of the engines that are here.
BLOCK: Final = 4


def asking(request: str, tokens: int, content: int = 1, tenant: str = "", block: int = BLOCK) -> RequestView:
    """A request whose tokens, and bytes, a number stands for."""
    hashes = tuple(hashlib.sha256(f"{content}/{at}/{block}".encode()).digest() for at in range(tokens // block))
    return RequestView(request, tokens, hashes=hashes, salt=tenant)


def save(engine: Engine, view: RequestView, blocks: Ids, content: int = 1) -> None:
    """Compute a request and end it, until it is saved."""
    engine.each(fill, blocks, view.tokens, content)
    assert engine.ask("finish", view, blocks, view.tokens).keep
    until(lambda: view.id in engine.released, engine)


def look(engine: Engine, view: RequestView, have: int = 0) -> Match:
    """What is stored of a request, once that is known."""
    found: list[Match] = []

    def known() -> bool:
        found.append(engine.ask("lookup", view, have))
        return found[-1].mode != "later"

    until(known, engine)
    return found[-1]


def load(engine: Engine, view: RequestView, blocks: Ids, have: int, tokens: int) -> int | None:
    """Load tokens that were found; None if they were received, else how many are good."""
    engine.ask("reserve", view, blocks, have, tokens)
    until(lambda: view.id in engine.received or view.id in engine.failed, engine)
    if view.id in engine.received:
        engine.received.remove(view.id)
        return None
    return engine.failed.pop(view.id)


class Alone:
    """An engine of one rank in this process: planner and mover, one step after the other."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        shape: Shaped,
        options: dict[str, Any],
        device: str = "cpu",
        copier: Copier | None = None,
        model: str = "tiny",
    ) -> None:
        geometry, self.held = memory_of(shape, 0)
        planes = (msgspec.structs.replace(plane, device=device) for plane in geometry.planes)
        geometry = RankGeometry(tuple(planes), geometry.groups, geometry.share)
        made = SharedStoreOptions(**{"secret": SECRET, **options})

        def context(role: Literal["planner", "mover"]) -> KVContext:
            return KVContext("alone", rendezvous, role, 1, 0, geometry, {"model": model}, copier=copier)

        self.planner = SharedStorePlanner(made, context("planner"))
        try:
            self.mover = SharedStoreMover(made, context("mover"))
        except BaseException:
            self.planner.close()
            raise
        self.results: list[Result] = []

    def step(self) -> Step:
        """One step of the engine; what ended in it."""
        step = self.planner.plan_step()
        self.mover.submit(step.plan)
        said = self.mover.poll()
        self.results += said
        self.planner.on_results(0, said)
        return step

    def ended(self, request: str) -> Step:
        """Steps until a request has ended in one of them."""
        last = time.monotonic() + PATIENCE
        while True:
            step = self.step()
            if request in (*step.received, *step.released, *step.failed):
                return step
            assert time.monotonic() < last, f"no end of {request}"
            time.sleep(1e-3)

    def save(self, view: RequestView, blocks: Ids, content: int = 1) -> Result:
        """Compute a request and end it; what became of saving it."""
        for _, places, names in self.held.places(blocks, range(view.tokens)):
            self.held.memory[places] = salted(names, content)
        assert self.planner.finish(view, blocks, view.tokens).keep
        self.ended(view.id)
        return self.results[-1]

    def found(self, view: RequestView, have: int = 0) -> int:
        """How many tokens are stored of a request."""
        last = time.monotonic() + PATIENCE
        while (match := self.planner.lookup(view, have)).mode == "later":
            assert time.monotonic() < last, "the answer is put off for ever"
            time.sleep(1e-3)
        return match.tokens

    def load(self, view: RequestView, blocks: Ids, have: int, tokens: int) -> Result:
        """Load what was found; what became of it."""
        self.planner.reserve(view, blocks, have, tokens)
        self.ended(view.id)
        return self.results[-1]

    def holds(self, blocks: Ids, start: int, good: int, stop: int, content: int) -> None:
        """As `verify_prefix`; and forget it all."""
        _check_prefix(self.held, blocks, start, good, stop, content)
        self.held.memory[:] = JUNK

    def close(self) -> None:
        """End it."""
        self.mover.close()
        self.planner.close()


def _check_prefix(held: Any, blocks: Ids, start: int, good: int, stop: int, content: int) -> None:
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for _, places, _ in held.places(blocks, range(start, stop)):
        expected[places] = held.memory[places]
    for _, places, names in held.places(blocks, range(start, good)):
        expected[places] = salted(names, content)
    np.testing.assert_array_equal(held.memory, expected)


# -- in the processes


def fork_saving(
    rank: Rank, shape: Shaped, options: dict[str, Any], view: RequestView, blocks: Ids, content: int
) -> int:
    """Let a process of its own compute a request and save it; `kill` ends it.

    It is a fork of one that has found and probed the rendezvous, for that takes longer than saving.
    """
    if "warm" not in rank.notes:
        rank.rendezvous().close()
        rank.notes["warm"] = True
    rank.notes.pop("rendezvous", None)
    pid = os.fork()
    if pid:
        return pid
    try:
        alone = Alone(rank.rendezvous(), shape, options)
        for _, places, names in alone.held.places(blocks, range(view.tokens)):
            alone.held.memory[places] = salted(names, content)
        assert alone.planner.finish(view, blocks, view.tokens).keep
        while True:
            alone.step()
            time.sleep(1e-3)
    finally:
        os._exit(1)


def kill(rank: Rank, pid: int) -> None:
    """End a process that `fork_saving` began, in the middle of whatever it does."""
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it has ended by itself"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def verify_prefix(rank: Rank, blocks: Ids, start: int, good: int, stop: int, content: int) -> None:
    """See that the good tokens are there, and nothing outside of the request's tokens was written.

    What lies between the good ones and the end was promised to nobody.
    """
    _check_prefix(rank.notes["memory"], blocks, start, good, stop, content)


def hang(rank: Rank, folder: str) -> None:
    """Let a folder not answer from now on, whatever threads ask it; the engine's own thread must not ask."""
    event = rank.notes["hanging"] = threading.Event()
    originals = rank.notes["originals"] = {name: getattr(os, name) for name in ("open", "stat", "scandir")}

    def waiting(name: str) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).startswith(folder):
                assert threading.current_thread() is not threading.main_thread(), "the engine waits for the disk"
                event.wait(60)
            return originals[name](path, *arguments, **options)

        return call

    for name in originals:
        setattr(os, name, waiting(name))


def unhang(rank: Rank) -> None:
    """Let it answer, also what it was asked before."""
    for name, original in rank.notes.pop("originals").items():
        setattr(os, name, original)
    rank.notes.pop("hanging").set()


def no_files_longer_than(rank: Rank, nbytes: int) -> None:
    """Let the disk be full for files of this process that are longer; -1 for no more."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes if nbytes >= 0 else hard, hard))


def abort(rank: Rank, view: RequestView, blocks: Ids) -> bool:
    """End a request that was aborted; whether its blocks are kept."""
    kept: Retention = rank.notes["planner"].finish(view, blocks, view.tokens, aborted=True)
    return kept.keep


def files_below(folder: str) -> list[Path]:
    """All files, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
