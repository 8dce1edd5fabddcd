"""The fastest communicator: measured by all members, decided by one, and whatever cannot be used has a reason."""

from __future__ import annotations

import importlib.util
import random
import signal
import time

import attrs
import pytest

import tensorway
from tensorway.eplb import Capabilities, Failed, Filled, Group, Staging
from tensorway.errors import BackendUnavailable, OptionsInvalid
from tensorway.plugins import register
from tensorway.testing.ranks import Place, RankFailed
from tensorway.testing.waiting import eventually
from tensorway.types import Offer, ProbeResult
from tensorway_eplb import choice
from tensorway_eplb.choice import Candidate
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import campaign, engine
from tensorway_eplb.testing.engine import Model, TestEngine

MODEL = Model(layers=2, experts=6, slots=6, tensors=(("w13", 1 << 18), ("w2", 1 << 17)))
LOCAL = Candidate("local", "onesided", {"transport": "local"})
GLOO = Candidate("gloo", "gloo")
DEADLINE = 60.0
without_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason='needs torch: pip install "tensorway[gloo]"'
)


@pytest.fixture
def chosen(world):
    """Let these processes choose, each among candidates of its own."""

    def choose(path, lists, deadline=DEADLINE):
        world.grow(len(lists))
        members = tuple(f"p{index}" for index in range(len(lists)))
        for me, candidates in enumerate(lists):
            world[me].start(choose_one, Place(path, members, me), candidates, deadline)
        return [world[me].result() for me in range(len(lists))]

    return choose


@attrs.frozen
class Chosen:
    """What one rank was told."""

    label: str
    name: str
    rates: dict
    losers: dict
    seconds: float
    wrong: tuple
    free: int


# -- what ranks do


def choose_one(rank, place, candidates, deadline):
    """Choose with the weights of the linear placement; and compare every byte of them."""
    register_odd_ones(rank)
    start = Placement.linear(MODEL.layers, MODEL.experts, len(place.members), MODEL.slots)
    holder = TestEngine(MODEL, start, place.me)
    staging = Staging.on_host(holder.layout.kinds, MODEL.slots)
    group, began = Group(place.path, place.members, place.me), time.monotonic()
    found = choice.fastest(rank.rendezvous(), group, holder.layout, staging, deadline, candidates)
    seconds, wrong = time.monotonic() - began, tuple(holder.wrong(start.by_rank[:, place.me]))
    return Chosen(found.label, found.name, dict(found.rates), dict(found.losers), seconds, wrong, staging.free)


class Odd:
    """A communicator that copies nothing, as slowly as its options say; or that fails, at one member or at all."""

    control = None

    def __init__(self, options, context):
        self.options, self.me = options, context.group.me
        self.capabilities = Capabilities(frozenset({"cpu"}), "receiver")
        self.posted = []
        if options.fails in (f"opening {self.me}", "opening"):
            raise ZeroDivisionError("it cannot be opened")
        if options.fails == f"opening late {self.me}":
            time.sleep(context.deadline + 0.3)

    def begin(self, cycle, fetches, sends):
        pass

    def serve(self, send, deadline):
        pass

    def post(self, fetch, deadline):
        self.posted.append((time.monotonic() + self.options.seconds, fetch))

    def poll(self, seconds):
        time.sleep(seconds)
        due = [fetch for when, fetch in self.posted if when <= time.monotonic()]
        self.posted = [(when, fetch) for when, fetch in self.posted if fetch not in due]
        if self.options.fails == f"moving {self.me}":
            return [Failed(fetch, "it lost the rows", released=False) for fetch in due]
        return [] if self.options.fails == f"never {self.me}" else [Filled(fetch) for fetch in due]

    def close(self, deadline=5.0):
        pass


@attrs.frozen
class OddOptions:
    seconds: float = 0.0
    fails: str = ""


def probe():
    return ProbeResult.passed("nothing is needed")


def odd_offer():
    return Offer(
        name="odd", kind="eplb_communicator", summary="Moves nothing.", probe=probe, probe_in="host", factory=Odd,
        options=OddOptions, devices={"cpu"}, priority=1,
    )  # fmt: skip


def register_odd_ones(rank):
    if rank.notes.setdefault("registered", False) is False:
        register(odd_offer())
        rank.notes["registered"] = True


def odd(label, seconds=0.0, fails=""):
    return Candidate(label, "odd", {"seconds": seconds, "fails": fails})


def alike(reports):
    """All were told the same; nobody's weights were touched, and no staging is missing."""
    assert 1 == len({(report.label, str(report.rates), str(report.losers)) for report in reports}), reports
    assert all(report.wrong == () and report.free == MODEL.slots for report in reports), reports
    return reports[0]


# -- who wins


@pytest.mark.parametrize("order", [1, -1])
def test_the_faster_one_wins_whatever_their_order(chosen, order):
    found = alike(chosen(f"/faster-{order}/experts", [[odd("slow", 0.3), odd("quick", 0.01)][::order]] * 3))
    assert ("quick", "odd") == (found.label, found.name)
    assert {"slow", "quick"} == set(found.rates) and found.rates["quick"] > 3 * found.rates["slow"]
    assert ["slow"] == list(found.losers) and "MB/s" in found.losers["slow"]
    row = sum(nbytes for _, nbytes in MODEL.tensors)
    assert found.rates["slow"] == pytest.approx(MODEL.slots * row / 0.3, rel=0.5)


def test_the_slowest_member_counts(chosen):
    lists = [[odd("mixed", 0.5 if me == 1 else 0.0), odd("even", 0.1)] for me in range(3)]
    found = alike(chosen("/slowest/experts", lists))
    assert "even" == found.label and found.rates["even"] > 2 * found.rates["mixed"]


@without_torch
def test_real_ones_are_measured_on_real_rows(chosen):
    for number in range(2):  # the second finds what the first left behind, if it left anything
        found = alike(chosen("/real/experts", [[LOCAL, GLOO]] * 3))
        assert {"local", "gloo"} == set(found.rates) and all(rate > 0 for rate in found.rates.values())
        best = max(found.rates, key=found.rates.get)
        assert best == found.label and {"local", "gloo"} - {best} == set(found.losers), number


def test_a_group_of_one_takes_what_can_be_opened(chosen):
    found = alike(chosen("/alone/experts", [[odd("broken", fails="opening"), odd("fine")]]))
    assert "fine" == found.label and "cannot be opened" in found.losers["broken"]


# -- who loses


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("opening", "p0: Its factory raised ZeroDivisionError: it cannot be opened"),
        ("opening 1", "p1: Its factory raised ZeroDivisionError"),
        ("moving 1", "p1: it lost the rows"),
    ],
)
def test_a_candidate_that_fails_at_anybody_loses_with_the_reason_of_who_saw_it(chosen, fails, why):
    found = alike(
        chosen(f"/fails-{fails.replace(' ', '-')}/experts", [[odd("broken", fails=fails), odd("fine", 0.2)]] * 3)
    )
    assert "fine" == found.label and {"fine"} == set(found.rates)
    assert found.losers["broken"].startswith(why)
    assert found.seconds < DEADLINE / 2, "nobody waits for who has said that it failed"


@pytest.mark.parametrize("fails", ["never 1", "opening late 1"])
def test_a_candidate_that_is_never_done_loses_by_its_share_of_the_time(chosen, fails):
    found = alike(chosen(f"/{fails.replace(' ', '-')}/experts", [[odd("endless", fails=fails), odd("fine")]] * 2, 10.0))
    assert "fine" == found.label and "p1" in found.losers["endless"] and "in time" in found.losers["endless"]
    assert found.seconds < 10.0


def test_what_is_not_installed_or_not_asked_for_everywhere_loses_without_being_tried(chosen):
    nowhere = Candidate("nowhere", "onesided", {"transport": "nowhere"})
    lists = [[nowhere, odd("mine"), odd("ours", 0.05)], [odd("ours", 0.05), nowhere, odd("yours")]]
    found = alike(chosen("/absent/experts", lists))
    assert "ours" == found.label and {"ours"} == set(found.rates)
    assert "not installed" in found.losers["nowhere"]
    assert found.losers["mine"].startswith("p1: ") and found.losers["yours"].startswith("p0: ")


def test_when_nothing_can_be_used_all_are_told_why(chosen):
    with pytest.raises(RankFailed, match=r"BackendUnavailable[\s\S]*broken: p0: Its factory raised"):
        chosen("/nothing/experts", [[odd("broken", fails="opening")]] * 2)


def test_a_member_that_does_not_come_costs_the_deadline_and_is_named(world):
    world.grow(2)
    world[0].start(choose_one, Place("/missing/experts", ("p0", "p1"), 0), [odd("fine")], 2.0)
    with pytest.raises(RankFailed, match=r"DeadlineExceeded[\s\S]*p1"):
        world[0].result(10.0)


def test_a_member_that_dies_meanwhile_costs_the_deadline_and_is_named(world, chosen):
    world.grow(3)
    world.each(range(3), register_odd_ones)  # so that they are there at once
    members = ("p0", "p1", "p2")
    for me in range(3):
        world[me].start(choose_one, Place("/dies/experts", members, me), [odd("slow", 0.4)], 8.0)
    began = "/slow/0/p2"  # it measures the slow one
    eventually(lambda: any(row.key.endswith(began) for row in world.rendezvous.list("/dies/experts/trial/")))
    world[2].signal(signal.SIGKILL)
    for me in (0, 1):
        with pytest.raises(RankFailed, match=r"slow: .*p2"):
            world[me].result(20.0)
    # Its records are still there, and so is the answer of a group that is no more.
    assert "fine" == alike(chosen("/dies/experts", [[odd("fine"), odd("slow", 0.3)]] * 3)).label


# -- what is asked


def test_all_that_is_installed_is_a_candidate(world):
    world.grow(1)
    found = world[0].call(installed, {"gloo": {"timeout_s": 5.0}, "onesided": {"layers_in_flight": 3}})
    assert {"communicator": "onesided", "options": {"layers_in_flight": 3, "transport": "local"}} == found[
        "onesided-local"
    ]
    assert "onesided" not in found
    assert "gloo" not in found or found["gloo"]["options"] == {"timeout_s": 5.0}
    only = world[0].call(installed, {"onesided": {"transport": "local"}})
    assert ["onesided-local"] == [label for label in only if label.startswith("onesided")]


def installed(rank, options):
    return {
        each.label: {"communicator": each.communicator, "options": each.options} for each in choice.installed(options)
    }


def test_options_of_one_communicator_are_refused_where_there_are_several():
    with pytest.raises(OptionsInvalid, match="those of one communicator"):
        choice.installed({"transport": "local"})


@pytest.mark.parametrize("members", range(1, 40))
def test_members_to_fetch_from_are_others_and_not_too_many(members):
    shifts = choice._spread(members)
    assert len(set(shifts)) == len(shifts) == min(members - 1, 8)
    assert all(0 < shift < members for shift in shifts)


# -- the whole


def how_it_was_chosen(rank):
    found = rank.notes["rebalancer"].choice
    return None if found is None else (found.label, sorted({*found.rates, *found.losers}))


def test_a_rebalancer_measures_and_who_is_invited_later_takes_the_same(world):
    world.grow(3)
    model = attrs.evolve(MODEL, communicator="measured", options={"onesided": {"transport": "local"}})
    start = Placement.linear(model.layers, model.experts, 2, model.slots)
    world.enter([0, 1], engine.join, "/measured/experts", 0, model, start)
    labels = world.each([0, 1], how_it_was_chosen)
    assert labels[0] == labels[1] and "onesided-local" in labels[0][1]
    world[2].start(engine.join, Place("/measured/experts", ("p2",), 0), model, None)
    for report in world.each([0, 1], engine.regroup, ["p0", "p1", "p2"], 30.0):
        assert ("", ()) == (report.error, report.wrong)
    world[2].result(30.0)
    assert labels[0] == world[2].call(how_it_was_chosen)
    rows = campaign.random_rows(random.Random(1), model, 3)
    for report in world.each([0, 1, 2], engine.rebalance, rows, 20.0):
        assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)


def elsewhere(rank, host):
    """From now on this process says that it is on another host."""
    choice.boot_id = lambda: host


@pytest.mark.parametrize("apart", [False, True], ids=["one host", "two hosts"])
def test_auto_measures_between_hosts_and_nowhere_else(world, apart):
    """Also who is invited later does as the others have done, whatever an earlier start of the group has chosen."""
    world.grow(3)
    model = attrs.evolve(MODEL, communicator="auto", options={})
    start = Placement.linear(model.layers, model.experts, 2, model.slots)
    world[1].call(elsewhere, "another" if apart else "")
    world[0].call(elsewhere, "")
    world.enter([0, 1], engine.join, "/auto/experts", 0, model, start)
    chosen = world.each([0, 1], how_it_was_chosen)
    assert chosen[0] == chosen[1] and apart == (chosen[0] is not None)
    world[2].start(engine.join, Place("/auto/experts", ("p2",), 0), model, None)
    for report in world.each([0, 1], engine.regroup, ["p0", "p1", "p2"], 30.0):
        assert ("", ()) == (report.error, report.wrong)
    world[2].result(30.0)
    assert chosen[0] == world[2].call(how_it_was_chosen)
    rows = campaign.random_rows(random.Random(2), model, 3)
    for report in world.each([0, 1, 2], engine.rebalance, rows, 20.0):
        assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)
    world.each([0, 1, 2], engine.leave)


def test_auto_with_options_and_names_measure_nothing(world):
    world.grow(2)
    start = Placement.linear(MODEL.layers, MODEL.experts, 2, MODEL.slots)
    for name in ("auto", "onesided"):
        model = attrs.evolve(MODEL, communicator=name, options={"transport": "local"})
        for process, host in [(0, ""), (1, "another")]:
            world[process].call(elsewhere, host)
        world.enter([0, 1], engine.join, f"/by-{name}/experts", 0, model, start)
        assert [None, None] == world.each([0, 1], how_it_was_chosen)


def test_a_later_member_without_what_the_group_has_chosen_is_told_so():
    with tensorway.create("rendezvous", "direct", {"secret": "a secret of the tests"}) as service:
        group = Group("/late/experts", ("a",), 0)
        layout = TestEngine(MODEL, None, 0).layout
        staging = Staging.on_host(layout.kinds, 2)
        found = choice.fastest(service, group, layout, staging, 20.0, [LOCAL])
        assert found == choice.decided(service, group, [GLOO, LOCAL])
        with pytest.raises(BackendUnavailable, match="local was to be used"):
            choice.decided(service, group, [GLOO])
