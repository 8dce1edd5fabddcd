"""A backend that breaks in any call of either side: no engine ends, requests are answered. Needs vLLM, and no model."""

from __future__ import annotations

import random
import time
import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway.errors import BackendNotFound, OptionsInvalid, TensorwayError
    from tensorway.kv import Match
    from tensorway.kv import Step as Decided
    from tensorway_vllm.testing.breaking import Breaking
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import WISH, Engine, Meeting, settled, until

pytestmark = [
    pytest.mark.timeout(300),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")),
]
PLANNER = ("lookup", "reserve", "plan_step", "finish", "on_results", "cancel", "busy", "statistics")
MOVER = ("submit", "poll", "statistics")
CALLS = [
    *((1, "planner", call) for call in PLANNER),
    *((1, "mover", call) for call in MOVER),
    *((2, *each) for each in (("planner", "on_results"), ("mover", "submit"), ("mover", "poll"))),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    return make(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def meeting():
    made = Meeting()
    yield made
    made.close()


@pytest.fixture(scope="module")
def breaking():
    made = Breaking()
    made.offer()
    return made


@pytest.fixture(scope="module")
def make(model, meeting, breaking):
    """Makes an engine whose backend breaks as it is told; `extra`: options of the connector."""
    engines = []

    def made(name, ranks=1, policy="recompute", role="kv_both", **extra):
        kv = meeting.config(name, policy, role)
        given = kv["kv_connector_extra_config"]
        given["options"] = {"of": name, "options": {**given["options"], "lease": 1.0}}
        given.update({"connector": "breaking", "retry_seconds": 0.05, **extra})
        engines.append(Engine(model, kv, ranks=ranks))
        return engines[-1]

    yield made
    breaking.mend()
    for one in engines:
        one.close()


@pytest.fixture(scope="module")
def pair(make):
    """One whose backend works, and one whose backend breaks, of so many ranks."""
    pairs = {}

    def of(ranks):
        if ranks not in pairs:
            pairs[ranks] = make(f"good-{ranks}", ranks), make(f"bad-{ranks}", ranks)
        return pairs[ranks]

    return of


@pytest.fixture
def words(request):
    numbers = random.Random(request.node.nodeid)
    return lambda count: [numbers.randrange(4, 2000) for _ in range(count)]


@pytest.fixture(autouse=True)
def mended(breaking):
    yield
    breaking.mend()
    breaking.seen.clear()


def ticket_of(engine, prompt):
    [said] = engine.run(engine.add(prompt, 1, WISH))
    return said.params


def ask(good, bad, prompt, ticket, count=3):
    name = bad.add(prompt, count, ticket)
    until(lambda: bad.said[name].reason, good, bad)
    return bad.said[name]


def works_again(good, bad, words):
    """Within a while requests are handed over in both directions."""
    for one, other in ((good, bad), (bad, good)):
        last = time.monotonic() + 60.0
        while True:
            prompt = words(50)
            ticket = ticket_of(one, prompt)
            said = ask(one, other, prompt, ticket)
            assert said.tokens == answer(prompt, 3)
            if said.external == 49:
                break
            assert time.monotonic() < last, "it does not hand over any more"
            time.sleep(0.05)
    settled(good, bad)
    assert [one.leaks() for one in (good, bad)] == ["", ""]


@pytest.mark.parametrize(("ranks", "side", "call"), CALLS, ids=[" ".join(map(str, each)) for each in CALLS])
def test_whatever_a_backend_raises_requests_are_answered_and_later_ones_are_handed_over(
    pair, breaking, words, ranks, side, call
):
    good, bad = pair(ranks)
    works_again(good, bad, words)
    prompt, another = words(70), words(60)
    ticket, given = ticket_of(good, prompt), ticket_of(good, another)
    breaking.breaks(f"bad-{ranks}", side, call)
    aborted, name = bad.add(another, 3, given), bad.add(prompt, 3, ticket)
    bad.step()
    bad.abort(aborted)
    until(lambda: bad.said[name].reason, good, bad)
    assert (bad.said[name].tokens, bad.said[name].reason) == (answer(prompt, 3), "length")
    mine = words(45)
    given = ticket_of(bad, mine)  # perhaps none
    assert ask(bad, good, mine, given).tokens == answer(mine, 3)
    if call not in ("cancel", "statistics"):  # which are not asked for in every step
        assert breaking.seen
    breaking.mend()
    works_again(good, bad, words)


@pytest.mark.parametrize("side", ["planner", "mover"])
def test_a_side_that_cannot_be_made_is_tried_again_and_requests_are_computed_meanwhile(
    make, breaking, words, side, caplog
):
    good, name = make(f"meets-{side}"), f"unmade-{side}"
    breaking.breaks(name, side, "made")
    bad = make(name)
    prompt = words(50)
    for _ in range(3):
        assert ask(good, bad, prompt, ticket_of(good, prompt)).tokens == answer(prompt, 3)
        bad.forget()
        time.sleep(0.1)
        bad.step()
    assert len(breaking.seen) >= 2
    told = [record.getMessage() for record in caplog.records if "a defect" in record.getMessage()]
    assert len([text for text in told if "Report it" in text or "Mend what" in text]) <= 2 * len(breaking.seen)
    breaking.mend()
    works_again(good, bad, words)


def test_pauses_grow_while_nothing_can_be_made():
    from tensorway_vllm.handover.making import Pause

    pause = Pause(1.0)
    assert [pause.begin() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60] and not pause.over
    pause.forget()
    assert pause.begin() == 1.0


def test_what_is_wrong_once_is_told_once_and_counted_each_time(caplog):
    from tensorway.kv import METRICS
    from tensorway.metrics import Counters
    from tensorway_vllm.handover.making import Troubles

    counts = Counters(METRICS, backend="vllm")
    troubles = Troubles(counts)

    def fails():
        raise KeyError("page")

    for _ in range(3):
        assert troubles.guard("do it", fails, "otherwise") == "otherwise"
    [told] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.getMessage().splitlines() == [
        "A connector of TensorwayConnector was to do it.",
        "  It raised KeyError: 'page'",
        "  Requests are computed meanwhile. Report it to who made the connector.",
    ]
    assert [sample.value for sample in counts.samples()] == [3]


def test_a_request_that_is_to_wait_for_ever_is_computed(make, breaking, words):
    good, bad = make("prompt"), make("later", later_seconds=0.3)
    works_again(good, bad, words)
    breaking.breaks("later", "planner", "lookup", lambda real, *given: Match(0, "later"))
    prompt = words(50)
    began = time.monotonic()
    assert ask(good, bad, prompt, ticket_of(good, prompt)).tokens == answer(prompt, 3)
    assert time.monotonic() - began >= 0.3 and bad.said
    breaking.mend()
    works_again(good, bad, words)


@pytest.mark.parametrize("abort", [False, True], ids=["waited for", "aborted"])
def test_a_mover_that_says_nothing_is_closed_before_its_pages_are_used(make, breaking, words, abort):
    kind = "aborted" if abort else "kept"
    good, bad = make(f"speaks-{kind}"), make(f"silent-{kind}", parked_seconds=0.3)
    works_again(good, bad, words)
    closed = []

    def close(real, *given):
        closed.append(True)
        real.close(*given)

    prompt = words(50)
    ticket = ticket_of(good, prompt)
    breaking.breaks(f"silent-{kind}", "mover", "poll", lambda real: [])
    breaking.breaks(f"silent-{kind}", "mover", "close", close)
    name = bad.add(prompt, 3, ticket)
    until(lambda: bad.parked(name), bad)
    if abort:
        bad.abort(name)
    until(lambda: bad.status(name) != "WAITING_FOR_REMOTE_KVS" and not bad.leaks(), good, bad)
    assert closed and (abort or bad.said[name].tokens == answer(prompt, 3))
    breaking.mend()
    works_again(good, bad, words)


def test_of_requests_that_are_not_parked_or_kept_vllm_hears_nothing(make, breaking, words):
    good, bad = make("honest"), make("liar")
    works_again(good, bad, words)
    running = bad.add(words(30), 40)

    def lies(real):
        true = real.plan_step()
        false = ("nobody", running)
        received, released = [*true.received, *true.received, *false], [*true.released, *true.released, *false]
        return Decided(released, received, {**true.failed, "nobody": 0, running: 16}, true.plan)

    breaking.breaks("liar", "planner", "plan_step", lies)
    prompt = words(50)
    said = ask(good, bad, prompt, ticket_of(good, prompt))
    assert said.tokens == answer(prompt, 3) and said.external == 49
    [long] = bad.run(running)
    assert long.reason == "length" and len(long.tokens) == 40
    mine = words(40)
    assert ask(bad, good, mine, ticket_of(bad, mine)).external == 39


def test_with_the_policy_to_fail_only_the_request_fails(make, breaking, words):
    good, bad = make("gives"), make("fails", policy="fail")
    works_again(good, bad, words)
    prompt = words(50)
    ticket = ticket_of(good, prompt)
    breaking.breaks("fails", "mover", "submit")
    assert ask(good, bad, prompt, ticket).reason == "error"
    other = words(33)
    assert ask(good, bad, other, None).tokens == answer(other, 3)
    breaking.mend()
    works_again(good, bad, words)


def test_an_engine_takes_and_gives_what_its_role_says(make, words):
    prefills, decodes = make("prefills", role="kv_producer"), make("decodes", role="kv_consumer")
    settled(prefills, decodes)
    prompt, another = words(50), words(40)
    ticket = ticket_of(prefills, prompt)
    said = ask(prefills, decodes, prompt, {**ticket, **WISH})
    assert (said.tokens, said.external, said.params) == (answer(prompt, 3), 49, None)
    assert ticket_of(decodes, another) is None
    other = make("both")
    settled(other)
    assert ask(other, prefills, another, ticket_of(other, another)).external == 0
    settled(prefills, decodes, other)


def test_no_more_than_a_share_of_the_pages_is_kept_for_others(make, words):
    one = make("little", max_kept=0.2)  # of 32 pages: one prompt of four, not two
    settled(one)
    assert ticket_of(one, words(60)) is not None and ticket_of(one, words(60)) is None
    settled(one)  # the lease has ended
    assert ticket_of(one, words(60)) is not None


@pytest.mark.parametrize(
    ("wrong", "kind", "told"),
    [
        ({"retry_secnds": 1.0}, OptionsInvalid, "Did you mean 'retry_seconds'?"),
        ({"max_kept": "half"}, OptionsInvalid, "'max_kept'"),
        ({"layout": "LHBNC"}, OptionsInvalid, "layout"),
        ({"rendezvous": "direkt"}, BackendNotFound, "Did you mean 'direct'?"),
        ({"connector": "handovr"}, BackendNotFound, "Did you mean 'handover'?"),
        ({"options": {"deadlne": 1.0}}, OptionsInvalid, "Did you mean 'deadline'?"),
        ({"options": {"transport": "locl"}}, BackendNotFound, "Did you mean 'local'?"),
        ({"options": {"transport": "local", "transport_options": {"x": 1}}}, OptionsInvalid, "'x'"),
        ({"rendezvous_options": {"adress": "x"}}, OptionsInvalid, "Did you mean 'address'?"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else None,
)
def test_a_configuration_that_is_wrong_ends_the_start_and_says_what_was_meant(model, meeting, wrong, kind, told):
    kv = meeting.config("wrong")
    kv["kv_connector_extra_config"].update(wrong)
    with pytest.raises(TensorwayError) as caught:
        Engine(model, kv)
    assert type(caught.value) is kind and told in str(caught.value)
