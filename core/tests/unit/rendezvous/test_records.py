"""The table of `direct`: what the suite cannot see from outside, and its limits."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tensorway.errors import LeaseLost, RecordRefused
from tensorway.rendezvous import records as module
from tensorway.rendezvous.records import Records


@pytest.fixture
def events():
    return []


@pytest.fixture
def table(events):
    return Records(events.append)


def test_an_expired_lease_takes_its_records_along_and_says_so(table, events):
    lease = table.grant(2.0, now=100.0)
    table.put("/a", b"1", lease, None)
    table.put("/b", b"2", "", None)
    table.expire(101.9)
    assert table.keep(lease, 101.9)
    table.expire(103.8)
    assert table.get("/a") is not None
    table.expire(103.9)
    assert table.get("/a") is None
    assert table.get("/b") is not None
    assert [(event.kind, event.key) for event in events] == [("put", "/a"), ("put", "/b"), ("expired", "/a")]
    assert not table.keep(lease, 104.0)
    with pytest.raises(LeaseLost):
        table.put("/a", b"1", lease, None)


def test_a_record_that_is_put_under_another_lease_leaves_the_first(table):
    first, second = table.grant(1.0, 0.0), table.grant(10.0, 0.0)
    table.put("/a", b"1", first, None)
    table.put("/a", b"2", second, None)
    table.expire(5.0)
    assert table.get("/a").value == b"2"
    table.put("/a", b"3", "", None)
    table.revoke(second)
    assert table.get("/a").value == b"3"


@pytest.mark.parametrize(("limit", "value"), [("MAX_RECORDS", 2), ("MAX_BYTES", 10)])
def test_a_full_table_refuses_and_keeps_what_it_has(table, monkeypatch, limit, value):
    monkeypatch.setattr(module, limit, value)
    table.put("/a", b"12345", "", None)
    table.put("/b", b"12345", "", None)
    with pytest.raises(RecordRefused, match="as many as it takes"):
        table.put("/c", b"1", "", None)
    table.put("/a", b"54321", "", None)
    assert table.delete("/b", None)
    table.put("/c", b"1", "", None)


def test_there_are_only_so_many_leases(table, monkeypatch):
    monkeypatch.setattr(module, "MAX_LEASES", 1)
    table.grant(1.0, 0.0)
    with pytest.raises(RecordRefused):
        table.grant(1.0, 0.0)


class Model(RuleBasedStateMachine):
    """Against a dict: whatever the order of calls, the table holds what a dict would, and its sums are right."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.table = Records(self.events.append)
        self.model = {}
        self.leases = {}
        self.now = 0.0

    keys = st.sampled_from(["/a", "/a/b", "/c"])

    @rule(key=keys, value=st.binary(max_size=4), pick=st.integers(0, 3))
    def put(self, key, value, pick):
        lease = sorted(self.leases)[pick] if pick < len(self.leases) else ""
        self.table.put(key, value, lease, None)
        self.model[key] = (value, lease)

    @rule(key=keys)
    def delete(self, key):
        assert self.table.delete(key, None) is (self.model.pop(key, None) is not None)

    @rule(ttl=st.sampled_from([1.0, 3.0]))
    def grant(self, ttl):
        self.leases[self.table.grant(ttl, self.now)] = self.now + ttl

    @rule(seconds=st.sampled_from([0.5, 1.0]))
    def wait(self, seconds):
        self.now += seconds
        self.table.expire(self.now)
        ended = {name for name, until in self.leases.items() if until <= self.now}
        self.leases = {name: until for name, until in self.leases.items() if name not in ended}
        self.model = {key: row for key, row in self.model.items() if row[1] not in ended}

    @invariant()
    def same(self):
        assert {record.key: (record.value, record.lease) for record in self.table.list("/")} == self.model
        assert self.table._bytes == sum(len(value) for value, _ in self.model.values())
        held = {key for lease in self.table._leases.values() for key in lease.keys}
        assert held == {key for key, (_, lease) in self.model.items() if lease}


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
