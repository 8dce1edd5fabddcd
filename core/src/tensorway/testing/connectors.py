"""What every KV connector must do, proven with real processes: bytes, tickets, engines that end, nothing left.

Room `testing`. Subclass `ConnectorSuite`, set `name` (and `options`), install your dist. KV pages are in host memory.
What is declared is the gate: who looks blocks up by content is given hashes, who is not layer-wise must refuse layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any, ClassVar, Final

import pytest

from tensorway.kv import CAUSES, Event, Retention
from tensorway.testing import connector_misuse as misuses
from tensorway.testing import connector_ranks as does
from tensorway.testing.connector_engines import ConnectorEngine, Prompt, World, prompt, until
from tensorway.testing.connector_memory import Shape
from tensorway.testing.ranks import RankFailed, Ranks
from tensorway.testing.session_groups import lent
from tensorway.testing.suite import Suite

#: For what waits for nobody; busy machines take long to do anything.
SOON: Final = 30.0
EQUAL: Final = Shape()
#: Producer and consumer that look otherwise, and move the same tokens.
UNEQUAL: Final = {
    "2-to-1": (Shape(2), Shape(1)),
    "1-to-2": (Shape(1), Shape(2)),
    "3-to-2": (Shape(3), Shape(2)),
    "orders": (Shape(1, order="NHD"), Shape(1, order="HND")),
    "pages": (Shape(1, page_tokens=4), Shape(1, page_tokens=3)),
}
PLANNER: Final = (
    "lookup", "reserve", "finish", "plan_step", "on_results", "cancel", "busy", "reset", "events", "statistics", "close",
)  # fmt: skip
MOVER: Final = ("submit", "poll", "flush", "cancel", "statistics", "close")

Pair = tuple[ConnectorEngine, ConnectorEngine]


class ConnectorSuite(Suite):
    """The contract of `tensorway.kv.Planner` and `tensorway.kv.Mover`."""

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

    # -- what it is

    def test_the_host_constructs_both_sides_and_each_is_what_it_says(self, world: World) -> None:
        """By name, probed, options checked, everything from the context; with all calls, and capabilities that agree.

        *If this fails:* give both sides every method of their protocol; declare the same on both, but for `media`.
        """
        engine = world.engine("probed", EQUAL, probed=True)
        planner, mover = engine.capabilities, engine.mover_capabilities
        assert "cpu" in mover.media, "it has taken memory of the host, and does not say so"
        assert planner.pull or planner.push or planner.by_content, "it cannot do anything"
        for each in ("pull", "push", "layerwise", "bidirectional", "by_content"):
            assert getattr(planner, each) == getattr(mover, each), f"planner and mover differ in {each}"
        assert list(PLANNER) == engine.planner.call(does.methods, "planner", PLANNER)
        assert [list(MOVER)] == engine.each(does.methods, "mover", MOVER)

    def test_layers_are_refused_unless_they_are_declared(self, pair: Pair) -> None:
        """Who is not `layerwise` has no `promise`, `computes`, `before_layer` and `after_layer`, or raises `Unsupported`.

        *If this fails:* declare `layerwise`, or leave these methods out.
        """
        engine, _ = pair
        calls = {"planner": ("promise", "computes"), "mover": ("before_layer", "after_layer")}
        if engine.capabilities.layerwise:
            assert [*calls["planner"]] == engine.planner.call(does.methods, "planner", calls["planner"])
            assert [[*calls["mover"]]] == engine.each(does.methods, "mover", calls["mover"])
            return
        view = engine.view(self.prompts(pair, 1)[0], "layers", hand_over=True)
        for name, arguments in (("promise", (view, 4)), ("computes", (view, [[0]], 0, 4))):
            assert engine.planner.call(does.raised, "planner", name, *arguments) in ("AttributeError", "Unsupported")
        for name, given in (("before_layer", (0, 1.0)), ("after_layer", (0,))):
            assert {*engine.each(does.raised, "mover", name, *given)} <= {"AttributeError", "Unsupported"}

    # -- bytes

    def test_every_byte_arrives_and_no_other_is_written(self, pair: Pair) -> None:
        """Two requests in turn, in blocks in any order; their producer's blocks come back.

        *If this fails:* compare how a page is addressed: `base + block * stride`, in the order of the request's tokens.
        """
        prompts = [(f"here-{salt}", self.hand_over(pair, salt, turn=2 * (salt - 1))) for salt in (1, 2)]
        self.settled(pair[1], *prompts)

    @pytest.mark.parametrize("shapes", UNEQUAL.values(), ids=UNEQUAL)
    def test_engines_that_look_otherwise_move_every_byte_or_refuse(
        self, world: World, shapes: tuple[Shape, Shape]
    ) -> None:
        """Other tensor-parallel sizes, orders of tokens and heads, and pages: right bytes, or no bytes and a reason.

        *If this fails:* compare geometries before anything moves; if you declare `any_geometry`, intersect them.
        """
        producer, consumer = pair = (world.engine("prefill", shapes[0]), world.engine("decode", shapes[1]))
        if producer.capabilities.by_content and shapes[0].page_tokens != shapes[1].page_tokens:
            pytest.skip("hashes are of blocks, and these are of unequal ones")
        if self.any_geometry:
            self.settled(consumer, ("here-1", self.hand_over(pair)))
            return
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        for _ in range(20):
            producer.step()
            consumer.step()
        match = consumer.look_up(ours, "here", retention.ticket)
        if match.tokens:
            consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
            until(lambda: consumer.ended("here"), consumer, producer)
            causes = {result.cause for _, result in consumer.results if result.cause}
            assert "here" in consumer.received or causes & {"incompatible", "missing"}, consumer.results
        self.settled(consumer, ("here", ours))

    @pytest.mark.parametrize("have", [8, 16])
    def test_only_what_is_missing_is_written(self, pair: Pair, have: int) -> None:
        """With a prefix of its own, a consumer's first blocks stay as they were.

        *If this fails:* begin at token `have`, and count blocks of both sides from the request's first token.
        """
        ours = self.hand_over(pair, have=have)
        assert [] == pair[1].wrong([(ours.blocks, have, ours.tokens, ours.salt)])

    def test_who_lacks_nothing_says_so_and_nothing_moves(self, pair: Pair) -> None:
        """`reserve` with no tokens: the producer's blocks come back, long before its lease ends, and no page changes.

        *If this fails:* tell the producer that the blocks are not needed; do not wait for its lease.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        assert 0 == consumer.look_up(ours, "here", retention.ticket, ours.tokens).tokens
        consumer.reserve(ours, "here", retention.ticket, ours.tokens, 0)
        until(lambda: not retention.keep or "kept" in producer.released, producer, consumer)
        assert "here" not in consumer.failed
        assert [] == consumer.wrong([])
        assert not producer.counted("planner", "kv_leases_ended_total", cause="expired"), "its lease had to end for it"

    def test_several_at_once_are_told_apart(self, pair: Pair) -> None:
        """Three requests in one step, given to the consumer in another order; each ends once.

        *If this fails:* keep what is under way by request, and what is kept by request and lease.
        """
        producer, consumer = pair
        requests = {f"r{salt}": self.prompts(pair, salt, turn=salt) for salt in (1, 2, 3)}
        kept = {name: producer.compute(theirs, name) for name, (theirs, _) in requests.items()}
        for name in reversed(requests):
            ours = requests[name][1]
            match = consumer.find(ours, name, kept[name].ticket, 0, producer)
            consumer.reserve(ours, name, kept[name].ticket, 0, match.tokens)
            consumer.reserve(ours, name, kept[name].ticket, 0, match.tokens)  # again changes nothing
        until(lambda: all(map(consumer.ended, requests)), consumer, producer)
        until(lambda: all(one in producer.released for one in producer.kept), producer, consumer)
        for _ in range(5):
            consumer.step()
            producer.step()
        assert {} == consumer.failed and sorted(requests) == sorted(consumer.received)
        self.settled(consumer, *((name, ours) for name, (_, ours) in requests.items()))
        assert [] == producer.account()
        assert not producer.busy and not consumer.busy, "nothing is kept or fetched, and a planner is busy"

    # -- lookup and tickets

    def test_a_lookup_changes_nothing_and_may_be_asked_again(self, pair: Pair) -> None:
        """The same answer each time, no byte moves, nothing is said; and the request can still be had.

        *If this fails:* begin to fetch in `reserve`; until then only what can be looked up may be remembered.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        ticket = producer.compute(theirs, "kept").ticket
        first = consumer.find(ours, "here", ticket, 0, producer)
        for _ in range(5):
            assert first.tokens == consumer.look_up(ours, "here", ticket).tokens
            consumer.step()
        assert first.tokens - 8 == consumer.look_up(ours, "here", ticket, 8).tokens
        assert [] == consumer.wrong([]) and not consumer.ended("here")
        consumer.reserve(ours, "here", ticket, 0, first.tokens)
        until(lambda: consumer.ended("here"), consumer, producer)
        assert ["here"] == consumer.received
        self.settled(consumer, ("here", ours))

    def test_a_ticket_that_is_none_is_a_miss(self, pair: Pair) -> None:
        """No ticket, another connector's, damaged ones: found is nothing; reserved all the same, the request fails.

        *If this fails:* seal tickets, check everything in them, and let `lookup` answer `nothing` for what raises.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        producer.step()
        unknown = prompt(99, ours.tokens, consumer.shape.page_tokens, 3)  # by content, nobody has it
        bad = [None, *misuses.no_tickets(), *misuses.damaged(retention.ticket, seed=1)]
        for number, ticket in enumerate(bad):
            found = consumer.look_up(unknown, f"bad-{number}", ticket)
            assert found.tokens == 0, f"{found} by the ticket {str(ticket)[:200]}"
        consumer.reserve(unknown, "bad-1", bad[1], 4, unknown.tokens - 4)
        until(lambda: consumer.ended("bad-1"), consumer)
        assert {"bad-1": 4} == consumer.failed, "tokens that were here are good, and no other"
        assert [] == consumer.wrong([])
        good = consumer.find(ours, "here", retention.ticket, 0, producer)
        assert good.tokens == ours.tokens, "and afterwards the good ticket is not believed"

    def test_a_ticket_is_one_requests(self, pair: Pair) -> None:
        """Another request that comes with a ticket which is used, and its own engine, find nothing with it.

        *If this fails:* remember by whom a ticket was used; refuse those that this life of the engine has issued.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        if retention.ticket is None:
            pytest.skip("it issues no tickets")
        consumer.find(ours, "first", retention.ticket, 0, producer)
        if not consumer.capabilities.by_content:  # there the blocks are found without a ticket
            assert 0 == consumer.look_up(ours, "second", retention.ticket).tokens
            assert 0 == producer.look_up(theirs, "self", retention.ticket).tokens

    def test_hashes_find_blocks_only_if_that_is_declared(self, pair: Pair) -> None:
        """`by_content`: without a ticket, and only of the tenant whose salt it is; not declared: hashes find nothing.

        *If this fails:* look `RequestView.hashes` and `salt` up together; or do not declare `by_content`.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        producer.compute(theirs, "kept")
        view = ours.view("stranger", consumer.shape, by_content=True, hand_over=False)
        if not consumer.capabilities.by_content:
            assert 0 == consumer.ask("lookup", view, 0).tokens
            return
        found = consumer.find(ours, "here", None, 0, producer)
        assert ours.tokens == found.tokens
        salted = misuses.salted(view, "another tenant")
        assert 0 == misuses.settle(lambda: consumer.ask("lookup", salted, 0)).tokens, "another tenant's blocks"
        half = misuses.rehashed(view, 3)
        known = misuses.settle(lambda: consumer.ask("lookup", half, 0))
        assert 3 * consumer.shape.page_tokens == known.tokens, "blocks up to the first that is not known"

    # -- giving up

    @pytest.mark.parametrize("when", ["looked up", "reserved", "submitted"])
    def test_a_request_that_is_cancelled_ends_once(self, pair: Pair, when: str) -> None:
        """Whenever that is: it fails, or had arrived; then nothing is written, and the producer's blocks come back.

        *If this fails:* report the end when nothing writes to its pages any more; tell the producer, then, too.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        if when != "looked up":
            consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        if when == "submitted":
            consumer.each(does.submit, consumer.decide())
        consumer.ask("cancel", "here")
        consumer.ask("cancel", "nobody")
        if when != "looked up":
            until(lambda: consumer.ended("here"), consumer, producer)
        until(lambda: not retention.keep or "kept" in producer.released, producer, consumer)
        self.settled(consumer, ("here", ours))
        self.quiet(consumer)
        assert [] == consumer.account()

    def test_what_the_producer_takes_back_is_not_received_afterwards(self, pair: Pair) -> None:
        """Cancelled and used anew before they are read: the request fails, or its bytes are right all the same.

        *If this fails:* let readers see that a lease has ended, after they have read and before they say `received`.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        producer.ask("cancel", "kept")
        until(lambda: not retention.keep or "kept" in producer.released, producer)
        consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        until(lambda: consumer.ended("here"), consumer, producer)
        self.settled(consumer, ("here", ours))

    def test_an_engine_that_forgets_keeps_nothing(self, pair: Pair) -> None:
        """`reset`: what was kept is released, once; what is fetched afterwards fails or is right.

        *If this fails:* end all leases in `reset`, and drop what can be looked up: the weights are others.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        producer.step()
        producer.ask("reset")
        until(lambda: not retention.keep or "kept" in producer.released, producer)
        for _ in range(5):
            producer.step()
        assert [] == producer.account()
        match = consumer.look_up(ours, "here", retention.ticket)
        if match.tokens:
            consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
            until(lambda: consumer.ended("here"), consumer, producer)
        self.settled(consumer, ("here", ours))

    # -- engines that end

    @pytest.mark.parametrize("when", ["before it is reached", "while it is read"])
    def test_a_producer_that_is_killed_costs_its_request_only(self, world: World, when: str) -> None:
        """Its request ends in time with a cause, and nothing is written then; that of another engine arrives.

        *If this fails:* watch for the end of a peer, give every request a deadline, and report when pages are safe.
        """
        first, second, consumer = (world.engine(name, EQUAL) for name in ("prefill", "other", "decode"))
        lost, good = self.prompts((first, consumer), 1), self.prompts((second, consumer), 2, turn=2)
        tickets: list[Retention] = [first.compute(lost[0], "lost"), second.compute(good[0], "good")]
        found = consumer.find(lost[1], "lost", tickets[0].ticket, 0, first, second)
        if when.startswith("before"):
            self.kill(first)
        consumer.reserve(lost[1], "lost", tickets[0].ticket, 0, found.tokens)
        consumer.step()
        if not when.startswith("before"):
            self.kill(first)
        match = consumer.find(good[1], "good", tickets[1].ticket, 0, second)
        consumer.reserve(good[1], "good", tickets[1].ticket, 0, match.tokens)
        until(lambda: consumer.ended("good") and consumer.ended("lost"), consumer, second)
        assert "good" in consumer.received, consumer.results
        said = [result for _, result in consumer.results if result.request == "lost"]
        assert "lost" in consumer.received or any(result.cause for result in said), said
        self.settled(consumer, ("lost", lost[1]), ("good", good[1]))
        self.quiet(consumer)

    def test_a_consumer_that_is_killed_gives_blocks_back(self, pair: Pair) -> None:
        """Looked up and reserved by who is gone: the producer has them again after its lease, at the latest.

        *If this fails:* let a lease end unless a consumer that lives renews it.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        self.kill(consumer)
        until(lambda: not retention.keep or "kept" in producer.released, producer)
        until(lambda: not producer.busy, producer)
        assert [] == producer.account()

    # -- damage

    def test_a_plan_that_is_damaged_is_refused_and_the_next_one_is_not(self, pair: Pair) -> None:
        """Cut short, or something else: one of our errors from `submit`, no bytes, and then all goes on.

        *If this fails:* decode a plan with its type and raise `DescriptionInvalid`; never unpickle one.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        plan = consumer.decide()
        assert [[]] == consumer.each(does.submit_damaged, plan, 3)
        assert [] == consumer.wrong([])
        consumer.step(plan)
        until(lambda: consumer.ended("here"), consumer, producer)
        assert ["here"] == consumer.received
        self.settled(consumer, ("here", ours))

    def test_results_of_nobody_change_nothing(self, pair: Pair) -> None:
        """Of a request or a rank that is not there, of another time, with a proof that is none: no exception, no end.

        *If this fails:* look requests up in `on_results`, and count what nobody waits for.
        """
        producer, consumer = pair
        for engine in pair:
            for rank, result in misuses.results_of_nobody():
                engine.ask("on_results", rank, [result])
            engine.step()
            assert ([], [], {}) == (engine.released, engine.received, engine.failed)
        self.settled(consumer, ("here-1", self.hand_over((producer, consumer))))

    # -- what is seen of it

    def test_statistics_are_values_of_the_vocabulary(self, pair: Pair) -> None:
        """Known names with their labels, backend and engine beside them; and one request is counted once.

        *If this fails:* count with `tensorway.metrics.Counters(METRICS, backend=..., engine=...)`.
        """
        self.hand_over(pair)
        for engine in pair:
            assert [] == engine.planner.call(does.misnamed, "planner")
            assert [[]] == engine.each(does.misnamed, "mover")
        assert 1 == pair[1].counted("planner", "kv_requests_total", cause="none")

    def test_events_say_what_was_stored_before_it_is_removed(self, pair: Pair) -> None:
        """Values of `Event`, each once, with hashes that requests came with; many connectors have none.

        *If this fails:* say `stored` when blocks can be had, `removed` for no more than was stored, and then forget it.
        """
        producer, consumer = pair
        self.hand_over(pair)
        for engine in pair:
            stored: set[tuple[Any, ...]] = set()
            for event in engine.events:
                assert isinstance(event, Event) and event.what in ("stored", "removed", "cleared"), event
                assert all(isinstance(each, bytes) for each in event.hashes), event
                assert event.block_tokens == engine.shape.page_tokens or event.what != "stored", event
                keys = {(each, event.group, event.medium, event.salt, event.source) for each in event.hashes}
                if event.what == "removed":
                    assert keys <= stored, f"{event} was not stored"
                    stored -= keys
                else:
                    stored = stored | keys if event.what == "stored" else set()
        assert [] == list(consumer.ask("events")), "what was said is said again"
        assert [] == list(producer.ask("events"))

    # -- layers and turns

    def test_layers_arrive_before_they_are_waited_for_in_vain(self, pair: Pair) -> None:
        """`layerwise`: the consumer's wait for a layer ends when its bytes are there, and then the request is received.

        *If this fails:* send a layer in `after_layer`; let `before_layer` return when its bytes are here, not posted.
        """
        producer, consumer = pair
        if not producer.capabilities.layerwise:
            pytest.skip("needs the capability layerwise")
        theirs, ours = self.prompts(pair, 1)
        view = producer.view(theirs, "kept", hand_over=True)
        ticket = producer.ask("promise", view, theirs.tokens)
        assert ticket is not None
        match = consumer.find(ours, "here", ticket, 0, producer)
        consumer.reserve(ours, "here", ticket, 0, match.tokens)
        for _ in range(10):
            consumer.step()
            producer.step()
        producer.ask("computes", view, [list(theirs.blocks)], 0, theirs.tokens)
        producer.each(does.submit, producer.decide())
        process, span = consumer.movers[0], (ours.blocks, 0, ours.tokens, ours.salt)
        for layer in range(EQUAL.layers):
            process.start(does.wait_layer, layer, *span)
        producer.each(does.compute_layers, theirs.blocks, 0, theirs.tokens, theirs.salt)
        retention = producer.ask("finish", view, [list(theirs.blocks)], theirs.tokens)
        producer.kept["kept"] = theirs.blocks
        for _ in range(20):
            producer.step()
        assert [True] * EQUAL.layers == [process.result() for _ in range(EQUAL.layers)]
        until(lambda: consumer.ended("here"), consumer, producer)
        assert ["here"] == consumer.received, consumer.results
        until(lambda: not retention.keep or "kept" in producer.released, producer, consumer)
        self.settled(consumer, ("here", ours))

    def test_the_second_turn_reads_back_what_the_first_has_handed_over(self, pair: Pair) -> None:
        """`bidirectional`: who was the consumer keeps blocks, and who was the producer fetches them.

        *If this fails:* let every engine be both; a life of an engine has one connection, in whichever direction.
        """
        producer, consumer = pair
        if not producer.capabilities.bidirectional:
            pytest.skip("needs the capability bidirectional")
        self.hand_over((producer, consumer), salt=1)
        producer.each(does.wipe)
        self.settled(producer, ("here-2", self.hand_over((consumer, producer), salt=2, turn=1)))

    # -- ends

    def test_closed_twice_while_a_request_is_under_way(self, pair: Pair) -> None:
        """Each side, in time, and again; then no page is written to, and the other engine goes on.

        *If this fails:* end everything in `close` within its deadline, and remember that it is done.
        """
        producer, consumer = pair
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        consumer.each(does.submit, consumer.decide())
        assert max(consumer.each(does.close_twice, "mover")) < SOON
        assert consumer.planner.call(does.close_twice, "planner") < SOON
        consumer.each(does.wipe)
        time.sleep(0.5)
        assert [] == consumer.wrong([]), "pages were written to after the mover was closed"
        until(lambda: not retention.keep or "kept" in producer.released, producer)

    def test_flush_returns_when_nothing_is_under_way(self, pair: Pair) -> None:
        """It waits for pages that are still written to, and there are none.

        *If this fails:* return at once if no request that failed has pages which are not safe.
        """
        self.hand_over(pair)
        assert max(time_ for engine in pair for time_ in engine.each(does.flush, SOON)) < SOON

    def test_nothing_is_left_of_requests(self, pair: Pair) -> None:
        """No thread and no file of twenty hand-overs, and no planner is busy.

        *If this fails:* drop what belongs to a request when its end is told.
        """
        before: list[Any] = []
        for salt in range(1, 26):
            self.hand_over(pair, salt)
            pair[1].each(does.wipe)
            if salt == 5:
                before = [one.each(does.possessions) for one in pair]
        for engine, was in zip(pair, before, strict=True):
            for now, then in zip(engine.each(does.possessions), was, strict=True):
                assert now[0] <= then[0] and now[1] <= then[1], f"threads and files: {then}, then {now}"
            until(lambda engine=engine: not engine.busy, *pair)  # type: ignore[misc]

    def test_nothing_is_left_of_engines(self, world: World) -> None:
        """No thread and no file of engines that were opened, used and closed; and a name may be used again.

        *If this fails:* end threads and close connections in `close`; a destructor may never run.
        """
        pair = (world.engine("prefill", EQUAL), world.engine("decode", EQUAL))
        counts = []
        for salt in range(1, 5):
            self.hand_over(pair, salt)
            for engine in pair:
                engine.close()
            counts.append([process.call(does.possessions) for one in pair for process in (one.planner, *one.movers)])
            pair = (self._again(pair[0]), self._again(pair[1]))
        for was, now in zip(counts[1], counts[-1], strict=True):
            assert now[0] <= was[0] and now[1] <= was[1], f"threads and files: {counts}"

    @staticmethod
    def _again(engine: ConnectorEngine) -> ConnectorEngine:
        return ConnectorEngine(engine.ranks, engine.indices, engine.opening).open()

    def test_who_is_closed_refuses(self, pair: Pair) -> None:
        """`submit` after `close` raises; a planner keeps nothing any more.

        *If this fails:* raise `Closed`, and answer `finish` with `Retention(False)`.
        """
        producer, _ = pair
        theirs, _ = self.prompts(pair, 1)
        producer.each(does.close_twice, "mover")
        with pytest.raises(RankFailed, match="Closed"):
            producer.each(does.submit, b"")
        producer.planner.call(does.close_twice, "planner")
        assert not producer.compute(theirs, "late").keep
