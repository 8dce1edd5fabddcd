"""What the store of somebody else may hold: only what was written with the secret, under its own key, is believed."""

from __future__ import annotations

import attrs
import pytest

from tensorway import _logging
from tensorway.rendezvous.contract import Event, Record
from tensorway.rendezvous.rendezvous import Rendezvous

SECRET = "a secret of the tests"


class Shelf:
    """A store whose operator does what they like with it."""

    name, authenticates = "shelf", False
    abilities = frozenset({"watch"})

    def __init__(self):
        self.records, self.told = {}, []

    def put(self, key, value, lease, expected, seconds):
        self.records[key] = Record(key, value, 1, lease)
        return 1

    def get(self, key, seconds):
        return self.records.get(key)

    def list(self, prefix, seconds):
        return [record for key, record in sorted(self.records.items()) if key.startswith(prefix)]

    def changes(self, prefix, seconds):
        return self

    def next(self, seconds):
        told, self.told = self.told, []
        return told

    def close(self):
        pass


@pytest.fixture
def shelf():
    _logging.forget()
    return Shelf()


def moved(record):
    """Under the key of another member."""
    return attrs.evolve(record, key="/group/b")


def changed(record):
    return attrs.evolve(record, value=record.value[:-1] + b"!")


def cut(record):
    return attrs.evolve(record, value=record.value[:20])


def of_another(record):
    """Written by who knows another secret."""
    other = Shelf()
    Rendezvous(other, "another secret of tests").put(record.key, b"value")
    return other.records[record.key]


def unsealed(record):
    return attrs.evolve(record, value=b"value")


def empty(record):
    return attrs.evolve(record, value=b"")


@pytest.mark.parametrize("harm", [moved, changed, cut, of_another, unsealed, empty])
def test_a_record_is_passed_over_unless_it_was_written_with_the_secret_under_its_key(harm, shelf, caplog):
    with Rendezvous(shelf, SECRET) as rendezvous, rendezvous.watch("/group/") as watch:
        rendezvous.put("/group/a", b"value")
        true = shelf.records.pop("/group/a")
        assert SECRET.encode() not in true.value
        false = harm(true)
        shelf.records[false.key] = false
        shelf.told = [Event("put", false.key, false), Event("put", true.key, true)]
        assert rendezvous.get(false.key) is None and [] == rendezvous.list("/group/")
        assert [b"value"] == [event.record.value for event in watch.next(0.1)]
    assert [false.key] == [record.args[-1] for record in caplog.records]  # said once, and nothing of what it holds


def test_the_word_about_a_record_of_others_is_one_line_whatever_it_is_called(shelf, caplog):
    shelf.records["/group/a"] = Record("/group/\x1b[31m\nWARNING forged" + "x" * 9000, b"y" * 64, 1, "")
    with Rendezvous(shelf, SECRET) as rendezvous:
        assert rendezvous.get("/group/a") is None
    (line,) = caplog.text.splitlines()
    assert "\x1b" not in line and len(line) < 500
