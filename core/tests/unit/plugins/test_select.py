"""Selection is a pure function, and every loser gets a reason."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.plugins.select import AUTO, Candidate, Request, decide
from tensorway.types import Offer, ProbeResult

PASSED = ProbeResult.passed("it works")
REFUSED = ProbeResult.failed("no such device", "Plug it in.")


def offer(name: str, *, priority: int = 50, builds: bool = True, devices=("cpu",), capabilities=()) -> Offer:
    return Offer(
        name=name,
        kind="transport",
        summary="A test.",
        probe=lambda: PASSED,
        factory=(lambda options, context: object()) if builds else None,
        priority=priority,
        devices=devices,
        capabilities=capabilities,
    )


def candidate(name: str, dist: str = "d", probe: ProbeResult | None = PASSED, stopped: str = "", **facts) -> Candidate:
    return Candidate(name, dist, None if stopped else offer(name, **facts), None if stopped else probe, stopped)


def reasons(decision) -> dict[str, str]:
    return {loser.candidate.label: loser.reason for loser in decision.losers}


def test_auto_takes_the_highest_priority_that_is_usable():
    decision = decide(Request("transport"), [candidate("a", priority=10), candidate("b", priority=90)])
    assert "b" == decision.winner.name
    assert {"a@d": "priority 10; b has 90"} == reasons(decision)


def test_auto_passes_over_what_its_probe_refuses_and_says_why():
    decision = decide(Request("transport"), [candidate("a", priority=10), candidate("b", probe=REFUSED, priority=90)])
    assert "a" == decision.winner.name
    assert [("no such device", "Plug it in.")] == [(loser.reason, loser.remedy) for loser in decision.losers]


def test_a_name_never_falls_back():
    decision = decide(Request("transport", "b"), [candidate("a"), candidate("b", probe=REFUSED)])
    assert decision.winner is None
    assert {"a@d": "'b' was asked for by name", "b@d": "no such device"} == reasons(decision)


def test_a_tie_goes_to_the_lower_name_in_whatever_order_they_come():
    rows = [candidate("c"), candidate("a"), candidate("b")]
    winners = {decide(Request("transport"), order).winner.name for order in itertools.permutations(rows)}
    assert {"a"} == winners


def test_nothing_is_probed_but_the_one_that_would_win():
    rows = [candidate("a", probe=None, priority=10), candidate("b", probe=None, priority=90)]
    decision = decide(Request("transport"), rows)
    assert (None, "b") == (decision.winner, decision.ask_next.name)


def test_a_probe_that_is_not_needed_is_not_asked_for():
    rows = [candidate("a", probe=None, priority=10), candidate("b", priority=90)]
    decision = decide(Request("transport"), rows)
    assert ("b", None) == (decision.winner.name, decision.ask_next)


def test_two_dists_of_one_name_are_a_conflict_that_name_at_dist_resolves():
    rows = [candidate("nixl", "first"), candidate("nixl", "second")]
    for name in (AUTO, "nixl"):
        decision = decide(Request("transport", name), rows)
        assert decision.winner is None
        assert {"2 dists offer this name"} == set(reasons(decision).values())
        assert "Ask for one of: nixl@first, nixl@second." == decision.losers[0].remedy
    decision = decide(Request.parse("transport", "nixl@second"), rows)
    assert "second" == decision.winner.dist
    assert {"nixl@first": "it was asked for from second"} == reasons(decision)


def test_a_twin_that_is_stopped_is_no_conflict():
    rows = [candidate("nixl", "first", stopped="denied"), candidate("nixl", "second")]
    assert "second" == decide(Request("transport", "nixl"), rows).winner.dist


@pytest.mark.parametrize(
    ("facts", "request_", "reason"),
    [
        ({"builds": False}, Request("transport"), "it reports what is here and constructs nothing yet"),
        ({}, Request("transport", device="cuda"), "it serves cpu, not cuda"),
        ({}, Request("transport", needs=frozenset({"write", "cancel"})), "it lacks cancel, write"),
        ({"stopped": "its module is broken"}, Request("transport"), "its module is broken"),
    ],
)
def test_each_obstacle_has_its_reason(facts, request_, reason):
    decision = decide(request_, [candidate("a", **facts)])
    assert (None, {"a@d": reason}) == (decision.winner, reasons(decision))


def test_a_request_reads_like_a_sentence():
    request = Request.parse("transport", "nixl@acme", "cuda", frozenset({"write"}))
    assert "transport nixl@acme on cuda with write" == str(request)


@given(
    st.lists(
        st.builds(
            candidate,
            name=st.sampled_from("abc"),
            dist=st.sampled_from(["p", "q", "r"]),
            probe=st.sampled_from([None, PASSED, REFUSED]),
            stopped=st.sampled_from(["", "broken"]),
            priority=st.integers(0, 100),
            builds=st.booleans(),
        ),
        unique_by=lambda row: row.label,
        max_size=7,
    ),
    st.sampled_from([AUTO, "a", "b", "a@p"]),
)
def test_every_candidate_wins_loses_with_a_reason_or_is_asked_next(rows, name):
    decision = decide(Request.parse("transport", name), rows)
    chosen = [row for row in (decision.winner, decision.ask_next) if row is not None]
    assert len(chosen) <= 1
    assert sorted(row.label for row in rows) == sorted([*reasons(decision), *(row.label for row in chosen)])
    assert all(loser.reason for loser in decision.losers)
    if decision.winner is not None:
        assert decision.winner.probe is PASSED
        assert not decision.winner.stopped
