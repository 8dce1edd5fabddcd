"""What the suite of KV connectors stands on: its fixtures, one whole hand-over, and what must hold after any.

Room `testing`; the tests are in `connectors` and `connector_ends`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import ClassVar, Final

import pytest

from tensorway.kv import CAUSES
from tensorway.testing import connector_ranks as does
from tensorway.testing.connector_engines import ConnectorEngine, Prompt, World, prompt, until
from tensorway.testing.connector_memory import Shape
from tensorway.testing.ranks import Ranks
from tensorway.testing.session_groups import lent
from tensorway.testing.suite import Suite

EQUAL: Final = Shape()

Pair = tuple[ConnectorEngine, ConnectorEngine]


class ConnectorGround(Suite):
    """What tests of a connector need."""

    #: The backend's name, as `tensorway.create("kv_connector", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: Engines of unequal tensor-parallel sizes, orders and pages must be able to hand over; else they may refuse.
    any_geometry: ClassVar[bool] = False
    #: For tests of the suite itself: see `connector_ranks.Opening.around`.
    around: ClassVar[str] = ""

    _ranks: ClassVar[Ranks | None] = None

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        """The options of one test; override it if engines share a folder rather than a rendezvous."""
        return dict(cls.options)

    @classmethod
    def teardown_class(cls) -> None:
        """End the processes that tests have shared."""
        ranks, cls._ranks = cls._ranks, None
        if ranks is not None:
            ranks.close()

    @pytest.fixture
    def world(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
        """Processes that all tests share, and engines of one test."""
        monkeypatch.setenv("TENSORWAY_SECRET", "a secret of the suite")
        owner = type(self)
        owner._ranks = owner._ranks or Ranks()
        with lent(owner._ranks) as ranks:
            made = World(ranks, self.name, self.options_in(tmp_path), self.around)
            try:
                yield made
            finally:
                made.close()

    @pytest.fixture
    def pair(self, world: World) -> Pair:
        """A producer and a consumer that look alike."""
        return world.engine("prefill", EQUAL), world.engine("decode", EQUAL)

    # -- helpers

    @staticmethod
    def prompts(pair: Pair, salt: int, turn: int = 0) -> tuple[Prompt, Prompt]:
        """A request as the producer has it, and as the consumer has it; by content, full blocks only can be had."""
        tokens = 20 if pair[0].capabilities.by_content else 19
        theirs, ours = (one.shape.page_tokens for one in pair)
        return prompt(salt, tokens, theirs, turn), prompt(salt, tokens, ours, turn + 1)

    def hand_over(self, pair: Pair, salt: int = 1, have: int = 0, turn: int = 0) -> Prompt:
        """All of it, until both sides are done; the request as the consumer has it."""
        producer, consumer = pair
        theirs, ours = self.prompts(pair, salt, turn)
        name, here = f"kept-{salt}", f"here-{salt}"
        retention = producer.compute(theirs, name)
        match = consumer.find(ours, here, retention.ticket, have, producer)
        assert ours.tokens - have == match.tokens, f"{match} of {ours.tokens} tokens, of which {have} are here"
        consumer.reserve(ours, here, retention.ticket, have, match.tokens)
        until(lambda: consumer.ended(here), consumer, producer)
        assert here in consumer.received, f"{here} failed: {consumer.results}"
        until(lambda: not retention.keep or name in producer.released, producer, consumer)
        return ours

    @staticmethod
    def quiet(engine: ConnectorEngine, seconds: float = 0.5) -> None:
        """Nothing is written to its pages from now on, whatever it says."""
        engine.each(does.wipe)
        last = time.monotonic() + seconds
        while time.monotonic() < last:
            engine.step()
        assert [] == engine.wrong([]), "pages were written to after their request had ended"

    @staticmethod
    def settled(engine: ConnectorEngine, *prompts: tuple[str, Prompt]) -> None:
        """What was received is right to the byte, what failed says why in words that are known, each once."""
        spans = [(one.blocks, 0, one.tokens, one.salt) for name, one in prompts if name in engine.received]
        beside = [block for name, one in prompts if name in engine.failed for block in one.blocks]
        assert [] == engine.wrong(spans, beside)
        assert [] == engine.account()
        for _, result in engine.results:
            assert not result.cause or result.cause in CAUSES, f"{result.cause!r} is no cause of the vocabulary"
            assert not result.cause or result.why, f"{result} does not say why"

    @staticmethod
    def kill(engine: ConnectorEngine) -> None:
        """End all its processes at once."""
        for process in (*engine.movers, engine.planner):
            process.signal(SIGKILL)
