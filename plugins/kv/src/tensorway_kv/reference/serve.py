"""Reference engines in processes of their own: one that schedules, and from there one for each tensor-parallel rank.

May import the core, its `testing` for processes, and this package. `Site` is where engines of one deployment meet,
`ServedEngine` this side of one; functions with a `Rank` first are called in the other processes. Every wait has a
deadline, and whatever is left when a site is closed ends.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from typing import Any, Final

import attrs
from numpy.typing import NDArray

import tensorway
from tensorway.errors import Closed, DeadlineExceeded, TensorwayError
from tensorway.kv import RankGeometry, Result
from tensorway.metrics import Sample
from tensorway.rendezvous import Rendezvous
from tensorway.testing.ranks import Rank, RankFailed, RankProcess
from tensorway_kv.reference.engine import Engine
from tensorway_kv.reference.model import ModelShape
from tensorway_kv.reference.rank import IDLE, Connection, EngineOptions, Work, Worker, parts_of
from tensorway_kv.reference.requests import Outcome, Request

Array = NDArray[Any]

#: Seconds that a rank may take for a part of a step, and an engine for a question.
_ANSWER: Final = 60.0
#: How much longer than its process this side waits for an answer.
_MARGIN: Final = 5.0
#: Seconds that an engine rests that has nothing to do.
_REST: Final = 5e-3


@attrs.frozen
class _Plan:
    """What an engine is opened with."""

    shape: ModelShape
    options: EngineOptions
    connection: Connection
    #: Of the rendezvous.
    address: str
    secret: str = attrs.field(repr=False)

    def rendezvous(self) -> Rendezvous:
        """The one of the site."""
        found: Rendezvous = tensorway.create("rendezvous", "direct", {"address": self.address, "secret": self.secret})
        return found


def _answering(function: Callable[..., Any]) -> Callable[..., tuple[Any, TensorwayError | None]]:
    """What is asked of the engine, with its errors as values: the other side raises them as they are."""

    @functools.wraps(function)
    def answered(rank: Rank, *given: Any) -> tuple[Any, TensorwayError | None]:
        try:
            return function(rank, *given), None
        except TensorwayError as error:
            return None, error

    return answered


def _said(answer: tuple[Any, TensorwayError | None]) -> Any:
    """The answer, or the error that was one."""
    value, error = answer
    if error is not None:
        raise error
    return value


# -- in the process of a rank


@_answering
def open_pages(rank: Rank, plan: _Plan, number: int) -> RankGeometry:
    """Have memory; what is where."""
    _, pages = rank.notes["parts"] = parts_of(plan.shape, plan.options, number)
    return pages.geometry


@_answering
def open_mover(rank: Rank, plan: _Plan, number: int) -> None:
    """Join the engine whose planner is there."""
    shard, pages = rank.notes.pop("parts")
    rank.notes["rendezvous"] = rendezvous = plan.rendezvous()
    mover = plan.connection.mover(rendezvous, plan.shape, plan.options.tp, number, pages.geometry)
    rank.notes["worker"] = Worker(shard, pages, mover, plan.options)


def work(rank: Rank, what: str, *given: Any) -> Any:
    """Do a part of a step."""
    return getattr(rank.notes["worker"], what)(*given)


def close_rank(rank: Rank, deadline: float) -> None:
    """End what is open."""
    if (worker := rank.notes.pop("worker", None)) is not None:
        worker.close(deadline)
    if (rendezvous := rank.notes.pop("rendezvous", None)) is not None:
        rendezvous.close()


# -- in the process that schedules


class ProcessRanks:
    """Ranks in processes; see `tensorway_kv.reference.rank.Ranks`."""

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self.processes = processes

    def begin(self, work_: Work) -> None:
        """Give every mover the step's plan."""
        self.each(work, "begin", work_)

    def attend(self, layer: int, hidden: Array) -> list[Array]:
        """Let each rank attend."""
        return self.each(work, "attend", layer, hidden)

    def end(self) -> list[list[Result]]:
        """What movers have to say."""
        return self.each(work, "end")

    def statistics(self) -> list[Sample]:
        """What movers have counted."""
        return [sample for samples in self.each(work, "statistics") for sample in samples]

    def each(self, function: Callable[..., Any], *given: Any) -> list[Any]:
        """Let all call a function at once."""
        for process in self.processes:
            process.start(function, *given)
        return [process.result(_ANSWER) for process in self.processes]


class _Loop:
    """An engine and the one thread that uses it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]]] = queue.SimpleQueue()
        self._awaited: dict[str, Future[Outcome]] = {}
        self._ended: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorway-kv-reference", daemon=True)
        self._thread.start()

    def ask(self, question: Callable[[Engine], Any], seconds: float = _ANSWER) -> Any:
        """Let the thread call this between two steps."""
        answer: Future[Any] = Future()
        self._asked.put((question, answer))
        if self._ended is not None:  # and nobody may have seen the question
            raise self._ended
        return self._result(answer, "It was asked something.", seconds)

    def wait(self, request: str, seconds: float) -> Outcome:
        """What becomes of a request."""
        answer: Future[Outcome] = Future()
        self.ask(lambda engine: self._awaited.update({request: answer}))
        try:
            found: Outcome = self._result(answer, f"Request {request} was to end.", seconds)
        except DeadlineExceeded:
            self.ask(lambda engine: self._awaited.pop(request, None))  # who asks again is told
            raise
        return found

    def stop(self, seconds: float) -> None:
        """No step any more."""
        self._stopped.set()
        self._thread.join(seconds)

    @staticmethod
    def _result(answer: Future[Any], asked: str, seconds: float) -> Any:
        try:
            return answer.result(seconds)
        except TooLate:
            true = f"It did not within {seconds:g} s."
            raise DeadlineExceeded(asked, true, "Give it more time, or see what the engine waits for.") from None

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                worked = self._engine.step()
                self._answer(0.0 if worked else IDLE if self._engine.busy else _REST)
        except BaseException as error:  # whoever asks next is told
            self._ended = error
        else:
            self._ended = Closed("An engine was asked something.", "It is closed.", "Open another.")
        for answer in self._awaited.values():
            answer.set_exception(self._ended)
        while not self._asked.empty():
            self._asked.get()[1].set_exception(self._ended)

    def _answer(self, rest: float) -> None:
        try:
            while True:
                question, answer = self._asked.get(rest > 0.0, rest) if rest else self._asked.get_nowait()
                rest = 0.0
                try:
                    answer.set_result(question(self._engine))
                except TensorwayError as error:
                    answer.set_exception(error)
        except queue.Empty:
            pass
        for request in list(self._awaited):
            if (outcome := self._engine.take(request)) is not None:
                self._awaited.pop(request).set_result(outcome)


@attrs.define
class _Served:
    """What the process that schedules has open."""

    loop: _Loop
    planner: Any
    ranks: ProcessRanks
    rendezvous: Rendezvous


@_answering
def open_engine(rank: Rank, plan: _Plan) -> list[int]:
    """Begin a life of an engine; the processes of its ranks."""
    processes = [RankProcess("") for _ in range(plan.options.tp)]
    rank.notes["processes"] = processes
    for number, process in enumerate(processes):
        process.start(open_pages, plan, number)
    geometries = [_said(process.result(_ANSWER)) for process in processes]
    rendezvous = plan.rendezvous()
    # The planner names this life; movers join the one that they find.
    planner = plan.connection.planner(rendezvous, plan.shape, plan.options.tp, geometries[0])
    for number, process in enumerate(processes):
        process.start(open_mover, plan, number)
    for answer in [process.result(_ANSWER) for process in processes]:
        _said(answer)
    ranks = ProcessRanks(processes)
    engine = Engine(plan.shape, plan.options, ranks, planner)
    rank.notes["served"] = _Served(_Loop(engine), planner, ranks, rendezvous)
    return [process.pid for process in processes]


@_answering
def submit(rank: Rank, request: Request) -> Mapping[str, Any] | None:
    """Take a request; if its blocks are promised already, the ticket."""
    found: Mapping[str, Any] | None = rank.notes["served"].loop.ask(lambda engine: engine.submit(request))
    return found


@_answering
def wait(rank: Rank, request: str, seconds: float) -> Outcome:
    """What becomes of a request."""
    found: Outcome = rank.notes["served"].loop.wait(request, seconds)
    return found


@_answering
def cancel(rank: Rank, request: str) -> None:
    """Give a request up."""
    rank.notes["served"].loop.ask(lambda engine: engine.cancel(request))


@_answering
def look(rank: Rank) -> tuple[int, bool, list[Sample]]:
    """Free blocks, whether anything is to be done, and what was counted."""
    found: tuple[int, bool, list[Sample]] = rank.notes["served"].loop.ask(
        lambda engine: (engine.pool.free, engine.busy, engine.statistics())
    )
    return found


@_answering
def ask_planner(rank: Rank, method: str, *given: Any) -> Any:
    """Call a method of the planner, whatever it has: for tests and operators."""
    planner = rank.notes["served"].planner
    return rank.notes["served"].loop.ask(lambda engine: getattr(planner, method)(*given))


@_answering
def close_engine(rank: Rank, deadline: float) -> None:
    """End the engine's life in order."""
    served: _Served | None = rank.notes.pop("served", None)
    if served is not None:
        served.loop.stop(deadline)
        served.ranks.each(close_rank, deadline)
        served.planner.close(deadline)
        served.rendezvous.close()
    for process in rank.notes.pop("processes", ()):
        process.close()


# -- this side


class ServedEngine:
    """An engine in processes of its own. One thread uses this side."""

    def __init__(self, plan: _Plan) -> None:
        self.name, self.shape, self.options = plan.connection.engine, plan.shape, plan.options
        self._numbers = itertools.count(1)
        self._process = RankProcess("")
        self._ranks: list[int] = []
        self._closed = False
        #: Several engines of a site open at once; who asks one of them something waits for it.
        self._opened = False
        self._process.start(open_engine, plan)

    def ready(self, seconds: float = _ANSWER) -> ServedEngine:
        """Wait until it has opened; the second call does nothing."""
        if not self._opened:
            self._ranks = _said(self._process.result(seconds))
            self._opened = True
        return self

    def submit(self, request: Request) -> Mapping[str, Any] | None:
        """Begin a request; `wait` says what became of it. A ticket if its blocks are promised already."""
        found: Mapping[str, Any] | None = self._ask(submit, request)
        return found

    def wait(self, request: str, seconds: float = 60.0) -> Outcome:
        """What became of a request."""
        found: Outcome = self._ask(wait, request, seconds, seconds=seconds)
        return found

    def generate(
        self,
        tokens: Sequence[int],
        count: int = 1,
        ticket: Mapping[str, Any] | None = None,
        *,
        hand_over: bool = False,
        salt: str = "",
        seconds: float = 60.0,
    ) -> Outcome:
        """Continue a prompt, and say how that went."""
        name = f"{self.name}-{next(self._numbers)}"
        self.submit(Request(name, tuple(tokens), count, ticket, salt, hand_over))
        return self.wait(name, seconds)

    def cancel(self, request: str) -> None:
        """Give a request up, or what is kept of it."""
        self._ask(cancel, request)

    def planner(self, method: str, *given: Any) -> Any:
        """Call a method of its planner: `drain`, `leases`, `force`, whatever its connector has."""
        return self._ask(ask_planner, method, *given)

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return int(self._ask(look)[0])

    @property
    def busy(self) -> bool:
        """Whether it has anything to do, or keeps anything."""
        return bool(self._ask(look)[1])

    def statistics(self) -> list[Sample]:
        """What its planner and its movers have counted."""
        return list(self._ask(look)[2])

    def rest(self, seconds: float = 60.0) -> None:
        """Wait until it has nothing to do, and keeps nothing."""
        until = time.monotonic() + seconds
        while self.busy:
            if time.monotonic() > until:
                true = f"It does, or keeps, something after {seconds:g} s."
                raise DeadlineExceeded(f"Engine {self.name} was to be idle.", true, "See `leases` of its planner.")
            time.sleep(_REST)

    def signal(self, number: int) -> None:
        """Send all its processes a signal, those of ranks first."""
        self.ready()
        for pid in self._ranks:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has ended with its engine
        self._process.signal(number)

    def close(self, deadline: float = 5.0) -> None:
        """End it, in whatever state it is; the second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._opened and self._process.at_rest:
                self._ask(close_engine, deadline, seconds=4 * deadline)
        except (RankFailed, TensorwayError):
            self.signal(signal.SIGKILL)  # one of its processes is gone, or stands still
        finally:
            self._process.close()

    def _ask(self, function: Callable[..., Any], *given: Any, seconds: float = _ANSWER) -> Any:
        self.ready()
        return _said(self._process.call(function, *given, seconds=seconds + _MARGIN))


class Site:
    """Where engines of one deployment meet: a rendezvous in this process, and a secret that only they know."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._rendezvous: Any = tensorway.create("rendezvous", "direct", {"secret": self._secret})
        self.engines: list[ServedEngine] = []

    def engine(
        self,
        name: str,
        shape: ModelShape | None = None,
        options: EngineOptions | None = None,
        *,
        connector: str = "handover",
        **connector_options: Any,
    ) -> ServedEngine:
        """Begin to open an engine; it hands over by the connector of this name, with these options."""
        given = {"secret": self._secret, **connector_options} if connector == "handover" else connector_options
        plan = _Plan(
            shape or ModelShape(), options or EngineOptions(), Connection(name, connector, given),
            self._rendezvous.address, self._secret,
        )  # fmt: skip
        self.engines.append(ServedEngine(plan))
        return self.engines[-1]

    def close(self) -> None:
        """End all its engines."""
        for one in self.engines:
            one.close()
        self._rendezvous.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
