"""What every KV connector must do, proven with real processes: bytes, tickets, engines that end, nothing left.

Room `testing`. Subclass `ConnectorSuite`, set `name` (and `options`), install your dist. KV pages are in host memory.
What is declared is the gate: who looks blocks up by content is given hashes, who is not layer-wise must refuse layers.
"""

from __future__ import annotations

import time
from typing import Any, Final

import pytest

from tensorway.kv import Event
from tensorway.testing import connector_misuse as misuses
from tensorway.testing import connector_ranks as does
from tensorway.testing.connector_ends import ConnectorEnds
from tensorway.testing.connector_engines import World, prompt, until
from tensorway.testing.connector_ground import EQUAL, Pair
from tensorway.testing.connector_memory import Shape

#: Producer and consumer that look otherwise, and move the same tokens.
UNEQUAL: Final = {
    "2-to-1": (Shape(2), Shape(1)),
    "1-to-2": (Shape(1), Shape(2)),
    "3-to-2": (Shape(3), Shape(2)),
    "orders": (Shape(1, order="NHD"), Shape(1, order="HND")),
    "pages": (Shape(1, page_tokens=4), Shape(1, page_tokens=3)),
}
PLANNER: Final = (
    "lookup", "reserve", "finish", "plan_step", "on_results", "cancel", "busy", "reset", "events", "statistics",
    "close",
)  # fmt: skip
MOVER: Final = ("submit", "poll", "flush", "cancel", "statistics", "close")


class ConnectorSuite(ConnectorEnds):
    """The contract of `tensorway.kv.Planner` and `tensorway.kv.Mover`."""

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
        """Who is not `layerwise` has none of the four calls for layers, or raises `Unsupported`.

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
                assert isinstance(event, Event), event
                assert event.what in ("stored", "removed", "cleared"), event
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

    def test_a_layer_that_was_waited_for_is_here(self, pair: Pair) -> None:
        """`layerwise`: `before_layer` returns when the layer's bytes are here, layer by layer, and waits for no other.

        *If this fails:* count a layer as arrived when all its transfers are done, not when they were posted.
        """
        producer, consumer = pair
        if not consumer.capabilities.layerwise:
            pytest.skip("needs the capability layerwise")
        theirs, ours = self.prompts(pair, 1)
        retention = producer.compute(theirs, "kept")
        match = consumer.find(ours, "here", retention.ticket, 0, producer)
        consumer.reserve(ours, "here", retention.ticket, 0, match.tokens)
        process = consumer.movers[0]
        process.call(does.submit, consumer.decide())
        process.start(does.wait_layers, ours.blocks, 0, ours.tokens, ours.salt)
        until(lambda: process.answers, producer)
        assert [True] * EQUAL.layers == process.result()
        until(lambda: consumer.ended("here"), consumer, producer)
        assert ["here"] == consumer.received, consumer.results
        self.settled(consumer, ("here", ours))

    def test_layers_are_sent_as_they_are_computed(self, pair: Pair) -> None:
        """`layerwise` and `push`: what was promised is registered for, computed layer by layer, and received once.

        *If this fails:* send a layer in `after_layer`; say `received` when the last one and its words are there.
        """
        producer, consumer = pair
        if not (producer.capabilities.layerwise and producer.capabilities.push):
            pytest.skip("needs the capabilities layerwise and push")
        theirs, ours = self.prompts(pair, 1)
        view = producer.view(theirs, "kept", hand_over=True)
        ticket = producer.ask("promise", view, theirs.tokens)
        assert ticket is not None
        if consumer.look_up(ours, "here", ticket).mode == "nothing":
            pytest.skip("with these options its consumers take nothing that is pushed")
        match = consumer.find(ours, "here", ticket, 0, producer)
        consumer.reserve(ours, "here", ticket, 0, match.tokens)
        for _ in range(40):  # the consumer says where it wants them
            consumer.step()
            producer.step()
            time.sleep(0.01)
        producer.ask("computes", view, [list(theirs.blocks)], 0, theirs.tokens)
        producer.each(does.submit, producer.decide())
        producer.each(does.compute_layers, theirs.blocks, 0, theirs.tokens, theirs.salt)
        retention = producer.ask("finish", view, [list(theirs.blocks)], theirs.tokens)
        producer.kept["kept"] = theirs.blocks
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
