"""Engines as real processes: one for the planner, one for each rank; and the side of the test, which steps them.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
`Engine` carries plans and results between an engine's planner and its movers, as the engine would.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import numpy as np

from tensorway.kv import KVContext, RequestView, Result
from tensorway.metrics import total
from tensorway.testing.ranks import Rank, RankProcess, Ranks
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.testing.memory import JUNK, Ids, Shaped, memory_of, salted

SECRET: Final = "a secret of the tests"
PATIENCE: Final = 60.0
#: What blocks hold that are used for something else.
SPOILED: Final = JUNK ^ 0xFF

Options = dict[str, Any]
_ANY: Final[Mapping[str, str]] = {}

# -- in the processes


def open_planner(rank: Rank, engine: str, shape: Shaped, options: Options) -> None:
    """Begin a life of an engine."""
    geometry = memory_of(shape, 0)[0]
    context = KVContext(engine, rank.rendezvous(), "planner", shape.tp, 0, geometry, {"model": "tiny"})
    rank.notes["planner"] = construct_handover(HandoverOptions(**options), context)


def open_mover(rank: Rank, engine: str, shape: Shaped, number: int, options: Options) -> None:
    """Hold memory, and say so."""
    geometry, rank.notes["memory"] = memory_of(shape, number)
    context = KVContext(engine, rank.rendezvous(), "mover", shape.tp, number, geometry, {"model": "tiny"})
    rank.notes["mover"] = construct_handover(HandoverOptions(**options), context)


def ask(rank: Rank, name: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the planner."""
    return getattr(rank.notes["planner"], name)(*arguments, **options)


def finish(rank: Rank, request: RequestView, blocks: Ids, tokens: int, aborted: bool) -> bool:
    """End a request; whether its blocks are kept."""
    return bool(rank.notes["planner"].finish(request, blocks, tokens, aborted=aborted).keep)


def step(rank: Rank, results: Sequence[tuple[int, list[Result]]]) -> Any:
    """Give the planner what movers said, and ask what is next."""
    planner = rank.notes["planner"]
    for number, said in results:
        planner.on_results(number, said)
    return planner.plan_step(), planner.busy()


def submit(rank: Rank, plan: bytes) -> None:
    """Give a mover its plan."""
    rank.notes["mover"].submit(plan)


def turn(rank: Rank, plan: bytes) -> list[Result]:
    """Submit a plan and say what has ended."""
    rank.notes["mover"].submit(plan)
    found: list[Result] = rank.notes["mover"].poll()
    return found


def fill(rank: Rank, blocks: Ids, tokens: int, salt: int, start: int = 0) -> None:
    """Compute a request from `start` on: write the bytes of its tokens, and its states."""
    held = rank.notes["memory"]
    for _, places, names in held.places(blocks, range(start, tokens)):
        held.memory[places] = salted(names, salt)


def spoil(rank: Rank, blocks: Ids) -> None:
    """Use blocks for something else."""
    held = rank.notes["memory"]
    for page in held.pages(blocks):
        held.memory[page] = SPOILED


def verify(rank: Rank, blocks: Ids, start: int, stop: int, salt: int) -> int:
    """See that exactly these tokens are there, and every other byte is as it was; how many bytes that is."""
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for _, places, names in held.places(blocks, range(start, stop)):
        expected[places] = salted(names, salt)
    np.testing.assert_array_equal(held.memory, expected)
    return int((expected != JUNK).sum())


def wipe(rank: Rank) -> None:
    """Let nothing be in memory."""
    rank.notes["memory"].memory[:] = JUNK


def counted(rank: Rank, side: str, metric: str, labels: Mapping[str, str] = _ANY) -> float:
    """What a side has counted under a name with these labels, all in all."""
    return total(rank.notes[side].statistics(), metric, **labels)


def close_side(rank: Rank, side: str) -> None:
    """Close a planner, or a mover."""
    rank.notes.pop(side).close()


def end(rank: Rank) -> None:
    """Close whatever a test left open."""
    for side in ("mover", "planner"):
        found = rank.notes.pop(side, None)
        if found is not None:
            found.close()
    rank.notes.pop("memory", None)


# -- the side of the test


@attrs.define
class Engine:
    """One engine: its planner's process, and those of its ranks."""

    name: str
    shape: Shaped
    ranks: Ranks
    indices: list[int]
    options: Options
    released: list[str] = attrs.field(factory=list)
    received: list[str] = attrs.field(factory=list)
    failed: dict[str, int] = attrs.field(factory=dict)
    results: list[Result] = attrs.field(factory=list)
    heard: list[Result] = attrs.field(factory=list)
    _said: list[tuple[int, list[Result]]] = attrs.field(factory=list)

    @property
    def planner(self) -> RankProcess:
        """The planner's process."""
        return self.ranks[self.indices[0]]

    @property
    def movers(self) -> list[RankProcess]:
        """Those of its ranks."""
        return [self.ranks[index] for index in self.indices[1:]]

    def open(self, opening: Callable[..., None] = open_mover) -> Engine:
        """Begin its life."""
        options = {"transport": "local", "secret": SECRET, "presence": 3.0, **self.options}
        self.planner.call(open_planner, self.name, self.shape, options)
        for number, mover in enumerate(self.movers):
            mover.start(opening, self.name, self.shape, number, options)
        for mover in self.movers:
            mover.result()
        return self

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of its planner."""
        return self.planner.call(ask, name, *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let all its movers' processes call a function."""
        return self.ranks.each(self.indices[1:], function, *arguments)

    def step(self) -> bool:
        """One step of the engine: what the planner decided goes to every mover, what they say comes back."""
        return self.does(turn)

    def does(self, function: Callable[..., Any], *arguments: Any) -> bool:
        """The same where movers' processes call a function that is given the plan, and says what has ended."""
        plan, busy = self._decide()
        self._said = list(enumerate(self.each(function, plan, *arguments)))
        for _, said in self._said:
            self.results += [result for result in said if result.what != "heard"]
            self.heard += [result for result in said if result.what == "heard"]
        return busy

    def begin(self) -> None:
        """Half a step: movers begin what the planner decided, and nobody looks yet."""
        plan, _ = self._decide()
        self.each(submit, plan)

    def _decide(self) -> tuple[bytes, bool]:
        step_, busy = self.planner.call(step, self._said)
        self._said = []
        self.released += step_.released
        self.received += step_.received
        for request, tokens in step_.failed.items():
            assert request not in self.failed
            self.failed[request] = tokens
        return step_.plan, bool(busy)

    def finish(self, request: str, blocks: Ids, tokens: int, salt: int = 1) -> Any:
        """Compute a request and end it; what its consumer is told."""
        self.each(fill, blocks, tokens, salt)
        return self.keep(request, blocks, tokens)

    def keep(self, request: str, blocks: Ids, tokens: int) -> Any:
        """End a request whose blocks are computed; what its consumer is told."""
        kept = self.ask("finish", RequestView(request, tokens, hand_over=True), blocks, tokens)
        assert kept.keep
        return kept.ticket

    def close(self) -> None:
        """End its life in order."""
        for mover in self.movers:
            mover.call(close_side, "mover")
        self.planner.call(close_side, "planner")


def until(condition: Callable[[], object], *engines: Engine, seconds: float = PATIENCE) -> None:
    """Let engines go on until something is true."""
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, [(one.name, one.received, one.failed, one.released) for one in engines]
        for one in engines:
            one.step()


_numbers = itertools.count()


class Deployment:
    """Engines over one set of processes, which tests share; each deployment has a path of its own."""

    def __init__(self, ranks: Ranks, **options: Any) -> None:
        self.ranks, self.used = ranks, 0
        self.options: Options = {"path": f"/kv/{next(_numbers)}", **options}
        self.engines: list[Engine] = []

    def engine(self, name: str, shape: Shaped, opening: Callable[..., None] = open_mover, **options: Any) -> Engine:
        """One more engine, in processes of its own."""
        count = 1 + shape.tp
        self.ranks.grow(self.used + count)
        indices = list(range(self.used, self.used + count))
        self.used += count
        made = Engine(name, shape, self.ranks, indices, {**self.options, **options})
        self.engines.append(made)
        return made.open(opening)

    def again(self, engine: Engine) -> Engine:
        """The next life of an engine whose processes have all been killed, in their place."""
        self.ranks.grow(self.used)
        made = Engine(engine.name, engine.shape, self.ranks, engine.indices, engine.options)
        self.engines[self.engines.index(engine)] = made
        return made.open()

    def close(self) -> None:
        """Close what is open; processes that were left in the middle of something end."""
        for one in self.engines:
            for index in one.indices:
                process = self.ranks[index]
                if process.at_rest:
                    process.call(end)
                else:
                    process.close()
