"""Facts that must fit: what differs is told whole, and both sides find the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import Incompatible
from tensorway.rendezvous.negotiation import Fact, agree, differences

values = st.one_of(st.none(), st.booleans(), st.integers(-4, 12), st.sampled_from(["a", "b", "1"]), st.just(1.0))
facts = st.dictionaries(
    st.sampled_from("abcd"), st.builds(Fact, values, st.sampled_from(["equal", "divide", "inform"])), max_size=4
)


@given(facts, facts)
def test_both_sides_find_the_same(mine, theirs):
    here, there = differences(mine, theirs), differences(theirs, mine)
    assert [(d.name, d.rule) for d in here] == [(d.name, d.rule) for d in there]


@given(facts)
def test_who_says_the_same_fits(same):
    assert differences(same, dict(same)) == []


@pytest.mark.parametrize(
    ("mine", "theirs", "fits"),
    [
        (Fact(4, "divide"), Fact(8, "divide"), True),
        (Fact(8, "divide"), Fact(4, "divide"), True),
        (Fact(4, "divide"), Fact(6, "divide"), False),
        (Fact(0, "divide"), Fact(6, "divide"), False),
        (Fact(-2, "divide"), Fact(6, "divide"), False),
        (Fact(True, "divide"), Fact(6, "divide"), False),
        (Fact("2", "divide"), Fact(6, "divide"), False),
        (Fact(4, "divide"), Fact(8, "equal"), False),  # the stricter rule counts
        (Fact(1), Fact(True), False),
        (Fact(1), Fact(1.0), False),
        (Fact(1), None, False),
        (Fact(1, "inform"), Fact(2, "inform"), True),
        (Fact(1, "inform"), None, True),
        (Fact(1, "inform"), Fact(2, "equal"), False),
    ],
)
def test_the_rules(mine, theirs, fits):
    others = {} if theirs is None else {"x": theirs}
    assert (differences({"x": mine}, others) == []) is fits


def test_a_refusal_names_every_fact_that_differs():
    mine = {"block_bytes": Fact(4096), "layers": Fact(32), "heads": Fact(8, "divide"), "same": Fact("x")}
    theirs = {"block_bytes": Fact(8192), "heads": Fact(3, "divide"), "same": Fact("x")}
    with pytest.raises(Incompatible) as caught:
        agree("decode-0", mine, theirs)
    text = str(caught.value)
    assert "Member decode-0" in text
    assert "3 facts do not fit" in text
    assert "block_bytes: 4096 here, 8192 there (must be equal)" in text
    assert "heads: 8 here, 3 there (one must divide the other)" in text
    assert "layers: 32 here, nothing there (must be equal)" in text
    assert "same" not in text
