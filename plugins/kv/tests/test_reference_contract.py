"""What the reference engine asks of a connector, and when: against one that says what a test wants it to say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tensorway.errors import DeadlineExceeded
from tensorway.kv import Capabilities, Event, Match, Result, Retention, Step
from tensorway.metrics import Sample
from tensorway_kv.reference import Engine, EngineOptions, Model, ModelShape, Request
from tensorway_kv.reference.model import Shard
from tensorway_kv.reference.rank import LocalRanks, Worker, parts_of

SHAPE = ModelShape(layers=2)
MODEL = Model(SHAPE)
SECONDS = 60.0
TOKENS = tuple(random.Random(1).randrange(256) for _ in range(22))


class Planner:
    """Says what it was told to say, and notes what it was asked."""

    def __init__(self, log, capabilities):
        self.log, self.capabilities = log, capabilities
        self.match, self.keep = Match(0, "nothing"), False
        self.steps, self.events_, self.views = [], [], []
        self.busy_, self.ticket = False, {"ticket": "of the end"}

    def lookup(self, view, have):
        self.views.append(view)
        self.log.append(("lookup", view.id, have))
        return self.match(have) if callable(self.match) else self.match

    def reserve(self, view, blocks, have, tokens):
        self.log.append(("reserve", view.id, have, tokens))
        self.blocks = [list(ids) for ids in blocks]

    def finish(self, view, blocks, tokens, *, aborted=False):
        self.log.append(("finish", view.id, len(blocks[0]), tokens, aborted))
        return Retention(self.keep, self.ticket if self.keep else None)

    def plan_step(self):
        self.log.append(("plan_step",))
        return self.steps.pop(0) if self.steps else Step()

    def on_results(self, rank, results):
        self.log.append(("on_results", rank, len(results)))

    def cancel(self, request):
        self.log.append(("cancel", request))

    def busy(self):
        return bool(self.steps or self.busy_)

    def reset(self):
        self.log.append(("reset",))

    def events(self):
        found, self.events_ = self.events_, []
        return found

    def statistics(self):
        return [Sample("kv_leases", (), 1.0)]

    def close(self, deadline=5.0):
        pass

    def promise(self, view, tokens):
        self.log.append(("promise", view.id, tokens))
        return {"ticket": "of the beginning"}

    def computes(self, view, blocks, first, stop):
        self.log.append(("computes", view.id, first, stop, len(blocks[0])))


class Mover:
    """Notes what it was asked; what arrives with a layer, a test puts into `arrives`."""

    def __init__(self, log, rank, capabilities):
        self.log, self.rank, self.capabilities = log, rank, capabilities
        self.said, self.arrives = [], lambda layer: None

    def submit(self, plan):
        self.log.append(("submit", self.rank, plan))

    def poll(self):
        found, self.said = self.said, []
        return found

    def before_layer(self, layer, deadline):
        self.log.append(("before", self.rank, layer))
        self.arrives(layer)

    def after_layer(self, layer):
        self.log.append(("after", self.rank, layer))

    def statistics(self):
        return [Sample("kv_bytes_total", (), 2.0)]


def engine_of(layerwise=True, can=True, **options):
    """An engine, its planner, and everything that is asked, in order."""
    log, can_do = [], Capabilities(layerwise=can)
    options = EngineOptions(page_tokens=4, layerwise=layerwise, **options)
    movers = [Mover(log, rank, can_do) for rank in range(options.tp)]
    workers = [Worker(*parts_of(SHAPE, options, rank), movers[rank], options) for rank in range(options.tp)]
    planner = Planner(log, can_do)
    return Engine(SHAPE, options, LocalRanks(workers), planner), planner, log


def computed(tokens):
    """Keys and values of all layers, from elsewhere."""
    shard, hidden, layers = Shard(SHAPE), MODEL.embedded(tokens), []
    for layer in range(SHAPE.layers):
        queries, keys, values = shard.projected(layer, hidden)
        layers.append((keys, values))
        hidden = MODEL.mixed(layer, hidden, shard.attended(queries, keys, values, 0))
    return layers


def put(engine, planner, layer, count, wrong=0):
    """Let a layer's first tokens be there, the last of them wrong."""
    (worker,) = engine.ranks.workers
    keys, values = (np.array(one[:count]) for one in computed(TOKENS)[layer])
    keys[count - wrong :] = 3.0
    worker.pages.write(layer, planner.blocks[0], 0, keys, values)


def only(log, *names):
    return [one for one in log if one[0] in names]


# -- the order of a step


def test_every_mover_has_its_plan_before_any_page_is_written_and_the_planner_hears_what_they_say():
    engine, planner, log = engine_of(layerwise=False, tp=2)
    planner.steps = [Step(plan=b"one")]
    for worker in engine.ranks.workers:
        worker.mover.said = [Result("", "heard", proof=b"x")]
        worker.pages.write = lambda *given, write=worker.pages.write: (log.append(("write",)), write(*given))
    engine.submit(Request("one", TOKENS))
    engine.step()
    begin = [("plan_step",), ("submit", 0, b"one"), ("submit", 1, b"one")]
    asked = [("lookup", "one", 0), ("reserve", "one", 0, 0), *begin]
    assert [*asked, *[("write",)] * 4] == log[:9]
    assert [("on_results", 0, 1), ("on_results", 1, 1), ("finish", "one", 6, 22, False)] == log[9:]
    (view,) = planner.views
    assert (22, 5) == (view.tokens, len(view.hashes))


def test_who_cannot_or_is_not_asked_to_does_nothing_layer_by_layer():
    for layerwise, can in ((False, True), (True, False)):
        engine, _, log = engine_of(layerwise, can)
        assert engine.submit(Request("one", TOKENS, hand_over=True)) is None
        engine.run(SECONDS)
        assert [] == only(log, "promise", "computes", "before", "after")


def test_blocks_that_are_kept_are_free_when_the_planner_says_so():
    engine, planner, _ = engine_of()
    planner.keep = True
    engine.submit(Request("one", TOKENS, 3, hand_over=True))
    for _ in range(6):
        engine.step()
    assert ({"ticket": "of the end"}, 122, True) == (engine.take("one").ticket, engine.pool.free, engine.busy)
    planner.steps = [Step(released=["one"])]
    engine.run(SECONDS)
    assert (128, False) == (engine.pool.free, engine.busy)


def test_what_is_counted_and_what_changed_is_passed_on():
    engine, planner, _ = engine_of()
    planner.events_ = [Event("stored"), Event("removed")]
    engine.step()
    assert ["stored", "removed"] == [one.what for one in engine.events]
    assert ["kv_leases", "kv_bytes_total"] == [one.metric for one in engine.statistics()]
    engine.reset()
    assert ("reset",) == engine._planner.log[-1]


# -- what comes from elsewhere


@pytest.mark.parametrize("good", [None, 0, 4, 18], ids=["received", "0", "4", "18"])
def test_what_arrived_is_not_computed_and_what_failed_is(good):
    engine, planner, log = engine_of(layerwise=False)
    planner.match = lambda have: Match(20 - have, "background")
    engine.submit(Request("one", TOKENS, 4))
    engine.step()
    for layer in range(SHAPE.layers):
        put(engine, planner, layer, 20, 0 if good is None else 20 - good)
    assert [("lookup", "one", 0), ("reserve", "one", 0, 20)] == only(log, "lookup", "reserve")
    for _ in range(3):
        engine.step()  # nobody has said anything, and nothing is computed
    assert engine.take("one") is None
    planner.steps = [Step(received=["one"]) if good is None else Step(failed={"one": good})]
    engine.run(SECONDS)
    outcome = engine.take("one")
    assert MODEL.continued(TOKENS, 4) == outcome.tokens
    here = 20 if good is None else good
    assert (here, 20 - here, 25 - here) == (outcome.handed, outcome.failed, outcome.computed)
    assert 128 == engine.pool.free


def test_a_wrong_byte_would_be_seen():
    engine, planner, _ = engine_of(layerwise=False)
    planner.match = Match(20, "background")
    engine.submit(Request("one", TOKENS, 4))
    planner.steps = [Step(), Step(received=["one"])]
    engine.step()
    for layer in range(SHAPE.layers):
        put(engine, planner, layer, 20)
    keys, values = engine.ranks.workers[0].pages.read(0, planner.blocks[0], 20)
    keys[7, 2, 5] += 0.25
    engine.ranks.workers[0].pages.write(0, planner.blocks[0], 0, keys, values)
    engine.run(SECONDS)
    assert MODEL.continued(TOKENS, 4) != engine.take("one").tokens


def test_only_what_is_not_here_is_asked_for():
    engine, planner, log = engine_of(layerwise=False)
    engine.submit(Request("first", TOKENS[:13]))
    engine.run(SECONDS)
    planner.match = lambda have: Match(22 - have, "background")
    planner.steps = [Step(), Step(failed={"one": 12})]
    engine.submit(Request("one", TOKENS))
    engine.run(SECONDS)
    assert ("reserve", "one", 12, 10) in log
    outcome = engine.take("one")
    assert (12, 0, 10) == (outcome.cached, outcome.handed, outcome.failed)


def test_of_whom_nothing_is_known_yet_is_asked_again_and_others_go_first():
    engine, planner, log = engine_of()
    planner.match = Match(0, "later")
    engine.submit(Request("one", TOKENS))
    for _ in range(3):
        engine.step()
    planner.lookup, asked = (lambda view, have: Match(0, "later" if view.id == "one" else "nothing")), planner.lookup
    engine.submit(Request("two", TOKENS[:5]))
    for _ in range(2):
        engine.step()
    assert (MODEL.continued(TOKENS[:5], 1), None) == (engine.take("two").tokens, engine.take("one"))
    planner.match, planner.lookup = Match(0, "nothing"), asked
    engine.run(SECONDS)
    assert MODEL.continued(TOKENS, 1) == engine.take("one").tokens
    assert [("lookup", "one", 0)] * 3 == only(log, "lookup")[:3]
    assert [("reserve", "two", 0, 0), ("reserve", "one", 4, 0)] == only(log, "reserve")


def test_later_is_not_for_ever():
    engine, planner, log = engine_of(patience=0.05)
    planner.match = Match(0, "later")
    engine.submit(Request("one", TOKENS))
    engine.run(SECONDS)
    assert MODEL.continued(TOKENS, 1) == engine.take("one").tokens
    assert [("reserve", "one", 0, 0)] == only(log, "reserve")


def test_a_request_whose_blocks_are_on_their_way_keeps_them_until_they_are_safe():
    engine, planner, log = engine_of(layerwise=False)
    planner.match = Match(20, "background")
    engine.submit(Request("one", TOKENS))
    engine.step()
    engine.cancel("one")
    for _ in range(3):
        engine.step()
    assert (122, None) == (engine.pool.free, engine.take("one"))
    planner.steps = [Step(failed={"one": 0})]
    engine.run(SECONDS)
    assert (128, True) == (engine.pool.free, engine.take("one").aborted)
    assert [("cancel", "one"), ("finish", "one", 0, 0, True)] == only(log, "cancel", "finish")


def test_an_engine_that_has_no_end_says_what_it_waits_for():
    engine, planner, _ = engine_of(layerwise=False)
    planner.match = Match(20, "background")
    engine.submit(Request("one", TOKENS))
    with pytest.raises(DeadlineExceeded, match="one handed"):
        engine.run(0.05)


# -- layer by layer


def test_a_producer_promises_says_what_it_computes_and_sends_each_layer():
    engine, planner, log = engine_of(chunk=9)
    planner.keep = True
    ticket = engine.submit(Request("one", TOKENS, hand_over=True))
    assert {"ticket": "of the beginning"} == ticket
    planner.ticket = None
    for _ in range(4):
        engine.step()
    assert ticket == engine.take("one").ticket
    assert [("promise", "one", 22)] == only(log, "promise")
    spans = [(first, stop) for _, _, first, stop, _ in only(log, "computes")]
    assert [(0, 9), (9, 18), (18, 22)] == spans
    for place, what in enumerate(log):
        if what[0] == "computes":
            rest = [one[0] for one in log[place:] if one[0] in ("plan_step", "submit", "after")][:4]
            assert ["plan_step", "submit", "after", "after"] == rest
    assert [("after", 0, 0), ("after", 0, 1)] * 3 == only(log, "after")
    assert [] == only(log, "before")


@pytest.mark.parametrize("mode", ["now", "background"])
def test_a_consumer_computes_while_layers_arrive_and_believes_it_when_it_is_told_to(mode):
    engine, planner, log = engine_of()
    planner.match = lambda have: Match(20, mode)
    engine.submit(Request("one", TOKENS, 3))
    engine.ranks.workers[0].mover.arrives = lambda layer: put(engine, planner, layer, 20)
    engine.step()
    assert [("before", 0, 0), ("after", 0, 0), ("before", 0, 1), ("after", 0, 1)] == only(log, "before", "after")
    for _ in range(3):
        engine.step()
    assert 2 == len(only(log, "before")), "it goes on before it is told that it may"
    planner.steps = [Step(received=["one"])]
    engine.run(SECONDS)
    outcome = engine.take("one")
    assert (MODEL.continued(TOKENS, 3), 20, 4) == (outcome.tokens, outcome.handed, outcome.computed)


@pytest.mark.parametrize("good", [0, 8, 16])
def test_what_was_computed_from_layers_that_failed_is_worth_nothing(good):
    engine, planner, _ = engine_of()
    planner.match = lambda have: Match(20, "now")
    engine.submit(Request("one", TOKENS, 3))
    engine.ranks.workers[0].mover.arrives = lambda layer: put(engine, planner, layer, 20, 20 - good)
    engine.step()
    planner.steps = [Step(failed={"one": good})]
    engine.run(SECONDS)
    outcome = engine.take("one")
    assert (MODEL.continued(TOKENS, 3), good, 20 - good) == (outcome.tokens, outcome.handed, outcome.failed)
    engine.submit(Request("again", TOKENS, 3))
    planner.match = Match(0, "nothing")
    engine.run(SECONDS)
    again = engine.take("again")
    assert (outcome.tokens, 20) == (again.tokens, again.cached)


def test_a_layer_that_does_not_come_in_time_ends_nothing_but_the_wait():
    engine, planner, _ = engine_of()
    planner.match = Match(20, "now")

    def late(layer):
        raise DeadlineExceeded("Layer 0 was awaited.", "It did not come.", "Wait longer.")

    engine.ranks.workers[0].mover.arrives = late
    engine.submit(Request("one", TOKENS))
    engine.step()
    planner.steps = [Step(failed={"one": 0})]
    engine.run(SECONDS)
    assert MODEL.continued(TOKENS, 1) == engine.take("one").tokens
