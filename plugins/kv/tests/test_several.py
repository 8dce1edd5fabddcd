"""Several connectors as one: who is asked, who is next, who keeps, and what is said. Children do what tests say."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest
from engines import Shape

import tensorway
from tensorway import metrics
from tensorway.errors import (
    BackendUnavailable,
    Closed,
    DeadlineExceeded,
    DescriptionInvalid,
    OptionsInvalid,
    Unsupported,
)
from tensorway.kv import KVContext, RequestView, Result
from tensorway.plugins import isolated
from tensorway.testing import OfferSuite
from tensorway_kv.offers import several
from tensorway_kv.several import plans, tickets
from tensorway_kv.testing.memory import memory_of
from tensorway_kv.testing.scripted import BLOCK, Script, World

GEOMETRY = memory_of(Shape(), 0)[0]
TOKENS, BLOCKS = 19, [[2, 8, 4, 11, 7]]


class TestOffer(OfferSuite):
    kind = "kv_connector"
    name = "several"


class Bench:
    """One engine in this process: a planner, its movers, and a clock that stands until it is moved."""

    def __init__(self, host, clock, world, children, **options):
        self.world, self.clock = world, clock
        described = [
            {"name": name, "backend": "scripted", "options": {"child": name}, **more} for name, more in children.items()
        ]
        self.options = {"children": described, **options}
        self.host = host
        self.planner = self.make("planner")
        self.movers = [self.make("mover", rank) for rank in range(world.ranks)]
        self.received, self.failed, self.released, self.results = [], {}, [], []
        self._said = []

    def make(self, role, rank=0):
        context = KVContext("decode", None, role, self.world.ranks, rank, GEOMETRY)
        return self.host.create("kv_connector", "several", self.options, context)

    def view(self, request="one", tokens=TOKENS, **parts):
        """A request with tickets for these children: how many tokens each has, or a list of that."""

        def ticket(child, has):
            return {"child": child, "tokens": has}

        children = {
            child: [ticket(child, one) for one in has] if isinstance(has, list) else ticket(child, has)
            for child, has in parts.items()
        }
        return RequestView(request, tokens, tickets.merged(children), salt=request)

    def reserve(self, view, have=0, tokens=None, blocks=BLOCKS):
        self.world.opened |= set(blocks[0])
        for token in range(have):
            for rank in range(self.world.ranks):
                self.world.write(rank, blocks[0], token, view.salt)
        self.planner.reserve(view, blocks, have, view.tokens - have if tokens is None else tokens)

    def step(self):
        step = self.planner.plan_step()
        self.released += step.released
        self.received += step.received
        assert not set(step.failed) & set(self.failed)
        self.failed.update(step.failed)
        for mover in self.movers:
            mover.submit(step.plan)
        for rank, mover in enumerate(self.movers):
            said = mover.poll()
            self.results += said
            self.planner.on_results(rank, said)
        return step

    def until(self, condition, moves=0.0):
        last = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < last, (self.received, self.failed, self.results)
            self.clock.now += moves
            self.step()
            time.sleep(0.0005)  # for threads that close

    def ends(self, request="one", moves=0.0):
        self.until(lambda: request in self.received or request in self.failed, moves)
        assert [] == self.world.breaches
        return self.failed.get(request)

    def whole(self, view, stop=None, blocks=BLOCKS):
        return all(
            self.world.good(blocks[0], token, view.salt) for token in range(view.tokens if stop is None else stop)
        )

    def total(self, metric, **labels):
        return metrics.total(self.planner.statistics(), metric, **labels)

    def close(self):
        self.planner.close()
        for mover in self.movers:
            mover.close()
        assert [] == self.world.breaches


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr("tensorway_kv.several.planner.time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def bench(clock):
    benches, hosts = [], []

    def make(scripts, ranks=1, seed=1, children=None, **options):
        world = World(seed, ranks, scripts)
        hosts.append(isolated([several(None), world.offer()]))
        host = hosts[-1].__enter__()
        benches.append(Bench(host, clock, world, children or {name: {} for name in scripts}, **options))
        return benches[-1]

    yield make
    for host in reversed(hosts):
        host.__exit__(None, None, None)
    for one in benches:
        one.close()


# -- which children there are


def refused(children, **more):
    with isolated([several(None)]) as host, pytest.raises(OptionsInvalid) as raised:
        host.create("kv_connector", "several", {"children": children, **more}, KVContext("decode", None, "planner"))
    return raised.value


@pytest.mark.parametrize(
    ("children", "said"),
    [
        ([], "There are 0 children"),
        ([{"name": "a", "backend": "b", "sav": "never"}], "Did you mean 'save'?"),
        ([{"name": "a", "backend": "b", "save": "sometimes"}], "The option 'save' is 'sometimes'"),
        ([{"name": "a", "backend": "b", "deadline": 0}], "'deadline' must be >= 0.01"),
        ([{"name": "a/b", "backend": "b"}], "The name is 'a/b'"),
        ([{"name": "a"}], "'backend' has no default and was not given"),
        ([{"name": "a", "backend": "b"}] * 2, "Two children are called 'a'"),
        ([{"name": n, "backend": "b", "options": {"path": "/x"}} for n in "cd"], "have the path '/x'"),
        ([{"name": f"n{n}", "backend": "b"} for n in range(17)], "There are 17 children"),
        ([7], "expected `object`, got `int`"),
    ],
)
def test_children_that_cannot_be_are_refused_in_words(children, said):
    error = refused(children)
    assert said in str(error) and 3 == len(str(error).splitlines())


def test_an_error_about_a_child_names_it():
    assert "child 'files'" in refused([{"name": "files", "backend": "b", "tires": 3}]).asked
    assert "child number 2" in refused([{"name": "a", "backend": "b"}, {"nam": "x"}]).asked


def test_a_child_that_cannot_be_made_ends_the_opening_and_is_named(bench):
    made = bench({"a": Script(), "b": Script()})
    made.world.scripts["b"].raises["open"] = 1.0
    for role in ("planner", "mover"):
        with pytest.raises(BackendUnavailable, match=r"Child 'b'(.|\n)*told to raise"):
            made.make(role)
        assert ("a", role, 0) in made.world.closed
    made.world.closed.clear()  # it is what these were, and not the bench's own
    made.options["children"][1]["options"] = {"chidl": "b"}
    with pytest.raises(OptionsInvalid, match=r"Child 'b'(.|\n)*chidl(.|\n)*Did you mean 'child'"):
        made.make("planner")
    made.options["children"][1]["backend"] = "nobody"
    with pytest.raises(BackendUnavailable, match=r"Child 'b'(.|\n)*No installed plugin offers it"):
        made.make("planner")
    made.world.closed.clear()


def test_each_child_has_a_place_of_its_own(bench):
    made = bench({"a": Script(), "b": Script()}, path="/x")
    assert {("a", "/x/a"), ("b", "/x/b")} == {(child, options.path) for child, _, options in made.world.made}
    made.options["children"][0]["options"]["path"] = "/own"
    made.make("planner").close()
    assert "/own" == made.world.made[-2][2].path


# -- who is asked


def test_the_first_that_has_anything_is_asked_and_named(bench):
    made = bench({"a": Script(), "b": Script(), "c": Script(tokens=99)})
    view = made.view(b=12)
    match = made.planner.lookup(view, 2)
    assert (10, "background", {"b/peer-b": 10}) == (match.tokens, match.mode, dict(match.sources))
    assert 0 == made.world.calls["c", "lookup"]


def test_all_that_have_a_ticket_are_asked_at_once_so_that_they_keep_it_for_this_request(bench):
    made = bench({"a": Script(), "b": Script(), "c": Script(tokens=99)})
    view = made.view(a=TOKENS, b=[TOKENS, 7])
    assert ["a/peer-a"] == [*made.planner.lookup(view, 0).sources]
    assert [1 + 1, 2, 0] == [made.world.calls[child, "lookup"] for child in "abc"]


def test_one_that_does_not_load_is_not_asked(bench):
    made = bench({"a": Script(tokens=99), "b": Script(tokens=9)}, children={"a": {"load": False}, "b": {}})
    assert {"b": 9} == {key.split("/")[0]: n for key, n in made.planner.lookup(made.view(), 0).sources.items()}
    assert 0 == made.world.calls["a", "lookup"]


def test_one_that_does_not_know_yet_starves_nobody(bench):
    made = bench({"a": Script(later=1.0), "b": Script(tokens=99)}, children={"a": {"patience": 3.0}, "b": {}})
    view = made.view(a=19)
    assert ("later", 0) == (made.planner.lookup(view, 0).mode, made.world.calls["b", "lookup"])
    made.clock.now += 2.9
    assert "later" == made.planner.lookup(view, 0).mode
    made.clock.now += 0.1
    assert (19, 1) == (made.planner.lookup(view, 0).tokens, made.world.calls["b", "lookup"])


@pytest.mark.parametrize(
    "ticket",
    [
        {"other": 1},
        {tickets.KEY: 2, "children": {}},
        {tickets.KEY: True, "children": {}},
        {tickets.KEY: 1},
        {tickets.KEY: 1, "children": [1]},
        {tickets.KEY: 1, "children": {"a": 7}},
        {tickets.KEY: 1, "children": {"a": [{}] * 17}},
        {tickets.KEY: 1, "children": {"a": [{}, "x"]}},
        {tickets.KEY: 1, "children": {str(n): {} for n in range(17)}},
    ],
)
def test_a_ticket_that_is_none_is_a_miss(bench, ticket):
    made = bench({"a": Script(tokens=0)})
    assert "nothing" == made.planner.lookup(RequestView("one", TOKENS, ticket), 0).mode
    assert 1 == made.total("kv_tickets_refused_total")


# -- who is next


@pytest.mark.parametrize("have", [0, 3, 8])
def test_what_one_cannot_the_next_one_does_from_where_the_good_tokens_end(bench, have):
    made = bench({"a": Script(fails=1.0), "b": Script(fails=1.0), "c": Script(tokens=99)}, ranks=2)
    view = made.view(a=TOKENS, b=TOKENS)
    made.reserve(view, have)
    assert made.ends() is None and made.whole(view)
    (first, *others) = made.world.fetched
    assert ["a", "b", "c"] == [child for child, *_ in made.world.fetched] and have == first[2]
    starts = [start for _, _, start, _ in made.world.fetched]
    assert starts == sorted(starts) and all(start + tokens == TOKENS for _, _, start, tokens in others)
    assert 2 == made.total("kv_fallbacks_total", cause="lost")


def test_one_ticket_of_a_child_after_the_other(bench):
    made = bench({"a": Script(fails=1.0, causes=("stale",))}, children={"a": {"tries": 1}})
    view = made.view(a=[TOKENS] * 3)
    made.reserve(view)
    good = made.ends()
    assert ["one", "1/one", "2/one"] == [inner for _, inner, *_ in made.world.fetched]
    assert good is not None and made.whole(view, good) and good < TOKENS


def test_names_of_requests_with_several_tickets_are_nobody_elses(bench):
    made = bench({"a": Script(steps=3)})
    twice, once = made.view("one", a=[0, TOKENS]), made.view("1/one", a=TOKENS)
    other = [[20, 21, 22, 23, 24]]
    made.reserve(twice)
    made.reserve(once, blocks=other)
    assert (None, None) == (made.ends("one"), made.ends("1/one"))
    assert {"1/one", "0/1/one"} == {inner for _, inner, *_ in made.world.fetched}
    assert made.whole(twice) and made.whole(once, blocks=other)


def test_what_works_another_time_is_tried_again(bench):
    made = bench({"a": Script(fails=1.0, causes=("failed",))}, children={"a": {"tries": 3}})
    made.reserve(made.view(a=TOKENS))
    assert made.ends(moves=0.05) is not None
    assert 3 == len(made.world.fetched)


def test_one_that_has_the_beginning_only_is_followed_by_the_next(bench):
    made = bench({"a": Script(tokens=10), "b": Script(tokens=99)})
    view = made.view()
    made.reserve(view)
    assert made.ends() is None and made.whole(view)
    assert [("a", 0, 10), ("b", 10, 9)] == [(child, start, tokens) for child, _, start, tokens in made.world.fetched]


def test_beginnings_are_of_no_use_where_a_window_has_lost_its_first_blocks(bench):
    made = bench({"a": Script(tokens=10), "b": Script()})
    made.planner.reserve(made.view(), [[7, 8]], 0, TOKENS)
    made.until(lambda: made.failed)
    assert ({"one": 0}, []) == (made.failed, made.world.fetched)


def test_whole_blocks_are_written_again_by_one_that_has_no_others(bench):
    made = bench({"a": Script(fails=1.0), "b": Script(tokens=99, aligned=True)}, seed=3)
    view = made.view(a=TOKENS)
    made.reserve(view, 3)
    assert made.ends() is None and made.whole(view)
    (_, _, start, tokens) = made.world.fetched[1]
    assert start % BLOCK == 0 or start == 3
    assert TOKENS == start + tokens


def test_one_that_stands_still_is_given_up_and_its_pages_are_waited_for(bench):
    made = bench(
        {"a": Script(hangs=1.0), "b": Script(tokens=99)}, children={"a": {"deadline": 5.0, "tries": 1}, "b": {}}
    )
    view = made.view(a=TOKENS)
    made.reserve(view)
    for _ in range(3):
        made.step()
    made.clock.now += 5.0
    made.step()
    assert made.world.calls["a", "cancel"] and ["a"] == [child for child, *_ in made.world.fetched]
    assert made.ends() is None and made.whole(view)
    assert 1 == made.total("kv_fallbacks_total", cause="deadline")


def test_all_of_it_has_one_deadline(bench):
    made = bench({name: Script(hangs=1.0) for name in "abc"}, deadline=6.0)
    made.reserve(made.view(a=TOKENS, b=TOKENS, c=TOKENS))
    begun = made.clock.now
    good = made.ends(moves=0.5)
    assert good is not None and made.clock.now - begun <= 6.0 + 2.0
    assert "c" not in {child for child, *_ in made.world.fetched}, "its time was over before it was asked"


def test_a_request_that_lost_its_state_is_not_called_good(bench):
    made = bench({"a": Script(fails=1.0), "b": Script(fails=1.0)})
    made.reserve(made.view(a=TOKENS), 8)
    step = made.planner.plan_step()
    made.movers[0].submit(step.plan)
    (said,) = made.movers[0].poll()
    made.planner.on_results(0, [Result("one", "received", "lost", "", 0, said.proof, said.source)])
    assert 0 == made.ends(), "a state that was being overwritten leaves nothing good"


# -- those who were not needed


def test_who_keeps_blocks_is_told_when_all_has_ended_well(bench):
    made = bench({"a": Script(steps=3), "b": Script(), "c": Script(tokens=99)})
    made.reserve(made.view(a=TOKENS, b=[TOKENS, TOKENS]))
    made.step()
    assert [] == made.world.told, "they are what is left if it fails"
    assert made.world.calls["b", "lookup"] and not made.world.calls["c", "lookup"]
    assert made.ends() is None
    assert [("b", "one"), ("b", "1/one")] == made.world.told
    for _ in range(3):
        made.step()
    assert (["one"], {}) == (made.received, made.failed) and not made.planner.busy()


def test_who_was_told_that_a_request_is_over_is_not_mistaken_for_who_loads_it_again(bench):
    made = bench({"a": Script(aligned=True, steps=5), "b": Script()})
    made.reserve(made.view(a=0, b=TOKENS))
    made.until(lambda: made.received)
    assert [("a", "one")] == made.world.told, "and it is still to say so"
    made.planner.reserve(made.view(a=TOKENS), BLOCKS, 0, TOKENS)
    made.step()
    assert (["one"], {"one": 0}) == (made.received, made.failed)
    made.failed.clear()
    made.planner.reserve(made.view(a=TOKENS), BLOCKS, 0, TOKENS)
    made.until(lambda: made.received == ["one", "one"])
    assert ["b", "a"] == [child for child, *_ in made.world.fetched]


def test_an_engine_that_lacks_nothing_lets_all_of_them_know(bench):
    made = bench({"a": Script(), "b": Script()})
    view = made.view(a=TOKENS, b=TOKENS)
    made.planner.reserve(view, BLOCKS, TOKENS, 0)
    made.step()
    assert (["one"], [("a", "one"), ("b", "one")]) == (made.received, made.world.told)
    made.step()
    assert ["one"] == made.received and not made.world.fetched


@pytest.mark.parametrize("when", ["looked-up", "reserved", "waiting"])
def test_a_request_that_is_given_up_ends_once_with_all_of_them(bench, when):
    made = bench({"a": Script(hangs=1.0, later=when == "waiting"), "b": Script(hangs=1.0)})
    view = made.view(a=TOKENS, b=TOKENS)
    made.planner.lookup(view, 0)
    if when != "looked-up":
        made.reserve(view)
        made.step()
    made.planner.cancel("one")
    for _ in range(4):
        made.step()
    assert ({}, []) == ({} if when != "looked-up" else made.failed, made.received)
    assert ("one" in made.failed) == (when != "looked-up")
    assert made.world.calls["a", "cancel"] and not made.planner.busy()
    assert ["a"] * (when == "reserved") == [child for child, *_ in made.world.fetched]


def test_what_a_mover_is_told_to_give_up_goes_to_nobody_else(bench):
    made = bench({"a": Script(hangs=1.0), "b": Script(tokens=99)})
    made.reserve(made.view(a=TOKENS))
    made.step()
    made.movers[0].cancel("one")
    made.movers[0].cancel("another")
    assert made.ends() is not None and ["a"] == [child for child, *_ in made.world.fetched]
    assert 1 == made.world.calls["a", "mover.cancel"]


def test_what_is_forgotten_is_no_fall_back(bench):
    made = bench({"a": Script(fails=1.0, steps=2), "b": Script(tokens=99)})
    made.reserve(made.view(a=TOKENS))
    made.planner.reset()
    assert made.ends() is not None and ["a"] == [child for child, *_ in made.world.fetched]
    assert 1 == made.world.calls["b", "reset"]


# -- those who save


def finished(made, request="one"):
    view = made.view(request, a=TOKENS)
    return made.planner.finish(view, BLOCKS, TOKENS)


def test_all_save_and_the_blocks_are_kept_until_the_last_has_let_go(bench):
    made = bench({"a": Script(keeps=1.0, releases=0.0), "b": Script(keeps=1.0), "c": Script()})
    kept = finished(made)
    assert kept.keep and {"a", "b"} == set(kept.ticket["children"]) and 1 == kept.ticket[tickets.KEY]
    assert [("a", "one", False), ("b", "one", False), ("c", "one", False)] == made.world.finished
    for _ in range(9):
        made.step()
    assert [] == made.released and made.planner.busy()
    made.world.scripts["a"].releases = 1.0
    for _ in range(3):
        made.step()
    assert ["one"] == made.released and not made.planner.busy()


def test_nobody_keeps_what_nobody_wants(bench):
    made = bench({"a": Script()})
    kept = finished(made)
    assert (False, None) == (kept.keep, kept.ticket)


@pytest.mark.parametrize(("keeps", "saves"), [(1.0, False), (0.0, True)])
def test_policies_say_who_saves(bench, keeps, saves):
    made = bench(
        {"a": Script(keeps=keeps), "b": Script(keeps=1.0), "c": Script(keeps=1.0)},
        children={"a": {}, "b": {"save": "otherwise"}, "c": {"save": "never"}},
    )
    finished(made)
    assert [("a", False), ("b", not saves), ("c", True)] == [
        (who, given_up) for who, _, given_up in made.world.finished
    ]


def test_what_is_kept_can_be_taken_back_and_who_raised_keeps_nothing(bench):
    made = bench({"a": Script(keeps=1.0), "b": Script(keeps=1.0, raises={"finish": 1.0})})
    assert {"a"} == set(finished(made).ticket["children"])
    made.planner.cancel("one")
    assert (1, 0) == (made.world.calls["a", "cancel"], made.world.calls["b", "cancel"])


def test_what_was_looked_up_for_a_request_that_has_ended_is_needed_by_nobody(bench):
    made = bench({"a": Script(), "b": Script(keeps=1.0)}, children={"a": {}, "b": {"load": False}})
    view = made.view(a=TOKENS)
    assert made.planner.lookup(view, 0).tokens
    assert {"b"} == set(made.planner.finish(view, BLOCKS, TOKENS).ticket["children"])
    assert ([("a", "one")], 0) == (made.world.told, made.world.calls["a", "cancel"])


def test_what_is_promised_of_a_request_outlives_its_loading(bench):
    made = bench({"a": Script(keeps=1.0), "b": Script(tokens=99), "c": Script()})
    view = made.view(c=TOKENS)
    assert made.planner.lookup(view, 0).tokens
    assert made.planner.promise(view, TOKENS)
    made.reserve(view)
    assert made.ends() is None
    assert 0 == made.world.calls["a", "cancel"], "which would take the promise back"
    assert [("c", "one")] == made.world.told


def test_layers_go_to_those_that_stream(bench):
    made = bench({"a": Script(keeps=1.0), "b": Script()})
    assert {"a"} == set(made.planner.promise(made.view(), TOKENS)["children"])
    made.planner.computes(made.view(), BLOCKS, 0, 4)
    made.movers[0].before_layer(0, 5.0)
    made.movers[0].after_layer(0)
    for method in ("promise", "computes", "mover.before_layer", "mover.after_layer"):
        assert {1} == {made.world.calls[child, method] for child in "ab"}, method
    assert made.planner.capabilities.layerwise and made.movers[0].capabilities.layerwise


def test_layers_are_refused_if_none_of_them_streams(bench):
    made = bench({"a": Script(layerwise=False), "b": Script(layerwise=False)})
    view, planner, mover = made.view(), made.planner, made.movers[0]
    for call, arguments in [
        (planner.promise, (view, 4)),
        (planner.computes, (view, BLOCKS, 0, 4)),
        (mover.before_layer, (0, 1.0)),
        (mover.after_layer, (0,)),
    ]:
        with pytest.raises(Unsupported):
            call(*arguments)


@pytest.mark.parametrize("when", ["under-way", "ended-unknown", "not"])
def test_what_was_computed_with_layers_of_one_that_failed_is_not_called_received(bench, when):
    made = bench({"a": Script(fails=1.0, steps=1 if when == "ended-unknown" else 2), "b": Script(tokens=99)}, seed=4)
    view = made.view(a=TOKENS)
    made.reserve(view)
    step = made.planner.plan_step()
    made.movers[0].submit(step.plan)
    if when == "under-way":
        made.movers[0].before_layer(0, 1.0)
    said = made.movers[0].poll()
    if when == "ended-unknown":
        made.movers[0].before_layer(0, 1.0)
    made.planner.on_results(0, said)
    good = made.ends()
    assert made.whole(view) and ["a", "b"] == [child for child, *_ in made.world.fetched]
    assert good == (None if when == "not" else TOKENS)


def test_layers_of_one_that_did_not_fail_are_what_they_are(bench):
    made = bench({"a": Script(steps=3)})
    made.reserve(made.view(a=TOKENS))
    made.step()
    made.movers[0].before_layer(0, 1.0)
    assert made.ends() is None


# -- what they raise


@pytest.mark.parametrize("method", ["lookup", "reserve", "plan_step", "on_results", "mover.submit", "mover.poll"])
def test_what_a_child_raises_is_its_own_failure(bench, method, caplog):
    made = bench({"a": Script(raises={method: 1.0}), "b": Script(tokens=99)}, ranks=2, faults=3)
    for number in range(6):
        view = made.view(f"r{number}", a=TOKENS)
        made.planner.lookup(view, 0)
        made.reserve(view, blocks=[[number * 5 + n for n in range(5)]])
        assert made.ends(f"r{number}") is None and made.whole(view, blocks=[[number * 5 + n for n in range(5)]])
    made.until(lambda: {("a", "mover", 0), ("a", "mover", 1)} <= made.world.closed)
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert 1 == sum("is out of use" in one for one in set(said)) and all("connector a" in one for one in said)
    before = made.world.calls["a", "plan_step"]
    made.step()
    assert before == made.world.calls["a", "plan_step"]


def test_one_that_raised_over_a_request_is_not_asked_for_it_again(bench):
    made = bench({"a": Script(raises={"lookup": 1.0})}, children={"a": {"tries": 9}}, faults=99)
    view = made.view(a=TOKENS)
    assert 0 == made.planner.lookup(view, 0).tokens
    made.reserve(view)
    assert (0, 1) == (made.ends(moves=0.5), made.world.calls["a", "lookup"])


def test_an_answer_that_is_none_is_a_failure_of_who_gave_it(bench):
    made = bench({"a": Script(), "b": Script(tokens=99)}, faults=2)
    for answer in (None, 7):
        made.planner._children[0].side.lookup = lambda *_, answer=answer: answer
        assert {"b/peer-b": TOKENS} == dict(made.planner.lookup(made.view(repr(answer)), 0).sources)
    made.until(lambda: ("a", "mover", 0) in made.world.closed)


def test_who_raised_when_it_was_told_to_give_up_is_told_again(bench):
    made = bench(
        {"a": Script(hangs=1.0, raises={"cancel": 1.0})}, children={"a": {"deadline": 3600.0}}, deadline=3600.0
    )
    made.reserve(made.view(a=TOKENS))
    made.step()
    made.planner.cancel("one")
    made.world.scripts["a"].raises = {}
    assert made.ends(moves=0.3) is not None
    assert 2 == made.world.calls["a", "cancel"] and made.clock.now < 110.0, "and not only when its time is over"


def test_a_mover_that_did_not_carry_out_a_plan_is_out_of_use_at_once(bench):
    made = bench({"a": Script(hangs=1.0), "b": Script(tokens=99)}, ranks=2, faults=99)
    view = made.view(a=TOKENS)
    made.reserve(view)
    made.step()
    made.world.scripts["a"].raises = {"mover.submit": 1.0}
    assert made.ends() is None and made.whole(view)
    assert 4 == made.world.calls["a", "mover.submit"], "each rank's one good one, and one that was not"


def test_what_was_good_between_forgives_what_was_raised_before(bench):
    made = bench({"a": Script()}, faults=2)
    for number in range(6):
        made.world.scripts["a"].raises = {"plan_step": 1.0}
        made.step()
        made.world.scripts["a"].raises = {}
        made.reserve(made.view(f"r{number}", a=TOKENS))
        assert made.ends(f"r{number}") is None


def test_results_that_a_child_did_not_take_are_told_again(bench):
    made = bench({"a": Script(raises={"on_results": 1.0})}, faults=3)
    made.reserve(made.view(a=TOKENS))
    made.step()
    made.world.scripts["a"].raises = {}
    assert made.ends() is None


def test_what_one_that_is_out_of_use_kept_is_free_when_it_is_closed_everywhere(bench):
    made = bench({"a": Script(keeps=1.0, releases=0.0), "b": Script()}, ranks=2, faults=1)
    assert finished(made).keep
    made.world.scripts["a"].raises = {"mover.poll": 1.0}
    made.until(lambda: made.released)
    assert ["one"] == made.released
    assert {("a", "mover", 0), ("a", "mover", 1)} <= made.world.closed
    assert not made.planner.busy()


def test_no_page_is_given_to_another_before_one_that_is_out_of_use_is_closed(bench, monkeypatch):
    made = bench({"a": Script(hangs=1.0), "b": Script(tokens=99)}, ranks=2, faults=1)
    view = made.view(a=TOKENS)
    made.reserve(view)
    made.step()
    holding = [made.movers[1]._by_name["a"]]
    close, closed, may_end = holding[0].side.close, [], threading.Event()

    def slow(deadline):
        may_end.wait(30)
        close(deadline)
        closed.append(1)

    monkeypatch.setattr(holding[0].side, "close", slow)
    made.world.scripts["a"].raises = {"plan_step": 1.0}
    made.step()
    with pytest.raises(DeadlineExceeded, match="a is not closed"):
        made.movers[1].flush(0.01)
    for _ in range(20):
        made.step()
        assert ["a"] == [child for child, *_ in made.world.fetched]
    may_end.set()
    made.until(lambda: closed)
    made.movers[1].flush(5.0)
    assert made.ends() is None and made.whole(view)


# -- what is said


def test_results_events_and_values_say_whose_they_are(bench):
    made = bench({"a": Script(fails=1.0), "b": Script(tokens=99)})
    made.reserve(made.view(a=TOKENS))
    made.ends()
    assert ["a", "b"] == [one.source for one in made.results]
    assert ["a", "b"] == [one.source for one in made.planner.events()]
    assert {"a", "b"} == {dict(one.labels)["child"] for one in made.planner.statistics() if one.metric == "kv_leases"}
    assert 1 == made.total("kv_fallbacks_total", peer="a/peer-a")
    assert {} == made.movers[0]._begun == made.movers[0]._requests


def test_several_may_hold_several(bench):
    inner = {
        "children": [
            {"name": "x", "backend": "scripted", "options": {"child": "x"}, "tries": 1},
            {"name": "y", "backend": "scripted", "options": {"child": "y"}},
        ]
    }
    made = bench(
        {"a": Script(fails=1.0), "x": Script(fails=1.0), "y": Script(tokens=99)},
        children={"a": {}, "in": {"backend": "several", "options": inner}},
    )
    ticket = tickets.merged(
        {"a": {"child": "a", "tokens": TOKENS}, "in": tickets.merged({"x": {"child": "x", "tokens": TOKENS}})}
    )
    view = RequestView("one", TOKENS, ticket, salt="one")
    made.reserve(view)
    assert made.ends() is None and made.whole(view)
    assert ["a", "in/x", "in/y"] == [one.source for one in made.results]
    assert ["a", "in/x", "in/y"] == [one.source for one in made.planner.events()]
    named = {dict(one.labels).get("child", "") for one in made.planner.statistics()}
    assert {"", "a", "in", "in/x", "in/y"} == named, "the fall-backs of either, and what scripted ones say"


def test_what_a_stranger_says_is_refused(bench):
    made = bench({"a": Script()})
    lies = [
        Result("one", "received", source="nobody"),
        Result("", "heard"),
        Result("", "heard", proof=plans.encode(plans.Said(9, "ended", "a"))),
        Result("", "heard", proof=plans.encode(plans.Said(1, "ended", "nobody"))),
    ]
    made.planner.on_results(0, lies)
    made.planner.on_results(1, [Result("", "heard", proof=plans.encode(plans.Said(1, "ended", "a")))])
    assert 5 == made.total("kv_results_refused_total")
    assert made.world.calls["a", "on_results"] == 0 == len(made.world.closed)


@pytest.mark.parametrize("plan", [b"\xc1", b"\x92\x01\x05", plans.encode(plans.Orders(7, {"a": b""}))])
def test_a_plan_that_is_none_is_refused(bench, plan):
    made = bench({"a": Script()})
    with pytest.raises(DescriptionInvalid):
        made.movers[0].submit(plan)
    with pytest.raises(DescriptionInvalid, match="child b"):
        made.movers[0].submit(plans.encode(plans.Orders(1, {"b": b""})))


# -- the end


def test_one_deadline_is_shared_by_all(bench):
    made = bench({"a": Script(), "b": Script(), "c": Script()})
    waited = made.movers[0]._by_name["c"].side.waited
    made.movers[0].flush(3.0)
    assert 0.0 < waited[0] <= 3.0
    times = []
    for child in made.planner._children:
        child.side.close = lambda deadline: (times.append(deadline), time.sleep(0.05))
    made.planner.close(3.0)
    made.planner.close(3.0)
    assert 3 == len(times) and times[0] <= 1.0 and times[2] <= 2.9
    with pytest.raises(Closed):
        made.planner.plan_step()
    assert (0, False) == (made.planner.lookup(made.view(a=TOKENS), 0).tokens, finished(made).keep)


def test_a_mover_that_cannot_be_closed_says_so_after_the_others_are(bench):
    made = bench({"a": Script(raises={"mover.close": 1.0}), "b": Script()})
    with pytest.raises(RuntimeError, match=r"mover\.close"):
        made.movers[0].close()
    assert ("b", "mover", 0) in made.world.closed


def test_auto_prefers_whatever_needs_no_children():
    assert "handover" == tensorway.decide("kv_connector").winner.name
