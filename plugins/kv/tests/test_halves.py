"""The two halves of a planner without an engine: what is kept for whom, and what is wanted for how long."""

from __future__ import annotations

import time

import pytest

from tensorway.kv import METRICS, RequestView, Result
from tensorway.metrics import Counters
from tensorway_kv import messages, tickets
from tensorway_kv.board import verdict
from tensorway_kv.keeping import Keeping
from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry
from tensorway_kv.life import Life
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Refuse
from tensorway_kv.staging import Pool
from tensorway_kv.wanting import Wanting

SECRET = "a secret of the tests"
LEASE = 0.5
TOKENS = 19
BLOCKS = ((1, 2, 3, 4, 5),)


def life(name="decode", **options):
    caches = [Cache((0, 1), attention(2, 8), 4)]
    geometry = rank_geometry(caches, Parallel(1), 0, blocks=64, base=lambda name, nbytes: 1 << 20)
    chosen = HandoverOptions(secret=SECRET, **{"staging_blocks": 8, "lease": LEASE, **options})
    counts = Counters(METRICS, backend="handover", engine=name)
    return Life(name, f"{name}.1", 1, geometry, chosen, SECRET, counts, Pool([chosen.staging_blocks]))


def ticket(request="theirs", **fields):
    now = time.time()
    made = {"tokens": TOKENS, "blocks": BLOCKS, "epoch": 7, **fields}
    body = tickets.Ticket(
        engine="prefill", incarnation="prefill.1", group="/kv", request=request, issued=now, expires=now + LEASE, **made
    )
    return tickets.issue(body, SECRET)


def view(request="here", **fields):
    return RequestView(request, TOKENS, ticket(request, **fields))


# -- what is wanted


@pytest.mark.parametrize(("have", "found"), [(0, 19), (9, 10), (10, 0), (19, 0)])
def test_what_lacks_little_is_computed(have, found):
    wanting = Wanting(life(min_tokens=10))
    assert found == wanting.lookup(view(), have).tokens


def test_who_was_only_asked_about_is_wanted_for_four_leases_after_the_last_time():
    wanting = Wanting(life())
    wanting.lookup(view(), 0)
    (want,) = wanting.step(time.monotonic())[2].wants
    assert 4 * LEASE == pytest.approx(want.seconds)
    time.sleep(1.1 * LEASE)
    wanting.lookup(view(), 0)
    assert ["here"] == [want.request for want in wanting.step(time.monotonic())[2].wants]
    wanting.lookup(view(), 0)
    assert [] == wanting.step(time.monotonic())[2].wants, "movers know that already"
    wanting.step(time.monotonic() + 3 * LEASE)
    assert wanting.busy
    wanting.step(time.monotonic() + 4.1 * LEASE)
    assert not wanting.busy


def test_a_ticket_that_is_worth_nothing_is_heard_of_only_if_something_was_missing():
    wanting = Wanting(life())
    bad = RequestView("bad", TOKENS, {"tensorway_kv": 1})
    wanting.reserve(bad, BLOCKS, TOKENS, 0)
    assert ([], {}) == wanting.step(time.monotonic())[:2]
    wanting.reserve(bad, BLOCKS, 4, TOKENS - 4)
    assert ([], {"bad": 4}) == wanting.step(time.monotonic())[:2]


def test_what_is_promised_waits_for_room_in_its_turn_and_not_beyond_its_deadline():
    wanting = Wanting(life(deadline=2.0))
    names = ["first", "second", "third"]
    for number, name in enumerate(names):
        wanting.reserve(view(name, epoch=number + 1, push_only=True, blocks=((),)), BLOCKS, 0, TOKENS)
    now = time.monotonic()
    (order,) = wanting.step(now)[2].awaits
    assert ("first", 5) == (order.fetch.want.request, len(order.landing[0]))
    asked = wanting.step(now + LEASE)[2]
    assert ([], {"second", "third"}) == (asked.awaits, {want.request for want in asked.wants}), "promises are kept"
    wanting.said(0, Result("first", "received", "stale"))
    assert ({"first": 0}, []) == (wanting.step(now)[1], wanting.step(now)[2].awaits), "its memory is not clear"
    wanting.cleared(0, Result("first", "cleared", proof=b"2"))
    assert [] == wanting.step(now)[2].awaits, "that was of another lease"
    wanting.cleared(0, Result("first", "cleared", proof=b"1"))
    (order,) = wanting.step(now)[2].awaits
    assert "second" == order.fetch.want.request
    _, failed, asked = wanting.step(now + 2.5)
    assert {"third": 0} == failed
    assert [("third", 0)] == [(fetch.want.request, fetch.stop) for fetch in asked.fetches], "its producer is told"
    for name in ("second", "third"):
        wanting.said(0, Result(name, "received", tokens=TOKENS))
    assert (["second"], {}) == wanting.step(now + 2.6)[:2]


# -- what is kept


def registration(epoch, request="r", stop=TOKENS, sender="decode.1", rank=0):
    landing = messages.runs([range(5)])
    return messages.PushRegistration(sender, "decode", rank, request, epoch, landing, 0, stop, 5.0)


def promised(keeping, request="r"):
    issued = keeping.promise(RequestView(request, TOKENS), TOKENS)
    opened = tickets.open(issued, SECRET, time.time())
    assert (True, ((),), TOKENS) == (opened.push_only, opened.blocks, opened.tokens)
    return opened.epoch


def test_what_was_promised_is_held_under_a_later_epoch_than_what_came_since():
    keeping = Keeping(life("prefill"))
    early = promised(keeping)
    keeping.finish(RequestView("between", TOKENS, hand_over=True), BLOCKS, TOKENS, aborted=False)
    between = keeping.leases.find("between", early + 1, time.monotonic())
    keeping.leases.force("between")
    assert ["between"] == keeping.step(time.monotonic())[0]
    keeping.heard(registration(early), 0, time.monotonic())
    assert keeping.finish(RequestView("r", TOKENS), BLOCKS, TOKENS, aborted=False).ticket is None
    (mark,), (send,) = (said := keeping.step(time.monotonic())[1]).marks, said.sends
    assert "late" == verdict(mark.word, between.epoch), "a late reader of that lease sees that it is late"
    assert mark.word == send.word > between.epoch > early in send.names
    ack = messages.Ack("decode.1", 0, "r", early, 0, 1, "received")
    keeping.heard(ack, 0, time.monotonic())
    assert ["r"] == keeping.step(time.monotonic())[0], "who has the promise knows it by its own epoch"


def test_who_asks_twice_is_written_to_once_and_hears_no_answer_that_it_could_take_for_one():
    keeping = Keeping(life("prefill"))
    epoch = promised(keeping)
    for _ in range(3):
        keeping.heard(registration(epoch), 0, time.monotonic())
    said = keeping.step(time.monotonic())[1]
    assert (1, []) == (len(said.pushes), said.refusals)
    keeping.heard(messages.Withdraw("decode.1", "decode", 0, "r", epoch), 0, time.monotonic())
    keeping.heard(registration(epoch), 0, time.monotonic())
    said = keeping.step(time.monotonic())[1]
    assert ([], ["withdrawn", "withdrawn"]) == (said.pushes, [one.cause for one in said.refusals])


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        (lambda epoch: registration(epoch + 9), "epoch"),
        (lambda epoch: registration(epoch, "other"), "unknown"),
        (lambda epoch: registration(epoch, stop=TOKENS + 1), "tokens"),
    ],
)
def test_what_is_not_there_is_refused_by_name(asked, cause):
    keeping = Keeping(life("prefill"))
    message = asked(promised(keeping))
    keeping.heard(message, 2, time.monotonic())
    said = keeping.step(time.monotonic())[1]
    expected = Refuse(2, "decode", "decode.1", 0, message.request, message.epoch, cause)
    assert ([], [expected]) == (said.pushes, said.refusals)


def test_a_promise_that_ends_is_refused_to_who_waits_and_released_to_nobody():
    keeping = Keeping(life("prefill"))
    epoch = promised(keeping)
    keeping.heard(registration(epoch), 0, time.monotonic())
    released, said = keeping.step(time.monotonic() + 2 * LEASE)
    assert ([], ["expired"], []) == (released, [one.cause for one in said.refusals], said.marks)
    assert not keeping.busy


def test_steps_of_a_promise_are_said_only_when_somebody_is_to_have_them():
    keeping = Keeping(life("prefill"))
    epoch = promised(keeping)
    keeping.computes("r", BLOCKS, 0, 4)
    assert [] == keeping.step(time.monotonic())[1].sends
    keeping.heard(registration(epoch), 0, time.monotonic())
    keeping.computes("r", BLOCKS, 4, 9)
    (send,) = keeping.step(time.monotonic())[1].sends
    assert (4, 9, 0, (epoch,)) == (send.first, send.stop, send.word, send.names)


def test_who_waits_for_a_promise_that_another_has_given_up_is_told():
    keeping = Keeping(life("prefill"))
    epoch = promised(keeping)
    for sender in ("decode.1", "other.1"):
        keeping.heard(registration(epoch, sender=sender), 0, time.monotonic())
    keeping.step(time.monotonic())
    keeping.heard(messages.Ack("decode.1", 0, "r", epoch, 0, 1, "failed"), 0, time.monotonic())
    said = keeping.step(time.monotonic())[1]
    assert {"decode.1", "other.1"} == {one.incarnation for one in said.refusals}
