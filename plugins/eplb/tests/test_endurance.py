"""A slice of the endurance campaign; `nox -s campaign -- eplb-endurance` runs a thousand rebalances."""

from __future__ import annotations

import os
import random
import sys

import pytest

from tensorway.testing.ranks import Ranks
from tensorway_eplb.testing import endurance
from tensorway_eplb.testing.engine import Model


@pytest.mark.parametrize("communicator", ["onesided", "gloo"])
def test_a_long_life_costs_nothing_that_stays(communicator):
    if communicator == "gloo":
        pytest.importorskip("torch", reason="needs torch: pip install torch")
        pytest.importorskip("tensorway_gloo", reason="needs the plugin: pip install tensorway-gloo")
    seed = random.randrange(1 << 30)
    sys.stdout.write(f"seed {seed}\n")
    options = {"transport": "local"} if communicator == "onesided" else {}
    living = endurance.Endurance(seed, 3, Model(layers=2, communicator=communicator, options=options))
    try:
        for _ in range(3):  # what is made once is made now
            living.rebalance()
            living.go_and_return()
        before = living.held()
        for _ in range(6):
            for _ in range(5):
                living.rebalance()
            living.go_and_return()
        assert [] == endurance.compare(before, living.held())
        assert living.idle() <= endurance.IDLE
    finally:
        living.close()


def leak(rank):
    rank.notes["leaked"] = [os.dup(0) for _ in range(8)]


def test_what_has_grown_is_told():
    with Ranks(1) as ranks:
        before = ranks.each([0], endurance.engine.resources)
        ranks[0].call(leak)
        grown = endurance.compare(before, ranks.each([0], endurance.engine.resources))
    had = before[0]["files"]
    assert f"a process has {had + 8} files, and the one with most had {had}" in grown
