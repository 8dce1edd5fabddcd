"""Weights compared with digests in the background: what is spoiled is found, and what a rebalance writes is no find."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tensorway.errors import Closed, DeadlineExceeded, PlacementInvalid
from tensorway.testing.ranks import Ranks
from tensorway_eplb.audit import Audit, WrongRow
from tensorway_eplb.background import Background
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import campaign, engine
from tensorway_eplb.testing.engine import Model

MODEL = Model(layers=4, experts=8, slots=4)
#: Nothing waits for the rate.
AT_ONCE = 1e15
SECONDS = 30.0


@pytest.fixture(scope="module")
def world():
    with Ranks(2) as ranks:
        yield ranks


def entered(world, path):
    start = Placement.linear(MODEL.layers, MODEL.experts, 2, MODEL.slots)
    world.enter([0, 1], engine.join, path, 0, MODEL, start)
    return start


def until(condition):
    """Wait for it, and say whether it came."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(1e-3)
    return True


def passed(audit, times=1):
    """Wait until every row has been read, whatever was being read when this was called."""
    target = audit.statistics()["passes"] + times + 1
    return until(lambda: audit.statistics()["passes"] >= target)


# -- in a rank


def begin(rank):
    rank.notes["found"] = []
    rank.notes["audit"] = audit = Audit(rank.notes["rebalancer"], rank.notes["found"].append, bytes_per_second=AT_ONCE)
    audit.start()


def spoil(rank, layer, slot):
    rank.notes["engine"].weights[layer][0][slot, 17] ^= 1


def look(rank):
    """After a whole pass: what was found so far, and what is wrong now."""
    audit = rank.notes["audit"]
    assert passed(audit) and audit.running
    return list(rank.notes["found"]), audit.wrong


def rebalance_beside(rank, rows):
    """Rebalance with an engine that takes its time after each layer, until the audit has read everything again."""
    held, audit = rank.notes["engine"], rank.notes["audit"]
    commit, passes = held.commit, []

    def slowly(layer, experts, write):
        commit(layer, experts, write)
        passes.append(passed(audit))

    held.commit = slowly
    report = engine.rebalance(rank, rows, SECONDS)
    del held.commit
    return report, passes


def serve_beside(rank, rows):
    """The same by `Background`, whose engine takes layers over in a thread of its own."""
    rebalancer, held, audit = rank.notes["rebalancer"], rank.notes["engine"], rank.notes["audit"]
    background = Background(rebalancer, held, lambda mine: mine)
    background.start(lambda current: Placement(rows, MODEL.experts, 2), SECONDS)
    passes, taken = [], 0
    while taken < MODEL.layers:
        now = []
        assert until(lambda now=now: now.extend(background.step()) or now)
        taken += len(now)
        passes.append(passed(audit))
    background.wait(SECONDS)
    return engine.look(rank), passes


def reload(rank, layer, expert, other):
    """Load something else, as new weights are; or the same again."""
    with rank.notes["rebalancer"].reloading(layer, expert) as rows:
        for row in rows:
            rank.notes["engine"].load(layer, other, row)


def regroup_with_new_weights(rank):
    rank.notes["rebalancer"].regroup(reloaded=True, deadline=SECONDS)


def regroup_while_a_row_is_read(rank):
    """What a look at a reloaded row says whose digest was taken before a regroup, and is compared after it."""
    rebalancer, said = rank.notes["rebalancer"], []
    rows, regrouped = rebalancer._rows, threading.Event()
    live_digest = rows.live_digest

    def slowly(layer, slot):
        digest = live_digest(layer, slot)
        if threading.current_thread() is reader:
            reading.set()
            regrouped.wait(0.5)
        return digest

    rows.live_digest, reading = slowly, threading.Event()
    reader = threading.Thread(target=lambda: said.append(rebalancer.check_row(0, 1)))
    reader.start()
    assert reading.wait(SECONDS)
    rebalancer.regroup(reloaded=True, deadline=SECONDS)
    regrouped.set()
    reader.join(SECONDS)
    del rows.live_digest
    return said


def end(rank):
    rank.notes["audit"].close()
    return rank.notes["audit"].running, rank.notes["audit"].error, dict(rank.notes["audit"].statistics())


# -- tests with groups


def test_a_spoiled_row_is_found_told_once_and_no_longer_wrong_when_it_is_right_again(world):
    entered(world, "/spoiled/experts")
    world.each([0, 1], begin)
    assert [([], ())] * 2 == world.each([0, 1], look)
    world[1].call(spoil, 2, 3)
    wrong = WrongRow(2, 3, 7)
    for _ in range(2):
        assert ([wrong], (wrong,)) == world[1].call(look)
    world[1].call(spoil, 2, 3)  # and back
    assert ([wrong], ()) == world[1].call(look)
    running, error, counted = world[1].call(end)
    assert (False, None, 1, 0) == (running, error, counted["wrong_found"], counted["wrong_now"])
    assert counted["bytes_checked"] == counted["rows_checked"] * sum(nbytes for _, nbytes in MODEL.tensors)
    assert counted["rows_checked"] >= counted["passes"] * MODEL.layers * MODEL.slots > 0


@pytest.mark.parametrize("way", [rebalance_beside, serve_beside])
def test_a_rebalance_in_the_middle_is_no_find_and_a_row_that_it_brought_is_checked(world, way):
    """Each layer's rows change while the cycle goes on, and the audit reads all of them in between."""
    entered(world, f"/beside/{way.__name__}")
    world.each([0, 1], begin)
    rows = campaign.random_rows(random.Random(5), MODEL, 2)
    for report, passes in world.each([0, 1], way, rows):
        assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)
        assert len(passes) > 1 and all(passes)
    assert [([], ())] * 2 == world.each([0, 1], look)
    world[0].call(spoil, 1, 2)
    assert [WrongRow(1, 2, int(rows[1, 2]))] == world[0].call(look)[0]
    world.each([0, 1], end)


def test_what_an_engine_has_reloaded_is_right_and_what_it_loaded_again_is_checked(world):
    entered(world, "/reloaded/experts")
    world.each([0, 1], begin)
    world[0].call(reload, 0, 1, 5)  # other weights
    assert ([], ()) == world[0].call(look)
    world.each([0, 1], regroup_with_new_weights)
    world[0].call(spoil, 0, 1)
    wrong = WrongRow(0, 1, 1)
    assert ([wrong], (wrong,)) == world[0].call(look)
    world[0].call(reload, 0, 1, 5)  # from the same checkpoint: that is how a row is mended
    assert ([wrong], ()) == world[0].call(look)
    world[0].call(spoil, 0, 1)
    assert ([wrong, wrong], (wrong,)) == world[0].call(look)
    world.each([0, 1], end)


def test_a_row_that_is_read_while_a_regroup_takes_new_digests_is_no_find(world):
    entered(world, "/reloaded/beside")
    world[0].call(reload, 0, 1, 5)
    world[0].start(regroup_while_a_row_is_read)
    world[1].call(regroup_with_new_weights)
    assert [None] == world[0].result(SECONDS)


# -- tests of the thread


class Layout:
    slots = 3
    layers = ("one", "two")

    def row_bytes(self, layer):
        return 1000


class Rows:
    """A rebalancer that says what a test wants."""

    verifies = True

    def __init__(self, answer=lambda layer, slot: (slot, True)):
        self.layout, self.answer, self.read = Layout(), answer, []

    def check_row(self, layer, slot):
        self.read.append((layer, slot))
        return self.answer(layer, slot)


PLACES = [(layer, slot) for layer in range(2) for slot in range(3)]


def test_no_more_is_read_than_the_rate_allows():
    rows, began = Rows(), time.monotonic()
    with Audit(rows, print, bytes_per_second=100_000) as audit:
        assert until(lambda: len(rows.read) > 30)
        assert len(rows.read) <= 1 + (time.monotonic() - began) * 100
        assert PLACES * 5 == rows.read[:30]
    assert audit.statistics()["pass_seconds"] >= 0.06
    assert not audit.running


def test_a_pass_goes_on_where_it_was_stopped():
    rows = Rows()
    audit = Audit(rows, print, bytes_per_second=1)
    for read in range(1, 9):
        audit.start()
        assert until(lambda read=read: len(rows.read) == read)
        audit.stop()
    assert [*PLACES, *PLACES[:2]] == rows.read
    audit.close()
    with pytest.raises(Closed):
        audit.start()


def test_rows_of_which_nothing_is_known_are_passed_over():
    rows = Rows(lambda layer, slot: None if layer else (slot, slot != 1))
    found = []
    with Audit(rows, found.append, bytes_per_second=AT_ONCE) as audit:
        assert passed(audit)
        assert (WrongRow(0, 1, 1),) == audit.wrong
        rows.answer = lambda layer, slot: None  # it was moved away
        assert passed(audit)
        assert () == audit.wrong
    assert [WrongRow(0, 1, 1)] == found


def test_a_wrong_row_of_another_expert_is_another_find():
    rows, found = Rows(lambda layer, slot: (7, slot != 1)), []
    with Audit(rows, found.append, bytes_per_second=AT_ONCE) as audit:
        assert passed(audit)
        rows.answer = lambda layer, slot: (8, slot != 1)
        assert passed(audit)
    assert [WrongRow(0, 1, 7), WrongRow(1, 1, 7)] == found[:2]
    assert {WrongRow(0, 1, 8), WrongRow(1, 1, 8)} == set(found[2:]) and 4 == len(found)


def test_what_the_callback_raises_ends_the_audit_and_is_told(caplog):
    def refuse(row):
        raise RuntimeError("nobody to tell")

    audit = Audit(Rows(lambda layer, slot: (slot, slot != 2)), refuse, bytes_per_second=AT_ONCE)
    audit.start()
    assert until(lambda: not audit.running)
    assert "nobody to tell" == str(audit.error)
    assert "nobody to tell" in caplog.text
    audit.start()
    assert audit.error is None
    audit.close()


def test_the_end_of_the_rebalancer_is_the_end_of_its_audit():
    def closed(layer, slot):
        raise Closed("A rebalancer was used.", "It is closed.", "Make another.")

    audit = Audit(Rows(closed), print)
    audit.start()
    assert until(lambda: not audit.running)
    assert audit.error is None
    audit.close()


def test_a_callback_may_stop_its_audit():
    audit = Audit(Rows(lambda layer, slot: (slot, False)), lambda row: audit.stop(), bytes_per_second=AT_ONCE)
    audit.start()
    assert until(lambda: not audit.running)
    assert (None, 1) == (audit.error, len(audit.wrong))


def test_an_audit_that_cannot_be_stopped_says_so():
    go = threading.Event()
    audit = Audit(Rows(lambda layer, slot: go.wait(SECONDS) and None), print)
    audit.start()
    with pytest.raises(DeadlineExceeded, match="waits for a reload"):
        audit.stop(0.05)
    with pytest.raises(DeadlineExceeded, match="told to stop"):
        audit.start()
    go.set()
    audit.close(SECONDS)


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(PlacementInvalid, match="a number above 0"):
        Audit(Rows(), print, bytes_per_second=rate)


def test_without_digests_there_is_nothing_to_audit():
    rows = Rows()
    rows.verifies = False
    with pytest.raises(PlacementInvalid, match="no digests"):
        Audit(rows, print)
