"""A slice of the endurance run; the long one is `python -m tensorway.testing.endurance local`."""

from __future__ import annotations

import attrs
import pytest

from tensorway.testing import endurance
from tensorway.testing.endurance import Count, Endurance
from tensorway.transport import local, sockets, transfer


def test_nothing_grows_over_many_transfers_and_connections():
    lines = []
    assert [] == Endurance("local", transfers=3000, connections=100, seed=1, say=lines.append).run()
    assert any(line.startswith("rounds of all at once: 10 of 10") for line in lines)


def test_what_grows_is_found(monkeypatch):
    kept = []
    end = transfer.Transfer._end

    def keep(self, state):
        kept.append(self)
        end(self, state)

    monkeypatch.setattr(transfer.Transfer, "_end", keep)
    monkeypatch.setattr(endurance, "_SETTLING", 0.1)
    breaches = Endurance("local", transfers=200, connections=10, seed=1).run()
    assert any(text.startswith("transfers: here had") and "objects" in text for text in breaches)


def test_a_connection_that_is_not_closed_is_found(monkeypatch):
    monkeypatch.setattr(local.LocalFabric, "disconnect", lambda self, link: kept.append(link))
    monkeypatch.setattr(endurance, "_SETTLING", 0.1)
    kept = []
    try:
        breaches = Endurance("local", transfers=10, connections=20, seed=1, kept_files=3).run()
    finally:
        for link in kept:
            sockets.close(link.channel)
    assert any(text.startswith("connections: here had") and "files" in text for text in breaches)
    assert any(text.startswith("connections: peer had") and "files" in text for text in breaches)


def test_wrong_bytes_are_found(monkeypatch):
    monkeypatch.setattr(local.LocalFabric, "_copy", lambda self, operation, link, mine, theirs: None)
    monkeypatch.setattr(local.LocalFabric, "_prove", lambda *arguments: None)
    breaches = Endurance("local", transfers=100, connections=1, seed=1).run()
    assert "transfer 100 brought wrong bytes" in breaches
    assert any("read other bytes than it had written" in text for text in breaches)


@pytest.mark.parametrize(("name", "more"), [("files", 6), ("threads", 7), ("objects", 14), ("entries", 14)])
def test_a_count_says_in_what_it_has_grown(name, more):
    count = Count(1000, 5, 5, 5, 5)
    assert [f"5 {name}, then {more}"] == count.grown(attrs.evolve(count, **{name: more}))
    assert [] == count.grown(attrs.evolve(count, **{name: 4}))


def test_a_little_memory_is_no_leak_and_much_is():
    count = Count(1000, 5, 5)
    assert [] == count.grown(attrs.evolve(count, kib=3000))
    assert ["1,000 KiB of memory, then 90,000"] == count.grown(attrs.evolve(count, kib=90_000))


def test_the_command_says_what_it_saw(capsys):
    assert 0 == endurance.main(["local", "--transfers", "20", "--connections", "10", "--seed", "5"])
    assert capsys.readouterr().out.endswith("nothing grew, every byte was right\n")
