"""What every manager of an offloading must do: seen when whole, kept while used, gone without trace, never stuck.

Room `testing`. Subclass `OffloadingManagerSuite`, set `name` (and `options`), install your dist; or give `make`. The
manager is one that admits what is offered and has no quotas; tests of what comes from tiers below need `make_over`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
import pytest

from tensorway.metrics import total
from tensorway.offload import (
    OffloadingManager,
    OffloadKey,
    PrefixLookup,
    ReqContext,
    Ticket,
)
from tensorway.testing.offload_ground import chain, refusal, request, together, unknown_values
from tensorway.testing.offload_ledger import Ledger
from tensorway.testing.offload_manager_ground import CAPACITY, HIT, MISS, Open, begun, here, put, stored, told
from tensorway.testing.offload_promotions import PromotionTests


class OffloadingManagerSuite(PromotionTests):
    """The contract of `tensorway.offload.OffloadingManager`."""

    # -- what is stored

    def test_a_block_is_seen_when_its_store_is_completed(self, manager: OffloadingManager) -> None:
        """Until then nobody loads it, and events are silent; then everybody finds it, and it can be loaded.

        *If this fails:* make blocks visible in `complete_store`, and tell of them there.
        """
        keys, req = chain("a", 3), begun(manager, "r")
        assert 0 == manager.lookup_prefix(keys, req).ready
        out = stored(manager.prepare_store(keys, req))
        assert keys == list(out.keys) and 3 == len(out.target) and [] == list(out.evicted)
        assert HIT not in manager.lookup_many(keys, req), "it can be had before it is there"
        assert 0 == manager.lookup_prefix(keys, req).ready
        assert manager.prepare_load(keys, req) is None
        assert [] == manager.take_events()
        manager.complete_store(out.ticket)
        assert [HIT] * 3 == manager.lookup_many(keys, begun(manager, "another"))
        assert PrefixLookup(3) == manager.lookup_prefix([*keys, *chain("b", 1)], req)
        loading = manager.prepare_load(keys, req)
        assert loading is not None and 3 == len(loading.source)
        manager.complete_load(loading.ticket)
        assert [("stored", keys)] == told(manager)

    def test_what_is_there_or_under_way_is_not_stored_again(self, manager: OffloadingManager) -> None:
        """Of two requests that offer the same, one stores it; what is left is in the order that was offered.

        *If this fails:* leave out of `keys` what is visible or reserved already.
        """
        keys = chain("a", 6)
        first = stored(manager.prepare_store(keys[:4:2], begun(manager, "one")))
        second = stored(manager.prepare_store(keys[:5], begun(manager, "two")))
        assert [keys[1], keys[3], keys[4]] == list(second.keys) and 3 == len(second.target)
        manager.complete_store(second.ticket)
        third = stored(manager.prepare_store(keys, begun(manager, "three")))
        assert keys[5:] == list(third.keys)
        for out in (first, third):
            manager.complete_store(out.ticket)
        assert [] == list(stored(manager.prepare_store(keys, begun(manager, "four"))).keys)
        assert [True] * 6 == here(manager, keys)

    def test_nothing_asked_is_nothing_done(self, manager: OffloadingManager) -> None:
        """Empty lists are answered, not refused: `None` says that there is no room.

        *If this fails:* return an output without keys; its ticket can be completed.
        """
        req = begun(manager, "r")
        assert [] == manager.lookup_many([], req) and PrefixLookup(0) == manager.lookup_prefix([], req)
        manager.touch([], req)
        out = stored(manager.prepare_store([], req))
        assert ([], 0, []) == (list(out.keys), len(out.target), list(out.evicted))
        manager.complete_store(out.ticket)
        loading = manager.prepare_load([], req)
        assert loading is not None and 0 == len(loading.source)
        manager.complete_load(loading.ticket)
        assert [] == told(manager) and not manager.busy()

    def test_a_key_counts_once(self, manager: OffloadingManager) -> None:
        """Twice in one list: one block, one place.

        *If this fails:* take duplicates out before you count what is needed.
        """
        keys, req = chain("a", CAPACITY), begun(manager, "r")
        out = stored(manager.prepare_store([*keys, *keys[::-1]], req))
        assert keys == list(out.keys) and CAPACITY == len(out.target)
        manager.complete_store(out.ticket)
        assert [("stored", keys)] == told(manager)
        assert [HIT] * (2 * CAPACITY) == manager.lookup_many([*keys, *keys], req)

    @pytest.mark.parametrize("capacity", [1, 2, CAPACITY])
    def test_what_does_not_fit_is_refused_and_nothing_has_changed(self, open_manager: Open, capacity: int) -> None:
        """More than there is room for; as much, while one block is in use: `None`, and all is as it was.

        *If this fails:* count what can be evicted before anything is; take victims from the policy only then.
        """
        ledger, req = Ledger(open_manager(capacity), capacity), request("r")
        old, new = chain("old", capacity), chain("new", capacity + 1)
        put(ledger, old, request("old"))
        assert ledger.prepare_store(new, req) is None
        ledger.prepare_load(old[:1], req)
        assert ledger.prepare_store(new[:capacity], req) is None
        ledger.compare_events()
        assert [True] * capacity == here(ledger.manager, old)
        ledger.settle([req])
        assert ledger.prepare_store(new[:capacity], req) is not None

    def test_what_is_offered_is_not_evicted_for_it(self, manager: OffloadingManager) -> None:
        """A long request offers what is there and what is not; what is there would be the first to go.

        *If this fails:* spare everything that is in the offered list, not only what is new of it.
        """
        ledger, keys, others = Ledger(manager, CAPACITY), chain("a", CAPACITY), chain("b", 4)
        put(ledger, keys[:4], request("old"))
        put(ledger, others, request("others"))
        out = ledger.prepare_store(keys, request("r"))
        assert out is not None and keys[4:] == list(out.keys) and set(others) == set(out.evicted)
        ledger.settle([request("r")])
        assert [True] * CAPACITY == here(manager, keys)

    def test_what_has_to_go_is_told_before_what_comes(self, manager: OffloadingManager) -> None:
        """Exactly as many as are needed; `removed` because it was `evicted`, then `stored`; each told once.

        *If this fails:* tell of evictions when they happen, in the order of what happens.
        """
        ledger = Ledger(manager, CAPACITY)
        put(ledger, chain("old", CAPACITY), request("old"))
        manager.take_events()
        out = stored(manager.prepare_store(chain("new", 3), begun(manager, "new")))
        assert 3 == len(set(out.evicted))
        (gone,) = manager.take_events()
        assert ("removed", set(out.evicted), "evicted") == (gone.what, set(gone.keys), gone.cause)
        manager.complete_store(out.ticket)
        assert [("stored", chain("new", 3))] == told(manager)
        assert [False] * 3 == here(manager, list(out.evicted))

    def test_what_failed_to_be_stored_was_never_there(self, manager: OffloadingManager) -> None:
        """Some of a store fails: who waited for it finds nothing, its place is free, and nothing is told of it.

        *If this fails:* in `complete_store` make visible what succeeded, and forget only what this ticket reserved.
        """
        ledger, keys, waiting = Ledger(manager, CAPACITY), chain("a", CAPACITY), request("waiting")
        put(ledger, keys[:2], request("old"))
        ledger.prepare_store(keys, request("r"))
        ledger.look_up(keys, waiting)
        ledger.complete(ledger.jobs[0], failed=[keys[3], keys[0], *chain("nobody", 1)])
        assert [HIT, HIT, HIT, MISS, HIT, HIT, HIT, HIT] == ledger.look_up(keys, waiting)
        ledger.compare_events()
        out = ledger.prepare_store([*keys, keys[3]], request("again"))
        assert out is not None and [keys[3]] == list(out.keys) and [] == list(out.evicted)

    def test_a_ticket_counts_once(self, manager: OffloadingManager) -> None:
        """Completed again, with failures or without, and one that nobody has: nothing changes.

        *If this fails:* forget a ticket when it is completed, and do nothing for one that is not known.
        """
        ledger, keys, req = Ledger(manager, CAPACITY), chain("a", 4), request("r")
        put(ledger, keys, req)
        out = ledger.prepare_store(chain("b", 2), req)
        assert out is not None
        strange = [attrs.evolve(out.ticket, number=out.ticket.number + 1000), Ticket(out.ticket.epoch + 1, 0)]
        for ticket in strange:
            manager.complete_store(ticket, chain("b", 2))
            manager.complete_load(ticket, keys)
        ledger.complete(ledger.jobs[0])
        manager.complete_store(out.ticket, list(out.keys))
        ledger.look_up([*keys, *out.keys], req)
        ledger.compare_events()
        assert ledger.prepare_load(keys, req) and ledger.prepare_load(keys, req)
        one, other = ledger.jobs
        ledger.complete(one)
        manager.complete_load(one.ticket, keys)
        ledger.look_up(keys, req)
        ledger.end(req)
        assert ledger.prepare_store(chain("c", CAPACITY - 3), request("c")) is None, "the other load holds four"
        ledger.complete(other)
        assert ledger.prepare_store(chain("c", CAPACITY - 3), request("c")) is not None

    # -- what is loaded

    def test_what_is_being_loaded_stays(self, manager: OffloadingManager) -> None:
        """Pinned once for each load, by whomever; when the last is completed it can go.

        *If this fails:* count loads of a block; evict it only at none.
        """
        ledger, keys = Ledger(manager, CAPACITY), chain("a", CAPACITY)
        put(ledger, keys, request("old"))
        for name in ("one", "two"):
            ledger.prepare_load(keys[:6], request(name))
            ledger.end(request(name))
        for _ in range(2):
            assert ledger.prepare_store(chain("new", 3), request("r")) is None
            ledger.complete(ledger.jobs[0])
        assert ledger.prepare_store(chain("new", 3), request("r")) is not None

    def test_what_was_found_stays_until_its_request_ends(self, manager: OffloadingManager) -> None:
        """Between a hit and its load others store; the block is there for the request still.

        *If this fails:* lease hits to the request that found them, and spare what is leased.
        """
        ledger, keys, req = Ledger(manager, CAPACITY), chain("a", CAPACITY), request("r")
        for ask in ("look_up", "lookup_prefix", "lookup_many", "lookup"):
            put(ledger, keys, request("old"))
            if ask == "look_up":
                ledger.look_up(keys, req)
            else:
                ledger.begin(req)
                _ask(manager, ask, keys, req)
            refused = manager.prepare_store(chain("new", 1), begun(manager, "greedy"))
            assert refused is None, f"what {ask} found was evicted"
            assert ledger.prepare_load(keys, req) is not None
            ledger.settle([req, request("greedy")])

    def test_a_lease_that_nobody_uses_ends_by_itself(self, manager: OffloadingManager) -> None:
        """A request that found blocks and never came back does not keep them for ever.

        *If this fails:* give each lease a deadline, and look at it when room is needed.
        """
        if not self.lease:
            pytest.skip("how long leases last is not said")
        ledger = Ledger(manager, CAPACITY)
        put(ledger, chain("a", CAPACITY), request("old"))
        ledger.look_up(chain("a", CAPACITY), request("gone"))
        self.pass_time(self.lease * 0.4)
        assert manager.prepare_store(chain("new", 1), begun(manager, "early")) is None
        self.pass_time(self.lease)
        manager.poll()
        assert manager.prepare_store(chain("new", 1), begun(manager, "late")) is not None
        lost = manager.prepare_load(chain("a", CAPACITY), request("gone"))
        assert lost is None, "it was evicted, and can be loaded"

    def test_what_is_not_there_pins_nothing(self, manager: OffloadingManager) -> None:
        """A load of which one block is missing or is being stored is refused as a whole.

        *If this fails:* look at all blocks before the first is pinned.
        """
        ledger, keys, req = Ledger(manager, CAPACITY), chain("a", CAPACITY - 1), request("r")
        put(ledger, keys, request("old"))
        assert ledger.prepare_load([*keys, *chain("nowhere", 1)], req) is None
        ledger.prepare_store(chain("under way", 1), request("other"))
        assert ledger.prepare_load([*keys, *chain("under way", 1)], req) is None
        ledger.end(req)
        assert ledger.prepare_store(chain("new", CAPACITY - 1), req) is not None, "something is pinned"

    def test_what_failed_to_be_loaded_is_forgotten(self, manager: OffloadingManager) -> None:
        """It is a miss for all from then on, and told of; another load of it goes on with its row, and ends well.

        *If this fails:* forget failed keys in `complete_load`; free a row when nobody loads from it any more.
        """
        ledger, keys = Ledger(manager, CAPACITY), chain("a", CAPACITY)
        put(ledger, keys, request("old"))
        for name in ("one", "two"):
            ledger.look_up(keys, request(name))
            ledger.prepare_load(keys, request(name))
        one, other = ledger.jobs
        ledger.complete(one, failed=keys[:3])
        assert [MISS] * 3 + [HIT] * 5 == ledger.look_up(keys, request("three"))
        ledger.compare_events()
        assert ledger.prepare_store(keys[:1], request("three")) is None, "a row that is being read was handed out"
        ledger.complete(other)
        assert ledger.prepare_store(keys[:3], request("three")) is not None
        ledger.settle([request(name) for name in ("one", "two", "three")])

    # -- who and when

    def test_a_request_that_has_ended_may_complete_what_it_prepared(self, manager: OffloadingManager) -> None:
        """Loads and stores end after their request; and nothing of the request is left.

        *If this fails:* keep what is under way by ticket, and leases by request.
        """
        ledger, req = Ledger(manager, CAPACITY), request("r")
        put(ledger, chain("a", 4), req)
        ledger.prepare_load(chain("a", 4), req)
        ledger.look_up(chain("a", 4), req)
        ledger.prepare_store(chain("b", 4), req)
        ledger.end(req)
        ledger.end(req)
        ledger.settle([])
        assert [True] * 8 == here(manager, [*chain("a", 4), *chain("b", 4)])
        assert ledger.prepare_store(chain("c", CAPACITY), request("next")) is not None
        assert not manager.busy() or ledger.jobs

    def test_tenants_find_their_own(self, manager: OffloadingManager) -> None:
        """Equal hashes under another salt are other blocks.

        *If this fails:* use the whole key; it has the tenant in it.
        """
        ledger = Ledger(manager, CAPACITY)
        put(ledger, chain("a", 3, salt="one"), request("r", "one"))
        assert [MISS] * 6 == ledger.look_up([*chain("a", 3), *chain("a", 3, salt="two")], request("s", "two"))
        put(ledger, chain("a", 3, salt="two"), request("t", "two"))
        assert [HIT] * 3 == ledger.look_up(chain("a", 3, salt="one"), request("u", "one"))

    def test_touching_what_is_not_there_does_not_matter(self, manager: OffloadingManager) -> None:
        """Unknown blocks, reserved ones, pinned ones.

        *If this fails:* tell the policy only of what it knows.
        """
        ledger, keys, req = Ledger(manager, CAPACITY), chain("a", 4), request("r")
        put(ledger, keys, req)
        ledger.prepare_store(chain("b", 2), req)
        ledger.prepare_load(keys[:1], req)
        manager.touch([*chain("nowhere", 3), *keys, *chain("b", 2), *keys], req)
        ledger.settle([req])
        assert ledger.prepare_store(chain("c", CAPACITY), request("next")) is not None

    def test_a_reset_forgets_everything_and_tickets_mean_nothing(self, manager: OffloadingManager) -> None:
        """All are misses; what was under way changes nothing any more, and its rows are free when it has ended.

        *If this fails:* count epochs in tickets; hand out no row that is copied to or from until its ticket came back.
        """
        ledger, req = Ledger(manager, CAPACITY), request("r")
        put(ledger, chain("a", 4), req)
        ledger.look_up(chain("a", 4), request("waiting"))
        ledger.prepare_load(chain("a", 2), req)
        ledger.prepare_store(chain("b", 3), req)
        ledger.reset()
        ledger.compare_events()
        assert [MISS] * 7 == ledger.look_up([*chain("a", 4), *chain("b", 3)], req)
        out = ledger.prepare_store(chain("c", 4), req)
        assert out is None, "a row that is copied to or from was handed out"
        put(ledger, chain("b", 3), request("new"))
        for job in [job for job in ledger.jobs if job.stale]:
            ledger.complete(job, failed=chain("b", 1))
        assert [HIT] * 3 == ledger.look_up(chain("b", 3), req), "a ticket of the life before counts"
        ledger.settle([req, request("waiting"), request("new")])
        assert ledger.prepare_store(chain("d", CAPACITY), req) is not None

    def test_what_is_said_of_it_is_true(self, manager: OffloadingManager) -> None:
        """Statistics are of the vocabulary, with its capacity and what it holds; it is not busy while nothing happens.

        *If this fails:* count with `tensorway.metrics.Counters` over `tensorway.offload.METRICS`.
        """
        ledger = Ledger(manager, CAPACITY)
        put(ledger, chain("a", 5), request("r"))
        ledger.look_up(chain("a", 6), request("s"))
        ledger.prepare_store(chain("b", 2), request("t"))
        samples = manager.statistics()
        assert [] == unknown_values(samples)
        assert CAPACITY == total(samples, "offload_capacity_blocks")
        assert 7 == total(samples, "offload_blocks")
        assert 5 == total(samples, "offload_stored_total")
        assert total(samples, "offload_lookups_total") >= 6
        ledger.settle([request("s"), request("t")])
        assert not manager.busy(), "it wants to be polled for ever"

    def test_who_is_closed_refuses(self, open_manager: Open) -> None:
        """Closed twice, while something is under way; afterwards calls raise `Closed`, and late tickets do no harm.

        *If this fails:* remember that it is closed; let `complete_load` and `complete_store` pass, or raise `Closed`.
        """
        manager, keys, req = open_manager(), chain("a", 3), request("r")
        ledger = Ledger(manager, CAPACITY)
        put(ledger, keys, req)
        ledger.prepare_load(keys, req)
        manager.close()
        manager.close(0.0)
        for call in (manager.lookup_many, manager.lookup_prefix, manager.prepare_load, manager.prepare_store):
            assert "Closed" == refusal(lambda call=call: call(keys, req)), call.__name__  # type: ignore[misc]
        assert refusal(lambda: manager.complete_load(ledger.jobs[0].ticket)) in ("", "Closed")

    # -- any order, many threads

    def test_any_order_of_calls_keeps_the_contract(self) -> None:
        """Hypothesis finds an order of calls in which the books do not agree, and makes it short.

        *If this fails:* the last lines are the calls; the message says what does not agree.
        """
        pytest.importorskip("hypothesis", reason='pip install "tensorway[testing]"')
        from tensorway.testing import offload_model

        seed = random.SystemRandom().randrange(1 << 32) if self.seed is None else self.seed
        offload_model.run(lambda: self.make(offload_model.CAPACITY), seed, self.runs, self.calls)

    def test_threads_share_it(self, manager: OffloadingManager) -> None:
        """Six look up, load and store the same blocks at once; at the end no row is lost, and events say what is here.

        *If this fails:* one lock for each call; calls are batches, so it costs nothing.
        """

        def work(number: int) -> None:
            rng = random.Random(number)
            for turn in range(60):
                req = begun(manager, f"{number} {turn}")
                keys = chain(f"story {rng.randrange(4)}", rng.randrange(1, 5))
                ready = manager.lookup_prefix(keys, req).ready
                loading = manager.prepare_load(keys[:ready], req)
                assert loading is not None, "what is leased cannot be loaded"
                storing = manager.prepare_store(keys, req)
                manager.complete_load(loading.ticket)
                if storing is not None:
                    manager.complete_store(storing.ticket, storing.keys[:1] if rng.random() < 0.2 else ())
                manager.ended(req)

        together(6, work)
        manager.poll()
        there: set[OffloadKey] = set()
        for event in manager.take_events():
            there = there | set(event.keys) if event.what == "stored" else there - set(event.keys)
        every = [key for story in range(4) for key in chain(f"story {story}", 5)]
        assert [key in there for key in every] == here(manager, every)
        assert CAPACITY == len(stored(manager.prepare_store(chain("at last", CAPACITY), begun(manager, "last"))).keys)


def _ask(manager: OffloadingManager, how: str, keys: Sequence[OffloadKey], req: ReqContext) -> None:
    if how == "lookup":
        for key in keys:
            assert manager.lookup(key, req) is HIT
    elif how == "lookup_prefix":
        assert len(keys) == manager.lookup_prefix(keys, req).ready
    else:
        assert [HIT] * len(keys) == manager.lookup_many(keys, req)
