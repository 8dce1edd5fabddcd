"""The kit's suites of offloading, over every backend of it that is installed and can be used here."""

from __future__ import annotations

import importlib.util
import time

import pytest

import tensorway
from tensorway.offload import PolicyContext
from tensorway.plugins.scan import scan
from tensorway.testing import EvictionPolicySuite, OffloadingManagerSuite, OffloadingWorkerSuite, TierSuite
from tensorway.testing.offload_ground import Clock

INSTALLED = {(row.kind, row.name) for row in scan().declarations}
POLICIES = sorted(name for kind, name in INSTALLED if kind == "eviction_policy")
#: They put the blocks of a request in order however these came.
IN_STEPS = {"arc", "foresight", "lru"}
#: Why a tier has no class here.
LEFT_OUT = {"peer": "it has what other engines have; its own tests make these"}


def needs(kind, name):
    """Skip where a backend is not installed, constructs nothing, or has no library."""
    here = (kind, name) in INSTALLED and tensorway.decide(kind, name).winner is not None
    return pytest.mark.skipif(not here, reason=f"the {kind} {name} cannot be used here")


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy(EvictionPolicySuite):
    """One class, parametrized: a policy that is installed and fails its suite fails here."""

    @pytest.fixture(autouse=True)
    def _which(self, policy: str) -> None:
        self.name, self.in_steps = policy, policy in IN_STEPS


@needs("offload_tier", "fs")
class TestFs(TierSuite):
    """As an operator has it, but for small segments."""

    name = "fs"

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder), "segment_bytes": 4 << 20}


@needs("offload_tier", "fs")
class TestFsInAFileEach(TierSuite):
    """The layout for others to read."""

    name = "fs"

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder), "layout": "files"}


@needs("offload_tier", "fs")
class TestFsThatIsSmall(TierSuite):
    """Twelve megabytes into eight."""

    name, too_many = "fs", 3000

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder), "segment_bytes": 1 << 20, "max_bytes": 8 << 20}


@needs("offload_tier", "object")
class TestObject(TierSuite):
    """A folder is a store as well."""

    name = "object"

    @classmethod
    def options_in(cls, folder):
        return {"url": f"file://{folder}/bucket"}


@needs("offloading", "cpu")
class TestCPUManager(OffloadingManagerSuite):
    """Rows of host memory, and no tier below."""

    name = "cpu"


@needs("offloading", "cpu")
class TestCPUWorker(OffloadingWorkerSuite):
    """Pages of host memory."""

    name = "cpu"


@pytest.mark.skipif(importlib.util.find_spec("tensorway_offload.below") is None, reason="needs tensorway-offload")
class TestManagerOverTiers(OffloadingManagerSuite):
    """The manager itself, with a clock of the test's, and over a tier that does as it is told."""

    lease = 10.0

    def make(self, capacity):
        self.clock = Clock()
        return self._manager(capacity, self.clock)

    def make_over(self, capacity, tier):
        from tensorway_offload.below import Below
        from tensorway_offload.limits import BelowOptions, NamedTier, TierLimits

        rows = [bytearray(64) for _ in range(capacity)]
        named = NamedTier("shelves", tier, TierLimits(lookup_seconds=30.0))
        below = Below([named], lambda _key, row: memoryview(rows[row]), BelowOptions(lookup_deadline=30.0))
        return self._manager(capacity, time.monotonic, below)

    def pass_time(self, seconds):
        self.clock.pass_time(seconds)

    @staticmethod
    def _manager(capacity, clock, lower=None):
        from tensorway_offload.manager import Manager
        from tensorway_offload.manager_options import ManagerOptions

        policy = tensorway.create("eviction_policy", "lru", {}, PolicyContext(capacity, clock))
        return Manager(
            medium="cpu",
            capacity=capacity,
            spec=tuple,
            policy=policy,
            options=ManagerOptions(),
            lower=lower,
            clock=clock,
        )


def test_every_tier_that_is_installed_is_here_or_is_left_out_for_a_reason():
    classes = {
        value.name
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, TierSuite) and value is not TierSuite
    }
    assert {name for kind, name in INSTALLED if kind == "offload_tier"} <= classes | set(LEFT_OUT)
