"""The gate weighs gain against bytes, and says why."""

from __future__ import annotations

import logging

import pytest

from tensorway.errors import PlacementInvalid
from tensorway_eplb.gate import CODES, Gate


@pytest.mark.parametrize(
    ("question", "code"),
    [
        ({"rows": 9, "lost": 2, "work": 1, "seconds": 1e6}, "lost"),
        ({"rows": 0}, "unchanged"),
        ({"rows": 9, "after": 0.904}, "small-gain"),
        ({"rows": 9, "after": 0.8}, "small-gain"),
        ({"rows": 9}, "no-work"),
        ({"rows": 9, "work": 60}, "no-work"),
        ({"rows": 9, "seconds": 1}, "no-work"),
        ({"rows": 9, "work": 60, "seconds": 7}, "too-dear"),
        ({"rows": 9, "work": 60, "seconds": 5}, "worth-it"),
    ],
)
def test_every_code_has_its_case(question, code, caplog):
    gate = Gate()
    with caplog.at_level(logging.INFO, "tensorway.eplb"):
        decision = gate.decide(question.pop("before", 0.9), question.pop("after", 1.0), **question)
    assert (code, CODES[code]) == (decision.code, decision.rebalance)
    assert (1, 1) == (gate.counts[code], sum(gate.counts.values()))
    assert decision.reason in caplog.text


def test_the_gain_is_the_share_of_time_that_is_saved():
    decision = Gate().decide(0.8, 1.0, rows=1, work=100, seconds=10)
    assert (pytest.approx(0.2), pytest.approx(20), 10) == (decision.gain, decision.saved, decision.spent)
    assert "the balance goes from 0.8000 to 1.0000: 20 s of 100 s are saved, and moving takes 10 s" == decision.reason


def test_what_is_moved_while_serving_goes_on_costs_less():
    question = {"rows": 1, "work": 100, "seconds": 50}
    assert not Gate().decide(0.8, 1.0, **question).rebalance
    assert Gate(lost_while_moving=0.1).decide(0.8, 1.0, **question).rebalance


@pytest.mark.parametrize(
    "change", [{"before": 0.0}, {"after": float("nan")}, {"work": -1.0}, {"seconds": float("inf")}]
)
def test_what_nobody_can_have_measured_is_refused(change):
    with pytest.raises(PlacementInvalid):
        Gate().decide(**({"before": 0.9, "after": 1.0, "rows": 1} | change))
