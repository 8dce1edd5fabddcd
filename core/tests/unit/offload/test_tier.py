"""What a tier says and is made with."""

from __future__ import annotations

from typing import get_args

from tensorway.offload import OUTCOMES, Lender, OfTenant, Outcome, Tier, TierCapabilities, TierContext, tenant_of_salt
from tensorway.testing.offload_below import Shelves


def test_outcomes_can_be_walked():
    assert get_args(Outcome) == OUTCOMES
    assert len(set(OUTCOMES)) == len(OUTCOMES)


def test_who_declares_nothing_can_be_written_to_and_forgets():
    can = TierCapabilities()
    assert (can.persistent, can.shared, can.writable, can.deletes) == (False, False, True, True)


def test_a_tier_has_seven_calls():
    calls = {name for name, value in vars(Tier).items() if callable(value) and name[0] != "_"}
    assert {"probe", "contains", "put", "get", "delete", "stats", "close"} == calls
    assert {"lend", "returned"} == {name for name, value in vars(Lender).items() if callable(value) and name[0] != "_"}


def test_the_tier_of_the_kit_has_them_too():
    tier: Tier = Shelves([])
    assert 0 == tier.delete(OfTenant(tenant_of_salt("")), 1.0)


def test_contexts_share_nothing_that_can_change():
    one, other = (TierContext("e", b"f", (1,)) for _ in range(2))
    assert one.facts is not other.facts
    assert one.services is not other.services
    assert one == other
