"""When landing memory is clear: who has answered, whose process is over, and who was only not heard of."""

from __future__ import annotations

import pytest

from tensorway.rendezvous.directory import SILENT
from tensorway_kv import messages
from tensorway_kv.landings import Landing
from tensorway_kv.orders import Await, Fetch, Want

WANT = Want("here", "prefill", "prefill.1", "theirs", 7, 5.0, 1.0)
HOURS = 3600.0


class Side:
    """A link, a reader and staging memory in one: what a landing asks of them."""

    def __init__(self):
        self.engine, self.incarnation, self.rank = "prefill", "prefill.1", 0
        self.bound = self
        self.reads, self.producers = self, (0, 2)
        self.hopeless, self.lost, self.broken = None, "", {}
        self.sent, self.watched, self.acknowledged = [], [], []
        self.copies = 0
        self.topology, self.ranks, self.groups = self, [self], []

    def hold(self, want):
        pass

    def need(self, seconds):
        pass

    def problem(self, now, until):
        return ("lost", self.lost) if self.lost else None

    def lost_rank(self, rank):
        return self.broken.get(rank, "")

    def gone(self, rank):
        return self.broken.get(rank, "") not in ("", *SILENT)

    def send(self, rank, payload):
        self.sent.append((rank, messages.Reader().decode(payload)))

    def watch(self, key, ranks, payload, longest, seconds):
        self.watched.append((set(ranks), type(messages.Reader().decode(payload)) if payload else None))

    def acknowledge(self, link, want, outcome):
        self.acknowledged.append(outcome)

    def copy_out(self, *arguments, states):
        self.copies += 1


@pytest.fixture
def side():
    return Side()


@pytest.fixture
def landing(side):
    made = Landing(Await(Fetch(WANT, 19, ((1,),), ((1,),), 0, 19), ((0,),)), side, side, side)
    assert [] == made.advance(made._begun, side)
    assert [0, 2] == [rank for rank, message in side.sent if isinstance(message, messages.PushRegistration)]
    return made


def told(results):
    return [(one.what, one.cause) for one in results]


def test_it_is_received_and_clear_when_all_have_answered_and_not_before(landing, side):
    for rank in (0, 0, 1):
        landing.heard(messages.Pushed("prefill.1", rank, "theirs", 7))
    assert ([], 0) == (landing.advance(landing._begun, side), side.copies)
    landing.heard(messages.Pushed("prefill.1", 2, "theirs", 7))
    assert [("received", ""), ("cleared", "")] == told(landing.advance(landing._begun, side))
    assert (1, ["received"], True) == (side.copies, side.acknowledged, landing.clear)


def test_what_is_given_up_fails_at_once_and_is_clear_when_the_last_has_answered(landing, side):
    landing.cancel()
    assert [("received", "cancelled")] == told(landing.advance(landing._begun, side))
    assert ({0, 2}, messages.Withdraw) == side.watched[-1]
    landing.heard(messages.Pushed("prefill.1", 2, "theirs", 7))
    assert [] == landing.advance(landing._begun + HOURS, side)
    landing.heard(messages.Refusal("prefill.1", 0, "theirs", 7, "withdrawn"))
    assert [("cleared", "")] == told(landing.advance(landing._begun + HOURS, side))
    assert (0, (set(), None)) == (side.copies, side.watched[-1])


@pytest.mark.parametrize("why", sorted(SILENT))
def test_who_was_only_not_heard_of_may_go_on_for_a_while(landing, side, why):
    side.lost = side.broken[0] = side.broken[2] = why
    begun = landing._begun
    assert [("received", "lost")] == told(landing.advance(begun, side))
    assert [] == landing.advance(begun + 599, side)
    assert [("cleared", "")] == told(landing.advance(begun + 601, side))


def test_who_has_ended_writes_no_more(landing, side):
    side.lost = side.broken[0] = "its process ended"
    assert [("received", "lost")] == told(landing.advance(landing._begun, side))
    assert [] == landing.advance(landing._begun + HOURS, side), "the other lives"
    side.broken[2] = "it said goodbye"
    assert [("cleared", "")] == told(landing.advance(landing._begun + HOURS, side))
