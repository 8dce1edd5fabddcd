"""The manager in the suite that every manager is held to, with both kinds of order and over real tiers."""

from __future__ import annotations

import time

from tensorway.offload import PolicyContext
from tensorway.testing import OffloadingManagerSuite
from tensorway_offload.below import Below
from tensorway_offload.limits import BelowOptions, NamedTier, TierLimits
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions
from tensorway_offload.policies.lru import Lru
from tensorway_offload.testing.lowers import Clock, Plain, Rows

BLOCK = 64


class TestByRows(OffloadingManagerSuite):
    """With the policy `lru`, whose order the manager has itself."""

    seed = 6
    lease = 10.0
    clock = Clock()

    def policy(self, capacity):
        return Lru(PolicyContext(capacity, self.clock))

    def make(self, capacity):
        return self._make(capacity, None, self.clock)

    def make_over(self, capacity, tier):
        memory = bytearray(BLOCK * capacity)
        named = NamedTier("below", tier, TierLimits(lookup_seconds=30.0))
        options = BelowOptions(lookup_deadline=30.0)
        below = Below([named], lambda key, row: memoryview(memory)[row * BLOCK : (row + 1) * BLOCK], options)
        return self._make(capacity, below, time.monotonic)

    def pass_time(self, seconds):
        self.clock.now += seconds

    def _make(self, capacity, lower, clock):
        return Manager(
            medium="cpu",
            capacity=capacity,
            spec=Rows,
            policy=self.policy(capacity),
            options=ManagerOptions(pending_seconds=2.0),
            lower=lower,
            clock=clock,
        )


class TestByKeys(TestByRows):
    """With any other policy, which is asked."""

    def policy(self, capacity):
        return Plain()
