"""What a manager does with tiers below its own: it comes to an end, whatever is there and whatever they do.

Room `testing`; part of `offload_managers`.
"""

from __future__ import annotations

import time

import pytest

from tensorway.offload import ReqContext
from tensorway.testing.offload_below import Shelves
from tensorway.testing.offload_ground import chain
from tensorway.testing.offload_manager_ground import CAPACITY, ManagerGround, begun, stored


class PromotionTests(ManagerGround):
    """A manager over one tier; skipped where there is no way to give it one."""

    @pytest.mark.parametrize("count", [1, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY])
    def test_a_lookup_comes_to_an_end_however_much_is_below(self, count: int) -> None:
        """A request for more than there is room for, all of which a tier has: some of it can be loaded, soon.

        *If this fails:* promote no more for one request than fits beside what it has, and give up at a deadline.
        """
        keys = chain("below", count)
        for manager in self.over(Shelves(keys)):
            req = begun(manager, "r")
            ready = self.settled(manager, keys, req)
            assert 1 <= ready <= min(count, CAPACITY), f"{ready} of {count}"
            loading = manager.prepare_load(keys[:ready], req)
            assert loading is not None and ready == len(loading.source)
            manager.complete_load(loading.ticket)
            manager.ended(req)
            self.quiet(manager)

    def test_requests_that_want_more_than_there_is_room_for_all_come_to_an_end(self) -> None:
        """Three requests of six blocks each, in turn, with room for eight.

        *If this fails:* let what one request was promised not be evicted by the promotion of another.
        """
        stories = {name: chain(name, 6) for name in ("one", "two", "three")}
        for manager in self.over(Shelves([key for keys in stories.values() for key in keys])):
            waiting = {name: begun(manager, name) for name in stories}
            until = time.monotonic() + self.patience
            while waiting:
                assert time.monotonic() < until, f"{', '.join(waiting)} wait for ever"
                for name, req in list(waiting.items()):
                    found = manager.lookup_prefix(stories[name], req)
                    if not found.later:
                        loading = manager.prepare_load(stories[name][: found.ready], req)
                        assert loading is not None
                        manager.complete_load(loading.ticket)
                        manager.ended(waiting.pop(name))
                self.step(manager)
            self.quiet(manager)

    @pytest.mark.parametrize("fault", ["failed", "missing", "corrupt", "late", "raises", "short", "hangs"])
    def test_a_tier_that_fails_is_a_miss(self, fault: str) -> None:
        """It has the blocks, and does not give them: nothing is there, nothing is stuck, and all rows can be used.

        *If this fails:* take whatever a tier does wrong as a miss of that request; keep rows that it may write to.
        """
        keys = chain("below", 4)
        for manager in self.over(tier := Shelves(keys, fault)):
            req = begun(manager, "r")
            assert 0 == self.settled(manager, keys, req), "what was never read is there"
            assert manager.prepare_load(keys[:1], req) is None
            manager.ended(req)
            tier.release()
            self.quiet(manager)
            out = manager.prepare_store(chain("new", CAPACITY), begun(manager, "next"))
            assert out is not None, "rows are lost"
            manager.complete_store(out.ticket)

    def test_a_request_may_have_no_tiers(self) -> None:
        """An empty set of tiers: only what is in the primary one is there.

        *If this fails:* look at `ReqContext.tiers` before a tier is asked or written to.
        """
        keys = chain("below", 3)
        for manager in self.over(tier := Shelves(keys)):
            req = ReqContext("alone", tiers=frozenset())
            manager.begins(req)
            assert 0 == self.settled(manager, keys, req)
            out = stored(manager.prepare_store(chain("own", 3), req))
            manager.complete_store(out.ticket)
            self.quiet(manager)
            assert not set(chain("own", 3)) & tier.written

    def test_what_is_stored_goes_down_and_is_found_there_again(self) -> None:
        """Twice as much as there is room for; what was evicted comes back from the tier.

        *If this fails:* cascade in `complete_store`; ask tiers for what the primary one has not.
        """
        stories = [chain(f"story {number}", 4) for number in range(4)]
        for manager in self.over(tier := Shelves([])):
            for number, keys in enumerate(stories):
                req = begun(manager, f"r{number}")
                manager.complete_store(stored(manager.prepare_store(keys, req)).ticket)
                manager.ended(req)
                self.quiet(manager)
            assert {key for keys in stories for key in keys} == tier.written
            assert 4 == self.settled(manager, stories[0], begun(manager, "again"))
