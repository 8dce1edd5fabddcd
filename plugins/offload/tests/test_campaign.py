"""A slice of the campaign of random requests over tiers that misbehave."""

from __future__ import annotations

import random

import pytest

from tensorway_offload.testing import campaign


def test_random_requests_over_tiers_that_misbehave_get_no_wrong_byte_and_come_to_an_end():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    counts = campaign.campaign(seed, 30)
    assert counts["loaded in tiers"] and counts["stored in tiers"] and counts["fault hang"] + counts["late"], counts


def test_a_campaign_finds_a_wrong_byte(monkeypatch):
    right = campaign.FaultyTier._give

    def wrong(self, key, view):
        outcome = right(self, key, view)
        view[5:6] = b"\x00" if view[5] else b"\x01"
        return outcome

    monkeypatch.setattr(campaign.FaultyTier, "_give", wrong)
    with pytest.raises(AssertionError, match="wrong bytes"):
        campaign.campaign(1, 50)
