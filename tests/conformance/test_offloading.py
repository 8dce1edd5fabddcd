"""The kit's suites of offloading, over every backend of it that is installed and can be used here."""

from __future__ import annotations

import pytest

import tensorway
from tensorway.plugins.scan import scan
from tensorway.testing import EvictionPolicySuite, OffloadingManagerSuite, OffloadingWorkerSuite, TierSuite

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


def test_every_tier_that_is_installed_is_here_or_is_left_out_for_a_reason():
    classes = {
        value.name
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, TierSuite) and value is not TierSuite
    }
    assert {name for kind, name in INSTALLED if kind == "offload_tier"} <= classes | set(LEFT_OUT)
