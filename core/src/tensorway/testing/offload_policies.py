"""What every eviction policy must do: an order of exactly what is here, whatever comes, in bounded memory.

Room `testing`. Subclass `EvictionPolicySuite`, set `name` (and `options`), install your dist; or give `make`. The suite
plays the manager: it tells the policy what a manager would, in the order that `tensorway.offload.EvictionPolicy` says.
"""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar, Final

import pytest

import tensorway
from tensorway.offload import EvictionPolicy, Hint, OffloadKey, PolicyContext, ReqContext
from tensorway.testing.offload_ground import Clock, chain, request
from tensorway.testing.suite import Suite

#: Distinct keys of one round; after some rounds a policy that forgets must have stopped growing.
_ROUND: Final = 4_000
_MOST_ROUNDS: Final = 40
_BYTES_PER_KEY: Final = 8
_HINTS: Final = (Hint(), Hint("one", 0.0, -3), Hint("two", 1e12, 7), Hint("one", 30.0))


class Shelf:
    """A manager, as far as a policy hears of it: what is here, and requests that store and come back."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.held: dict[OffloadKey, None] = {}

    def order(self) -> list[OffloadKey]:
        """All that could go, checked: each key that is here, once, and no other."""
        order = list(self.policy.victims())
        assert len(order) == len(set(order)), "a key is there twice among the victims"
        strange = [key.hex() for key in order if key not in self.held]
        assert not strange, f"victims that are not here: {strange[:3]}"
        assert len(order) == len(self.held), f"{len(self.held) - len(order)} blocks can never go"
        return order

    def begin(self, keys: Sequence[OffloadKey], req: ReqContext, pinned: frozenset[OffloadKey] = frozenset()) -> None:
        """A request finds its leading blocks here, and stores the others, as many as there is room for."""
        found = next((at for at, key in enumerate(keys) if key not in self.held), len(keys))
        self.policy.used(keys[:found], req)
        missing = [key for key in keys[found:] if key not in self.held][: self.capacity]
        if not missing:
            return
        self.policy.wanted(missing, req)
        if self.make_room(len(missing), frozenset(keys) | pinned, req):
            self.policy.stored(missing, req)
            self.held.update(dict.fromkeys(missing))

    def end(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The request is over; some of its blocks may have gone."""
        self.policy.ended(keys, req)

    def ask(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """One whole request."""
        self.begin(keys, req)
        self.end(keys, req)

    def make_room(self, count: int, spared: frozenset[OffloadKey], req: ReqContext) -> bool:
        """Evict what the policy says, as many as are needed or none."""
        needed = len(self.held) + count - self.capacity
        if needed <= 0:
            return True
        passed: list[OffloadKey] = []
        taken: list[OffloadKey] = []
        for key in self.policy.victims():
            assert key in self.held, f"a victim that is not here: {key.hex()}"
            (passed if key in spared else taken).append(key)
            if len(taken) == needed:
                break
        if passed:
            self.policy.used(passed, req)
        if len(taken) < needed:
            return False
        self.policy.evicted(taken)
        for key in taken:
            del self.held[key]
        return True

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """These are gone for another reason."""
        self.policy.removed(keys)
        for key in keys:
            del self.held[key]


class EvictionPolicySuite(Suite):
    """The contract of `tensorway.offload.EvictionPolicy`."""

    #: The backend's name, as `tensorway.create("eviction_policy", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: A sequence that is stored in steps goes tail first, too; queues in the order of arrival cannot promise that.
    in_steps: ClassVar[bool] = False

    def make(self, context: PolicyContext) -> EvictionPolicy:
        """A new policy; override it for one that is not installed."""
        policy: Any = tensorway.create("eviction_policy", self.name, dict(self.options), context)
        assert policy is not None
        return policy  # type: ignore[no-any-return]

    @pytest.fixture
    def clock(self) -> Clock:
        """The policy's seconds."""
        return Clock()

    def shelf(self, clock: Clock, capacity: int) -> Shelf:
        """A policy that is used as a manager would."""
        return Shelf(self.make(PolicyContext(capacity, clock)), capacity)

    # -- the order

    @pytest.mark.parametrize("capacity", [1, 2, 7, 64])
    @pytest.mark.parametrize("seed", range(3))
    def test_what_can_go_is_what_is_here_whatever_comes(self, clock: Clock, capacity: int, seed: int) -> None:
        """Requests that share prefixes, overlap, are given up, come back; blocks that fail; time that leaps.

        *If this fails:* the message says which key: enter it in `stored`, and forget it in `evicted` and `removed`.
        """
        rng, shelf = random.Random(seed), self.shelf(clock, capacity)
        under_way: list[tuple[list[OffloadKey], ReqContext]] = []
        for number in range(150):
            clock.pass_time(rng.choice((0.0, 0.001, 1.0, 1e6)))
            story, shared = rng.randrange(6), rng.randrange(capacity + 3)
            keys = chain(f"story {story}", shared) + chain(f"{number} {story}", rng.randrange(capacity + 2), shared)
            req = ReqContext(f"r{number}", hint=rng.choice(_HINTS))
            pinned = frozenset(key for key in shelf.held if rng.random() < 0.2)
            shelf.begin(keys, req, pinned)
            under_way.append((keys, req))
            while under_way and rng.random() < 0.6:
                shelf.end(*under_way.pop(rng.randrange(len(under_way))))
            if rng.random() < 0.2:
                shelf.remove([key for key in shelf.held if rng.random() < 0.3])
            shelf.order()
        for each in under_way:
            shelf.end(*each)
        shelf.order()

    def test_looking_changes_nothing(self, clock: Clock) -> None:
        """Looked at in part, in whole, twice and by two at once, the order is the same: a refused store changes none.

        *If this fails:* yield from what is there; move and forget keys in `evicted` only.
        """
        shelf = self.shelf(clock, 24)
        for number in range(6):
            shelf.ask(chain("a", 2 + number) + chain(f"b{number}", 4), request(f"r{number}"))
        first = shelf.order()
        for count in (1, 5, len(first)):
            assert first[:count] == list(islice(shelf.policy.victims(), count))
        one, other = shelf.policy.victims(), shelf.policy.victims()
        assert [(key, key) for key in first] == list(zip(one, other, strict=True))
        assert first == shelf.order()

    def test_a_tail_goes_before_its_head(self, clock: Clock) -> None:
        """Of one sequence the last block goes first: without the head the others are worth nothing.

        *If this fails:* where blocks of one call are equal, let the later of its list go earlier.
        """
        for turns in (1, 2, 5):
            shelf, keys = self.shelf(clock, 16), chain("only", 9)
            for turn in range(turns):
                clock.pass_time(1.0)
                shelf.ask(keys, request(f"r{turn}"))
            assert keys[::-1] == shelf.order(), f"after {turns} requests for the same blocks"

    def test_what_is_stored_in_steps_goes_as_if_it_had_been_stored_at_once(self, clock: Clock) -> None:
        """A sequence grows while it is computed; its tail goes before its head nevertheless.

        *If this fails:* put a request's blocks in order in `ended`, which has all of them in the order of tokens.
        """
        if not self.in_steps:
            pytest.skip("it does not promise that: in_steps is False")
        shelf, keys, req = self.shelf(clock, 16), chain("only", 9), request("r")
        for stop in (2, 3, 7, 9):
            shelf.begin(keys[:stop], req)
        shelf.end(keys, req)
        assert keys[::-1] == shelf.order()

    # -- what comes and goes

    def test_what_was_removed_is_no_victim_and_may_come_back(self, clock: Clock) -> None:
        """Removed, stored again, evicted, stored again.

        *If this fails:* forget all that you know of a key's place when it goes, and enter it anew when it comes.
        """
        shelf, keys = self.shelf(clock, 8), chain("a", 8)
        shelf.ask(keys, request("r0"))
        shelf.remove(keys[2:5])
        shelf.order()
        shelf.ask(keys, request("r1"))
        shelf.order()
        for number in range(4):
            shelf.ask(chain(f"b{number}", 3), request(f"s{number}"))
            shelf.order()
            shelf.ask(keys, request(f"t{number}"))
            shelf.order()

    def test_what_was_wanted_and_never_stored_is_no_victim(self, clock: Clock) -> None:
        """A store that found no room, or failed.

        *If this fails:* enter keys in `stored`; `wanted` may only be remembered.
        """
        shelf = self.shelf(clock, 8)
        shelf.ask(chain("a", 4), request("r0"))
        shelf.policy.wanted(chain("b", 4), request("r1"))
        shelf.order()
        shelf.policy.ended(chain("b", 4), request("r1"))
        shelf.order()
        shelf.ask(chain("b", 4), request("r2"))
        shelf.order()

    def test_what_has_gone_before_its_request_ended_does_not_come_back(self, clock: Clock) -> None:
        """`ended` tells of all that a request had, and some of it may have been evicted or removed.

        *If this fails:* look up in `ended` whether a key is still here.
        """
        shelf, keys = self.shelf(clock, 6), chain("a", 6)
        shelf.begin(keys, request("r0"))
        shelf.remove(keys[4:])
        shelf.ask(chain("b", 4), request("r1"))
        shelf.end(keys, request("r0"))
        shelf.order()

    def test_what_is_in_use_is_passed_over(self, clock: Clock) -> None:
        """The manager proposes on: blocks in use do not keep others from going, and are still here afterwards.

        *If this fails:* do not stop at what was not taken, and do not take what was merely proposed for gone.
        """
        shelf, keys = self.shelf(clock, 12), chain("a", 12)
        shelf.ask(keys, request("r0"))
        pinned = frozenset(shelf.order()[:5])
        assert shelf.make_room(7, pinned, request("r1"))
        assert set(pinned) == set(shelf.order())

    def test_nothing_changes_nothing(self, clock: Clock) -> None:
        """Empty lists, before there is anything and afterwards.

        *If this fails:* leave early if there are no keys.
        """
        shelf, req = self.shelf(clock, 8), request("nothing")

        def nothing() -> list[OffloadKey]:
            policy = shelf.policy
            for call in (policy.used, policy.wanted, policy.stored, policy.ended):
                call([], req)
            policy.removed([])
            policy.evicted([])
            return shelf.order()

        assert [] == nothing()
        shelf.ask(chain("a", 6), request("r0"))
        first = shelf.order()
        assert first == nothing()

    def test_who_was_reset_is_as_if_new(self, clock: Clock) -> None:
        """Nothing is here, and what was learned counts no more: the same requests lead to the same order.

        *If this fails:* begin with everything again, also with ghosts, counts and adapted sizes.
        """

        def after(shelf: Shelf) -> list[OffloadKey]:
            for number in range(12):
                clock.pass_time(1.0)
                shelf.ask(chain(f"s{number % 5}", 3 + number % 4), request(f"r{number}"))
            return shelf.order()

        new, old = self.shelf(clock, 16), self.shelf(clock, 16)
        for number in range(40):
            clock.pass_time(0.5)
            old.ask(chain(f"s{number % 7}", 2 + number % 9), request(f"old{number}"))
        old.policy.reset()
        old.held.clear()
        assert [] == old.order()
        expected = after(new)
        assert expected == after(old)

    def test_two_policies_share_nothing(self, clock: Clock) -> None:
        """Each tier has one of its own.

        *If this fails:* keep state in the object, not in the module or the class.
        """
        one, other = self.shelf(clock, 8), self.shelf(clock, 8)
        one.ask(chain("a", 4), request("r"))
        assert [] == other.order()
        other.ask(chain("b", 3), request("r"))
        one.order()
        other.policy.reset()
        one.order()

    # -- what it costs

    @pytest.mark.parametrize("what", ["stored", "only wanted", "removed"])
    def test_memory_is_bounded_however_many_keys_come(self, clock: Clock, what: str) -> None:
        """Keys that never come again; it may remember some, and then stops growing.

        *If this fails:* bound ghosts, counts and what is kept of requests by the capacity.
        """
        shelf, grown = self.shelf(clock, 32), []
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for turn in range(_MOST_ROUNDS):
                for number in range(_ROUND // 8):
                    clock.pass_time(0.01)
                    self._once(shelf, chain(f"{turn} {number}", 8), request(f"{turn} {number}"), what)
                now = tracemalloc.get_traced_memory()[0]
                grown.append(now - before)
                before = now
                if turn and max(grown[-2:]) < _BYTES_PER_KEY * _ROUND:
                    return
        finally:
            tracemalloc.stop()
        pytest.fail(f"it grows by {grown[-1] // _ROUND} bytes for each key that was ever {what}")

    @staticmethod
    def _once(shelf: Shelf, keys: Sequence[OffloadKey], req: ReqContext, what: str) -> None:
        if what == "only wanted":
            shelf.policy.wanted(keys, req)
            shelf.end(keys, req)
            return
        shelf.ask(keys, req)
        if what == "removed":
            shelf.remove(keys)

    def test_a_call_costs_no_more_where_there_are_more_blocks(self, clock: Clock) -> None:
        """Eight victims of twenty thousand blocks cost what they cost of a thousand, by the median of CPU time.

        *If this fails:* keep the order as it changes, rather than sorting it when somebody asks.
        """
        small, large = (self._cost(clock, capacity) for capacity in (1_000, 20_000))
        assert large < 8 * small, f"{large * 1e6:.0f} us of 20,000 blocks, {small * 1e6:.0f} us of 1,000"

    def _cost(self, clock: Clock, capacity: int) -> float:
        shelf, took = self.shelf(clock, capacity), []
        for number in range(capacity // 8 + 100):
            keys, req = chain(f"{number}", 8), request(f"r{number}")
            begun = time.thread_time()
            shelf.ask(keys, req)
            if number >= capacity // 8:
                took.append(time.thread_time() - begun)
        return statistics.median(took)
