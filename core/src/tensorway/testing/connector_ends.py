"""The second half of the suite of KV connectors: requests that are given up, engines that end, damage, what is left.

Room `testing`; see `connectors`.
"""

from __future__ import annotations

import time
from typing import Final

import pytest

from tensorway.kv import Retention
from tensorway.testing import connector_misuse as misuses
from tensorway.testing import connector_ranks as does
from tensorway.testing.connector_engines import ConnectorEngine, World, until
from tensorway.testing.connector_ground import EQUAL, ConnectorGround, Pair
from tensorway.testing.possessions import kept_growing
from tensorway.testing.ranks import RankFailed

#: For what waits for nobody; busy machines take long to do anything.
SOON: Final = 30.0


class ConnectorEnds(ConnectorGround):
    """What goes wrong, and what is left of it."""

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
        counts = []
        for salt in range(1, 26):
            self.hand_over(pair, salt)
            pair[1].each(does.wipe)
            if salt in (5, 12, 18, 25):
                counts.append([number for one in pair for count in one.each(does.possessions) for number in count])
        assert not kept_growing(counts), f"threads and files of all: {counts}"
        for engine in pair:
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
            processes = [process for one in pair for process in (one.planner, *one.movers)]
            counts.append([number for process in processes for number in process.call(does.possessions)])
            pair = (self._again(pair[0]), self._again(pair[1]))
        assert not kept_growing(counts[1:]), f"threads and files of all: {counts}"

    @staticmethod
    def _again(engine: ConnectorEngine) -> ConnectorEngine:
        return ConnectorEngine(engine.ranks, engine.indices, engine.opening).open()

    def test_who_is_closed_refuses(self, pair: Pair) -> None:
        """`submit` after `close` raises; a planner keeps nothing any more, or raises as well.

        *If this fails:* raise `Closed`; nobody would release what is kept from now on.
        """
        producer, _ = pair
        theirs, _ = self.prompts(pair, 1)
        producer.each(does.close_twice, "mover")
        with pytest.raises(RankFailed, match="Closed"):
            producer.each(does.submit, b"")
        producer.planner.call(does.close_twice, "planner")
        arguments = producer.view(theirs, "late", hand_over=True), [list(theirs.blocks)], theirs.tokens
        if producer.planner.call(does.raised, "planner", "finish", *arguments) != "Closed":
            assert not producer.ask("finish", *arguments).keep, "it will be kept for ever"
