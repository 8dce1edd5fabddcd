"""A slice of the campaign; the long one is `python -m tensorway.testing.campaign 0 10000`."""

from __future__ import annotations

import random

import pytest

from tensorway.testing.campaign import RATES, campaign
from tensorway.testing.faults import POSTS, SENDS
from tensorway.testing.possessions import grown_since
from tensorway.testing.waiting import settled
from tensorway.transport import transfer


def test_transfers_over_a_faulty_fabric_keep_the_contract_seed_by_seed():
    campaign(range(1))
    grown = grown_since()
    first = random.SystemRandom().randrange(1 << 32)
    print(f"seeds from {first}")
    report = campaign(range(first, first + 30))
    assert [] == report.breaches
    assert 30 * 12 == report.done + sum(report.failed.values())
    assert {"TransferFailed", "DeadlineExceeded", "TransferCancelled"} <= set(report.failed)
    assert {*POSTS, *SENDS} - {"kill"} >= set(report.faults)
    assert 8 <= len(report.faults)
    assert [] == settled(grown)


def test_every_fault_has_a_rate():
    assert {*POSTS, *SENDS} == set(RATES)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("released", property(lambda self: not self.pending)),
        ("_finished", lambda self, job: True),
    ],
)
def test_a_transfer_that_breaks_the_contract_is_found_out(monkeypatch, name, broken):
    monkeypatch.setattr(transfer.Transfer, name, broken)
    assert [] != campaign(range(30)).breaches
