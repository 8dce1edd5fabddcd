"""Random lives of vLLM's scheduler with our connectors: `python -m tensorway_vllm.testing.lives --seed 1 --count 100`.

May import vllm in functions, and the core. A life is one or two engines without models (see `hollow`), to which
requests come, are given up, are preempted, and fail to load; caches are reset in between. At the end all of them must
have been answered as a model would have, but for those that were given up or that the policy says are to fail; and
nobody may hold a block. A life is made of its seed; what threads do in it is not, so a seed that fails may hold again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from tensorway_vllm.testing.faulty import FaultyFabrics
    from tensorway_vllm.testing.scheduling import Engine, Meeting, Pair

#: Events of one life, and steps after each.
_EVENTS: Final = 30
_STEPS: Final = 6
#: Seconds in which a life must have come to rest when nothing goes wrong any more.
_REST: Final = 60.0
#: Lives of which one line tells.
_TOLD: Final = 25
_FAULTS: Final = ("stall", "refuse", "partial", "late", "lose", "delay")
_JUNK: Final[tuple[Any, ...]] = (
    {},
    {"tensorway": {"seal": 1}},
    {"tensorway": [1]},
    {"hand_over": 3},
    {"tensorway": {"body": "{}"}},
)


@attrs.frozen
class Asked:
    """A request of a life."""

    engine: Engine
    name: str
    prompt: list[int]
    count: int


class Life:
    """What all lives have: prompts, some of which begin alike, and requests that are looked at when they end."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.engines: list[Engine] = []
        self.asked: list[Asked] = []
        self.happened: Counter[str] = Counter()
        #: Whether requests may end with an error.
        self.fails = False
        self._beginnings = [self._words(self.rng.choice((16, 32, 48, 70))) for _ in range(4)]

    def _words(self, count: int) -> list[int]:
        return [self.rng.randrange(4, 2000) for _ in range(count)]

    def prompt(self) -> list[int]:
        """A new one, one with a beginning that others have, or one that was asked before."""
        draw = self.rng.random()
        if draw < 0.45 and self.asked:
            return list(self.rng.choice(self.asked).prompt)
        if draw < 0.7:
            return self.rng.choice(self._beginnings) + self._words(self.rng.randrange(1, 80))
        return self._words(self.rng.choice((1, 15, 16, 17, 33, 64, 100, 140)))

    def ask(
        self, engine: Engine, prompt: Sequence[int], params: Mapping[str, Any] | None = None, most: int = 40
    ) -> str:
        """A request more."""
        count = self.rng.randrange(1, most)
        name = engine.add(prompt, count, params)
        self.asked.append(Asked(engine, name, list(prompt), count))
        return name

    def give_up(self) -> None:
        """A client is gone."""
        if self.asked:
            one = self.rng.choice(self.asked[-8:])
            one.engine.abort(one.name, computing=self.rng.random() < 0.5)

    def reset(self) -> None:
        """Somebody has changed the weights, or says so."""
        engine, running = self.rng.choice(self.engines), self.rng.random() < 0.5
        try:
            engine.scheduler.reset_prefix_cache(reset_running_requests=running, reset_connector=self.rng.random() < 0.5)
        except RuntimeError as error:  # vLLM's answer where requests hold pages that it does not preempt
            if not running or "Failed to reset KV cache" not in str(error):
                raise
            self.happened["reset refused"] += 1

    def events(self) -> dict[str, tuple[float, Callable[[], object]]]:
        """What may happen, and how often."""
        raise NotImplementedError

    def mend(self) -> None:
        """Nothing goes wrong any more."""

    def live(self) -> None:
        """From the first event until everybody rests; raises what should not be."""
        events = self.events()
        for _ in range(_EVENTS):
            [name] = self.rng.choices([*events], [often for often, _ in events.values()])
            self.happened[name] += 1
            events[name][1]()
            for _ in range(self.rng.randrange(_STEPS)):
                for engine in self.engines:
                    engine.step()
        self.mend()
        self.rest()
        self.look()

    def rest(self) -> None:
        """All that was asked is answered, and what is kept is let go."""
        from tensorway_vllm.testing.scheduling import settled

        settled(*self.engines, seconds=_REST)

    def look(self) -> None:
        """See what became of it."""
        from tensorway_vllm.testing.hollow import answer

        leaks = [engine.leaks() for engine in self.engines]
        assert not any(leaks), leaks
        for one in self.asked:
            said = one.engine.said[one.name]
            expected = answer(one.prompt, one.count)
            self.happened[said.reason or "nothing"] += 1
            self.happened["loaded"] += said.external > 0
            assert said.reason in ("length", "abort", *(["error"] if self.fails else [])), said
            assert said.tokens == expected[: len(said.tokens)], (one.name, said.tokens, expected)
            assert said.reason != "length" or len(said.tokens) == one.count

    def close(self) -> None:
        """End the engines."""
        for engine in reversed(self.engines):
            engine.close()


class HandoverLife(Life):
    """A pair that hands over, over a fabric that goes wrong."""

    def __init__(self, seed: int, models: Mapping[str, Path], meeting: Meeting, fabrics: FaultyFabrics) -> None:
        from tensorway_vllm.testing.scheduling import Pair

        super().__init__(seed)
        kind = self.rng.choice(("llama", "llama", "gemma2"))
        self.fails = self.rng.random() < 0.4
        self.pair: Pair = Pair(
            models[kind],
            meeting,
            fabrics=fabrics,
            policy="fail" if self.fails else "recompute",
            kind=kind,
            ranks=self.rng.choice((1, 1, 2)),
            pages=self.rng.choice((16, 24, 64)) * (2 if kind == "gemma2" else 1),
            async_scheduling=self.rng.random() < 0.5,
            max_num_batched_tokens=self.rng.choice((32, 128)),
            max_model_len=220,
            options={"lease": self.rng.choice((0.15, 0.5, 2.0)), "deadline": self.rng.choice((0.2, 1.0, 5.0))},
        )
        self.engines = [self.pair.prefill, self.pair.decode]
        self._tickets: list[tuple[list[int], str]] = []

    def events(self) -> dict[str, tuple[float, Callable[[], object]]]:
        """Of both engines and the fabric between them."""
        return {
            "prefill": (4, self._prefill),
            "decode": (4, self._decode),
            "plain": (1, lambda: self.ask(self.rng.choice(self.engines), self.prompt())),
            "junk": (0.5, lambda: self.ask(self.pair.decode, self.prompt(), self.rng.choice(_JUNK))),
            "give up": (1.5, self.give_up),
            "reset": (0.5, self.reset),
            "break": (1, self._break),
            "mend": (1, self.mend),
        }

    def _prefill(self) -> None:
        prompt = self.prompt()
        self._tickets.append((prompt, self.ask(self.pair.prefill, prompt, {"hand_over": True}, most=3)))

    def _decode(self) -> None:
        ready = [(prompt, self.pair.prefill.said[name].params) for prompt, name in self._tickets[-6:]]
        ready = [(prompt, params) for prompt, params in ready if params is not None]
        if ready:
            prompt, params = self.rng.choice(ready)
            other = self.rng.random() < 0.1  # a router that mixes up its requests
            self.ask(self.pair.decode, self.prompt() if other else prompt, params)

    def _fabrics(self) -> list[Any]:
        try:
            return [self.pair.fabric(rank) for rank in range(len(self.pair.decode.ranks))]
        except LookupError:  # it was not stepped yet
            return []

    def _break(self) -> None:
        for fabric in self._fabrics():
            if self.rng.random() < 0.7:
                fabric.faults.rates = {self.rng.choice(_FAULTS): self.rng.choice((0.3, 1.0))}

    def mend(self) -> None:
        """What stalls goes on."""
        for fabric in self._fabrics():
            fabric.faults.rates = {}
            fabric.release()


class OffloadLife(Life):
    """One engine whose blocks are offloaded, by workers that go wrong."""

    def __init__(self, seed: int, models: Mapping[str, Path], mischief: Mischief) -> None:
        from tensorway_vllm.testing.scheduling import Engine, offloads

        super().__init__(seed)
        kind = self.rng.choice(("llama", "llama", "gemma2"))
        self.fails, self._mischief = self.rng.random() < 0.4, mischief
        config = offloads(
            policy="fail" if self.fails else "recompute",
            capacity=self.rng.choice((4, 12, 200)),
            offload_prompt_only=self.rng.random() < 0.5,
            blocks_per_chunk=self.rng.choice((1, 1, 2)),
        )
        self.engine = Engine(
            models[kind],
            config,
            kind=kind,
            ranks=self.rng.choice((1, 1, 2)),
            pages=self.rng.choice((16, 24, 64)) * (2 if kind == "gemma2" else 1),
            async_scheduling=self.rng.random() < 0.5,
            max_num_batched_tokens=self.rng.choice((32, 128)),
            max_model_len=220,
        )
        self.engines = [self.engine]

    def events(self) -> dict[str, tuple[float, Callable[[], object]]]:
        """Of the engine and its workers."""
        return {
            "ask": (8, lambda: self.ask(self.engine, self.prompt())),
            "give up": (1.5, self.give_up),
            "reset": (1, self.reset),
            "forget": (3, self.engine.scheduler.reset_prefix_cache),
            "calm": (2, self._calm),
            "hold": (1, lambda: setattr(self._mischief, "held", True)),
            "break": (1, self._break),
            "mend": (2, self.mend),
        }

    def _calm(self) -> None:
        for _ in range(60):
            self.engine.step()

    def _break(self) -> None:
        self._mischief.loads, self._mischief.stores = self.rng.choice((0.0, 0.3, 1.0)), self.rng.choice((0.0, 0.3))

    def mend(self) -> None:
        """What is held ends."""
        self._mischief.held = False
        self._mischief.loads = self._mischief.stores = 0.0


@attrs.define
class Mischief:
    """What goes wrong in all CPU workers of this process."""

    rng: random.Random = attrs.field(factory=lambda: random.Random(1))
    #: No job is said to have ended.
    held: bool = False
    #: How likely it is that a job has no rows.
    loads: float = 0.0
    stores: float = 0.0

    @contextmanager
    def done(self) -> Iterator[Mischief]:
        """While it lasts."""
        from tensorway_cpu.common import CPULoadStoreSpec
        from tensorway_cpu.worker import CPUWorker

        load, store, poll = CPUWorker.load, CPUWorker.store, CPUWorker.poll

        def rows(spec: Any, likely: float) -> Any:
            return CPULoadStoreSpec.of([-1] * len(spec)) if self.rng.random() < likely else spec

        worker: Any = CPUWorker
        worker.load = lambda self_, job, source, target: load(self_, job, rows(source, self.loads), target)
        worker.store = lambda self_, job, source, target: store(self_, job, source, rows(target, self.stores))
        worker.poll = lambda self_: [] if self.held else poll(self_)
        try:
            yield self
        finally:
            worker.load, worker.store, worker.poll = load, store, poll


def campaign(seed: int, count: int, which: Sequence[str] = ("handover", "offload")) -> Counter[str]:
    """So many lives; what happened in them. The first that should not be is raised, with its seed."""
    from tensorway_vllm.testing.faulty import faulty
    from tensorway_vllm.testing.scheduling import Meeting
    from tensorway_vllm.testing.tiny import make

    happened: Counter[str] = Counter()
    meeting = Meeting()
    try:
        with tempfile.TemporaryDirectory() as folder, Mischief().done() as mischief:
            models = {kind: make(Path(folder) / kind, kind) for kind in ("llama", "gemma2")}
            for number in range(seed, seed + count):
                for kind in which:
                    life: Life = (
                        HandoverLife(number, models, meeting, faulty())
                        if kind == "handover"
                        else OffloadLife(number, models, mischief)
                    )
                    happened += one(life, kind)
    finally:
        meeting.close()
    return happened


def one(life: Life, kind: str) -> Counter[str]:
    """Live it; what happened."""
    try:
        life.live()
    except BaseException as error:
        raise AssertionError(f"life {life.seed} of {kind}: {type(error).__name__}: {error}") from error
    finally:
        life.mend()
        life.close()
    return Counter({"lives": 1}) + life.happened


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Random lives of vLLM's scheduler with Tensorway's connectors.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--which", choices=("handover", "offload"), default=None)
    given = parser.parse_args(arguments)
    kinds = (given.which,) if given.which else ("handover", "offload")
    for seed in range(given.seed, given.seed + given.count, _TOLD):
        count, began = min(_TOLD, given.seed + given.count - seed), time.monotonic()
        happened = campaign(seed, count, kinds)
        told = ", ".join(f"{what} {number}" for what, number in sorted(happened.items()))
        sys.stdout.write(f"seeds {seed} to {seed + count - 1}: {told}; {time.monotonic() - began:.1f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
