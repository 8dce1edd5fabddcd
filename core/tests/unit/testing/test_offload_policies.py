"""The suite of eviction policies: a correct one passes, and each way of being wrong is seen."""

from __future__ import annotations

import inspect
from collections import OrderedDict

import pytest

from tensorway.testing import EvictionPolicySuite
from tensorway.testing.offload_ground import Clock


class Recent:
    """Least recently used first; of one request the head counts as used last."""

    def __init__(self, context):
        self.capacity = context.capacity
        self.order = OrderedDict()

    def used(self, keys, req):
        for key in reversed(keys):
            if key in self.order:
                self.order.move_to_end(key)

    def wanted(self, keys, req):
        pass

    def stored(self, keys, req):
        for key in reversed(keys):
            self.order[key] = None

    def ended(self, keys, req):
        self.used(keys, req)

    def removed(self, keys):
        for key in keys:
            del self.order[key]

    def evicted(self, keys):
        self.removed(keys)

    def victims(self):
        return iter(list(self.order)) if len(self.order) < 100 else iter(self.order)

    def reset(self):
        self.order.clear()


class TestRecent(EvictionPolicySuite):
    in_steps = True

    def make(self, context):
        return Recent(context)


class EntersWhatIsWanted(Recent):
    def wanted(self, keys, req):
        self.order.update(dict.fromkeys(keys))


class KeepsWhatIsRemoved(Recent):
    def removed(self, keys):
        pass

    def evicted(self, keys):
        Recent.removed(self, keys)


class KeepsWhatIsEvicted(Recent):
    def evicted(self, keys):
        pass


class ForgetsWhatIsUsed(Recent):
    def used(self, keys, req):
        for key in keys:
            self.order.pop(key, None)


class Twice(Recent):
    def victims(self):
        yield from self.order
        yield from list(self.order)[:1]


class Stingy(Recent):
    """It never lets the last block go."""

    def victims(self):
        return iter(list(self.order)[:-1])


class TakesWhatItYields(Recent):
    def victims(self):
        while self.order:
            yield self.order.popitem(last=False)[0]

    def evicted(self, keys):
        pass


class TurnsWhatItYields(Recent):
    def victims(self):
        for key in list(self.order):
            self.order.move_to_end(key)
            yield key


class TailLast(Recent):
    def used(self, keys, req):
        Recent.used(self, keys[::-1], req)

    def stored(self, keys, req):
        Recent.stored(self, keys[::-1], req)


class AsStored(Recent):
    """It does not look at what a request had in all."""

    def ended(self, keys, req):
        pass


class BringsBackInEnded(Recent):
    def ended(self, keys, req):
        self.stored(keys, req)


class StopsAtThree(Recent):
    def victims(self):
        return iter(list(self.order)[:3])


class RaisesForNothing(Recent):
    def used(self, keys, req):
        assert keys[0]
        Recent.used(self, keys, req)


class ResetsHalf(Recent):
    def reset(self):
        for key in list(self.order)[::2]:
            del self.order[key]


class Learns(Recent):
    """It turns its order around once it has seen much, and a reset does not let it forget that."""

    seen = 0

    def ended(self, keys, req):
        Recent.ended(self, keys, req)
        self.seen += len(keys)

    def victims(self):
        return iter(list(self.order)[:: -1 if self.seen > 100 else 1])


class OneForAll(Recent):
    shared = OrderedDict()

    def __init__(self, context):
        self.order = self.shared
        self.shared.clear()


class Ghosts(Recent):
    def __init__(self, context):
        Recent.__init__(self, context)
        self.ghosts = {}

    def evicted(self, keys):
        Recent.evicted(self, keys)
        self.ghosts.update(dict.fromkeys(keys))


class RemembersWanted(Ghosts):
    def wanted(self, keys, req):
        self.ghosts.update(dict.fromkeys(keys))

    evicted = Recent.evicted


class GhostsOfRemoved(Ghosts):
    def removed(self, keys):
        Recent.removed(self, keys)
        self.ghosts.update(dict.fromkeys(keys))

    def evicted(self, keys):
        Recent.removed(self, keys)


class Sorts(Recent):
    def victims(self):
        return iter(sorted(self.order))


ALWAYS = "test_what_can_go_is_what_is_here_whatever_comes"
MEMORY = "test_memory_is_bounded_however_many_keys_come"
#: What is broken, a test that sees it, and what that says.
BREAKS = [
    (EntersWhatIsWanted, "test_what_was_wanted_and_never_stored_is_no_victim", "not here"),
    (EntersWhatIsWanted, ALWAYS, "not here"),
    (KeepsWhatIsRemoved, "test_what_was_removed_is_no_victim_and_may_come_back", "not here"),
    (KeepsWhatIsRemoved, ALWAYS, "not here"),
    (KeepsWhatIsEvicted, ALWAYS, "not here"),
    (ForgetsWhatIsUsed, ALWAYS, "can never go|KeyError"),
    (Twice, ALWAYS, "twice"),
    (Stingy, ALWAYS, "can never go"),
    (TakesWhatItYields, "test_looking_changes_nothing", "assert|can never go"),
    (TurnsWhatItYields, "test_looking_changes_nothing", "assert"),
    (TailLast, "test_a_tail_goes_before_its_head", "requests for the same blocks"),
    (AsStored, "test_what_is_stored_in_steps_goes_as_if_it_had_been_stored_at_once", "assert"),
    (BringsBackInEnded, "test_what_has_gone_before_its_request_ended_does_not_come_back", "not here"),
    (BringsBackInEnded, ALWAYS, "not here"),
    (StopsAtThree, "test_what_is_in_use_is_passed_over", "can never go|assert"),
    (RaisesForNothing, "test_nothing_changes_nothing", "index out of range"),
    (ResetsHalf, "test_who_was_reset_is_as_if_new", "not here"),
    (Learns, "test_who_was_reset_is_as_if_new", "assert"),
    (OneForAll, "test_two_policies_share_nothing", "not here"),
    (Ghosts, MEMORY, "it grows by .* ever stored"),
    (RemembersWanted, MEMORY, "it grows by .* ever only wanted"),
    (GhostsOfRemoved, MEMORY, "it grows by .* ever removed"),
    (Sorts, "test_a_call_costs_no_more_where_there_are_more_blocks", "us of 20,000"),
]


@pytest.mark.parametrize(("policy", "test", "says"), BREAKS)
def test_it_is_said(policy, test, says):
    suite = EvictionPolicySuite()
    suite.make, suite.in_steps = policy, True
    what = {Ghosts: "stored", RemembersWanted: "only wanted", GhostsOfRemoved: "removed"}.get(policy, "stored")
    given = {"clock": Clock(), "capacity": 7, "seed": 0, "what": what}
    function = getattr(suite, test)
    with pytest.raises((AssertionError, KeyError, IndexError, pytest.fail.Exception), match=says):
        function(**{name: given[name] for name in inspect.signature(function).parameters})


def test_every_test_of_the_suite_is_seen_to_fail():
    tests = {name for name in dir(EvictionPolicySuite) if name.startswith("test_")}
    assert tests - {test for _, test, _ in BREAKS} == {
        "test_no_test_of_the_suite_is_replaced_without_a_reason",
    }
