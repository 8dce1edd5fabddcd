"""A slice of `nox -s campaign -- kv-strangers`: whatever a member says, nobody who polls is hurt by it."""

from __future__ import annotations

import random
import sys

import pytest
from engines import TRANSPORTS

from tensorway_kv.testing.strangers import Strangers


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_whatever_a_member_says_is_refused_and_counted_or_heard(transport):
    seed = random.randrange(1 << 30)
    sys.stdout.write(f"seed {seed}\n")
    campaign = Strangers(seed, {"transport": transport})
    try:
        campaign.run(2_000)
    finally:
        campaign.close()
    assert campaign.counts["refused by the mover"] > 1_000 and campaign.counts["heard"] > 10, campaign.counts
