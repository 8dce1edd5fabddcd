"""Requests that are handed over and end early, or go wrong, in vLLM's own scheduler. Needs vLLM, and no model."""

from __future__ import annotations

import time
import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import WISH, settled, until

PAGE = 16
LOOPS = pytest.mark.parametrize("loop", [False, True], ids=["waiting", "ahead"])


def let(both, **rates):
    """From now on reads of the decoding engine go wrong like this, on all its ranks."""
    for rank in range(len(both.decode.ranks)):
        both.fabric(rank).faults.rates = rates


def release(both):
    """Nothing goes wrong any more, and what stalled moves now."""
    let(both)
    for rank in range(len(both.decode.ranks)):
        both.fabric(rank).release()


def warm(both, words):
    """Both engines have had a step, and the decoding one has read something: its fabric is there, and connected."""
    prompt = words(40)
    both.run(both.decode.add(prompt, 1, both.ticket(prompt)))


def parked(both, prompt, count=3, **more):
    """A request whose pages are on their way and do not come."""
    ticket = both.ticket(prompt)
    let(both, stall=1.0)
    name = both.decode.add(prompt, count, ticket, **more)
    until(lambda: both.decode.parked(name), both.decode)
    return name


# -- ended by the client


def test_a_request_that_waits_is_aborted_before_anybody_looked_at_it(pair, words):
    both, prompt = pair(options={"lease": 0.5}), words(64)
    name = both.decode.add(prompt, 3, both.ticket(prompt))
    both.decode.abort(name)
    assert both.decode.status(name) == "gone"
    settled(both.decode)
    assert both.decode.free == both.decode.blocks


@LOOPS
def test_a_request_that_is_parked_is_aborted_and_its_pages_stay_until_nobody_writes_there(pair, words, loop):
    both = pair(faulty=True, async_scheduling=loop, options={"lease": 1.0})
    warm(both, words)
    name = parked(both, words(64))
    free = both.decode.free
    both.decode.abort(name)
    for _ in range(3):
        both.decode.step()
    assert both.decode.free == free, "its pages were given away while somebody may write to them"
    release(both)
    until(lambda: both.decode.free == both.decode.blocks, both.decode, both.prefill)


@LOOPS
def test_a_request_that_runs_is_aborted(pair, words, loop):
    both, prompt = pair(async_scheduling=loop), words(64)
    name = both.decode.add(prompt, 50, both.ticket(prompt))
    until(lambda: len(both.decode.said[name].tokens) > 3, both.decode, both.prefill)
    both.decode.abort(name)
    settled(both.decode, both.prefill)


def test_a_request_is_aborted_in_the_step_in_which_its_pages_arrive(pair, words):
    both, prompt = pair(), words(64)
    name = both.decode.add(prompt, 3, both.ticket(prompt))
    while both.decode.parked(name) or both.decode.status(name) == "WAITING":
        if both.decode.parked(name) and name in both.decode.scheduler.finished_recving_kv_req_ids:
            break
        both.step()
    both.decode.abort(name)
    settled(both.decode, both.prefill)


def test_requests_are_aborted_after_each_number_of_steps(pair, words):
    both = pair(options={"lease": 0.5})
    for steps in range(9):
        prompt = words(64)
        name = both.decode.add(prompt, 4, both.ticket(prompt))
        for _ in range(steps):
            both.step()
        both.decode.abort(name, computing=steps % 2 == 1)
    settled(both.decode, both.prefill)


def test_a_request_that_is_to_be_handed_over_is_aborted_while_it_is_computed(pair, words):
    both = pair(max_num_batched_tokens=32)
    names = [both.prefill.add(words(150), 1, WISH) for _ in range(3)]
    both.prefill.step()
    both.prefill.abort(names[0])
    both.prefill.abort(names[1], computing=True)
    both.prefill.step()
    assert both.prefill.said[names[1]].params is None
    both.prefill.abort(names[2])
    settled(both.prefill)
    assert both.prefill.free == both.prefill.blocks, "pages of a request that was given up were kept"


def test_a_request_whose_pages_are_kept_is_aborted_by_a_client_that_is_late(pair, words):
    both, prompt = pair(), words(64)
    name = both.prefill.add(prompt, 1, WISH)
    [said] = both.prefill.run(name)
    both.prefill.abort(name)  # vLLM has it still, as finished, for its pages are kept
    [answered] = both.run(both.decode.add(prompt, 3, said.params))
    assert answered.tokens == answer(prompt, 3)
    settled(both.decode, both.prefill)


def test_a_client_that_is_gone_before_its_request_was_admitted_leaves_nothing(pair, words):
    both, prompt = pair(options={"lease": 0.5}), words(64)
    name = both.decode.add(prompt, 3, both.ticket(prompt), abort_immediately=True)
    both.decode.said[name].reason = "abort"
    [said] = both.run(both.decode.add(prompt, 2))
    assert said.tokens == answer(prompt, 2) and both.decode.status(name) == "gone"
    settled(both.decode)
    assert both.decode.free == both.decode.blocks


# -- not enough room


def test_while_a_request_is_parked_another_one_has_no_room_and_both_end(pair, words):
    both, prompt, other = pair(faulty=True, decode={"pages": 16}), words(150), words(150)
    warm(both, words)
    name = parked(both, prompt)
    second = both.decode.add(other, 3, both.ticket(other))
    for _ in range(5):
        both.decode.step()
    assert both.decode.status(second) == "WAITING" and both.decode.parked(name)
    release(both)
    first, last = both.run(name, second)
    assert first.tokens == answer(prompt, 3) and last.tokens == answer(other, 3)


@LOOPS
def test_a_request_that_was_loaded_is_preempted_and_says_the_same(pair, words, loop):
    both = pair(decode={"pages": 16}, async_scheduling=loop)
    prompts = [words(64), words(64)]
    names = [both.decode.add(prompt, 100, both.ticket(prompt)) for prompt in prompts]
    requests = [both.decode.scheduler.requests[name] for name in names]
    for prompt, said in zip(prompts, both.run(*names), strict=True):
        assert said.tokens == answer(prompt, 100)
    assert sum(request.num_preemptions for request in requests) > 0, "nobody was preempted, so this shows nothing"


def test_a_request_that_is_to_be_handed_over_is_preempted_and_its_pages_are_right(pair, words):
    both, prompts = pair(prefill={"pages": 16}), [words(64), words(64)]
    names = [both.prefill.add(prompt, 80, WISH) for prompt in prompts]
    requests = [both.prefill.scheduler.requests[name] for name in names]
    for name, prompt in zip(names, prompts, strict=True):  # the second has no room until the first was fetched
        [said] = both.prefill.run(name)
        assert said.tokens == answer(prompt, 80)
        [said] = both.run(both.decode.add(prompt, 3, said.params))
        assert said.tokens == answer(prompt, 3)
    assert sum(request.num_preemptions for request in requests) > 0, "nobody was preempted, so this shows nothing"


# -- reset


def test_the_prefix_cache_is_reset_while_a_request_runs_that_was_loaded(pair, words):
    both, prompt = pair(), words(64)
    name = both.decode.add(prompt, 20, both.ticket(prompt))
    until(lambda: len(both.decode.said[name].tokens) > 3, both.decode, both.prefill)
    assert both.decode.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True) is not None
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 20)


def test_the_prefix_cache_is_reset_while_a_request_is_parked(pair, words):
    both, prompt = pair(faulty=True), words(64)
    warm(both, words)
    name = parked(both, prompt)
    both.decode.scheduler.reset_prefix_cache(reset_connector=True)
    both.decode.step()
    release(both)
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 3)


def test_the_prefix_cache_is_reset_while_pages_are_kept(pair, words):
    both, prompt = pair(), words(64)
    ticket = both.ticket(prompt)
    both.prefill.scheduler.reset_prefix_cache(reset_connector=True)
    [said] = both.run(both.decode.add(prompt, 3, ticket))
    assert said.tokens == answer(prompt, 3)


# -- loads that fail

FAULTS = ["refuse", "partial", "late", "lose"]


@LOOPS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_that_fails_is_computed_if_the_engine_is_to_recompute(pair, words, fault, loop):
    both, prompt = pair(faulty=True, async_scheduling=loop, options={"lease": 1.0, "deadline": 1.0}), words(64)
    warm(both, words)
    ticket, beside = both.ticket(prompt), words(30)
    let(both, **{fault: 1.0})
    names = [both.decode.add(prompt, 3, ticket), both.decode.add(beside, 3)]
    said, other = both.run(*names)
    assert said.tokens == answer(prompt, 3) and other.tokens == answer(beside, 3)
    release(both)


@LOOPS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_that_fails_is_told_to_its_client_alone_if_the_engine_is_to_fail(pair, words, fault, loop):
    options = {"lease": 1.0, "deadline": 1.0}
    both, prompt = pair(faulty=True, policy="fail", async_scheduling=loop, options=options), words(64)
    warm(both, words)
    ticket, beside = both.ticket(prompt), words(30)
    let(both, **{fault: 1.0})
    names = [both.decode.add(prompt, 3, ticket), both.decode.add(beside, 30)]
    said, other = both.run(*names)
    assert (said.reason, said.tokens) == ("error", [])
    assert other.tokens == answer(beside, 30) and other.reason == "length"
    release(both)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_what_failed_to_load_is_in_no_prefix_cache(pair, words, policy):
    both, prompt = pair(faulty=True, policy=policy, options={"lease": 1.0, "deadline": 1.0}), words(100)
    warm(both, words)
    ticket = both.ticket(prompt)
    let(both, partial=1.0)
    name = both.decode.add(prompt, 1, ticket)
    until(lambda: not both.decode.parked(name) and both.decode.status(name) != "WAITING", both.decode, both.prefill)
    release(both)
    both.run(name)
    [said] = both.decode.run(both.decode.add(prompt, 3))  # pages that it finds cached are looked at
    assert said.tokens == answer(prompt, 3)
    assert said.cached == 0 if policy == "fail" else said.cached >= 96 - PAGE


def test_a_prefix_that_was_cached_before_a_load_failed_is_good_still(pair, words):
    both, prompt = pair(faulty=True, options={"lease": 1.0, "deadline": 1.0}), words(100)
    warm(both, words)
    both.decode.run(both.decode.add(prompt[:50], 1))
    ticket = both.ticket(prompt)
    let(both, refuse=1.0)
    [said] = both.run(both.decode.add(prompt, 3, ticket))
    assert said.tokens == answer(prompt, 3)
    release(both)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_the_engine_that_prefilled_is_gone(pair, words, engines, policy):
    both, prompt = pair(policy=policy, options={"deadline": 2.0, "presence": 1.0}), words(64)
    warm(both, words)
    ticket = both.ticket(prompt)
    both.prefill.close()
    engines.remove(both.prefill)
    name = both.decode.add(prompt, 3, ticket)
    [said] = both.decode.run(name)
    assert said.tokens == answer(prompt, 3) or (policy == "fail" and said.reason == "error")


def test_a_load_that_stalls_beyond_its_deadline_holds_nobody_else_up(pair, words):
    both, prompt = pair(faulty=True, options={"lease": 30.0, "deadline": 0.5}), words(64)
    warm(both, words)
    name = parked(both, prompt)
    try:
        began = time.monotonic()
        while time.monotonic() < began + 1.5:  # beyond the deadline, after which the transfer is cancelled
            beside = words(30)
            [said] = both.decode.run(both.decode.add(beside, 3))
            assert said.tokens == answer(beside, 3)
        assert time.monotonic() < began + 20.0, "a step waited for the stalled load"
        assert both.decode.parked(name), "its pages were given away while somebody may write to them"
    finally:
        release(both)
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 3)


def test_several_loads_of_which_some_fail_leave_the_others_alone(pair, words):
    both = pair(faulty=True, pages=96, options={"lease": 1.0, "deadline": 1.0})
    warm(both, words)
    prompts = [words(40 + 9 * place) for place in range(6)]
    tickets = [both.ticket(prompt) for prompt in prompts]
    let(both, refuse=0.3, partial=0.2)
    names = [both.decode.add(prompt, 4, ticket) for prompt, ticket in zip(prompts, tickets, strict=True)]
    for prompt, said in zip(prompts, both.run(*names), strict=True):
        assert said.tokens == answer(prompt, 4)
    release(both)
