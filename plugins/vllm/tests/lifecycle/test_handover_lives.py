"""Requests that are handed over, from their arrival to their end, by vLLM's own scheduler. Needs vLLM, and no model."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import WISH, settled, until

PAGE = 16
#: vLLM's engine core waits for each step, or schedules the next one before it has heard of the last.
LOOPS = pytest.mark.parametrize("loop", [False, True], ids=["waiting", "ahead"])


def whole(prompt):
    """Tokens of its whole pages, but for the last token, which is always computed."""
    return (len(prompt) - 1) // PAGE * PAGE


@LOOPS
def test_a_request_is_prefilled_here_and_decoded_there(pair, words, loop):
    both, prompt = pair(async_scheduling=loop), words(100)
    ticket = both.ticket(prompt)
    assert both.prefill.free < both.prefill.blocks  # kept for who comes with the ticket
    name = both.decode.add(prompt, 6, ticket)
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 6) and said.reason == "length"
    assert said.external >= whole(prompt)
    until(lambda: both.prefill.free == both.prefill.blocks, both.prefill, both.decode)


def test_the_engine_that_prefills_says_the_first_token_and_the_ticket(pair, words):
    both, prompt = pair(), words(40)
    [said] = both.prefill.run(both.prefill.add(prompt, 1, WISH))
    assert said.tokens == answer(prompt, 1) and set(said.params) == {"tensorway"}
    [said] = both.run(both.decode.add(prompt, 2, said.params))
    assert said.tokens == answer(prompt, 2)


def test_a_request_without_the_wish_is_given_no_ticket_and_keeps_nothing(pair, words):
    both = pair()
    [said] = both.prefill.run(both.prefill.add(words(60), 3))
    settled(both.prefill)
    assert said.params is None and both.prefill.free == both.prefill.blocks


def test_while_pages_are_on_their_way_nothing_of_the_request_is_computed_or_cached(pair, words):
    both, prompt = pair(faulty=True), words(70)
    both.run(both.decode.add(prompt[::-1], 1, both.ticket(prompt[::-1])))  # now its fabric is there, and connected
    ticket = both.ticket(prompt)
    both.fabric().faults.rates = {"stall": 1.0}
    name = both.decode.add(prompt, 3, ticket)
    until(lambda: both.decode.parked(name), both.decode)
    for _ in range(5):
        assert not both.decode.step()
    assert both.decode.parked(name) and not both.decode.said[name].tokens
    assert both.decode.free < both.decode.blocks
    cached = both.decode.scheduler.kv_cache_manager.get_computed_blocks(both.decode.scheduler.requests[name])
    assert cached[1] == 0
    both.fabric().faults.rates = {}
    both.fabric().release()
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 3) and said.external >= whole(prompt)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33])
def test_short_prompts_and_those_of_whole_pages_are_answered_alike(pair, words, count):
    both, prompt = pair(), words(count)
    ticket = both.ticket(prompt)
    [said] = both.run(both.decode.add(prompt, 5, ticket))
    assert said.tokens == answer(prompt, 5) and said.external >= whole(prompt)


def test_a_prompt_that_is_longer_than_a_step_computes_is_handed_over_whole(pair, words):
    both, prompt = pair(max_num_batched_tokens=32), words(150)
    [said] = both.run(both.decode.add(prompt, 5, both.ticket(prompt)))
    assert said.tokens == answer(prompt, 5) and said.external >= whole(prompt)


def test_what_is_in_the_prefix_cache_already_is_not_fetched(pair, words):
    both, prompt = pair(), words(100)
    both.decode.run(both.decode.add(prompt, 1))
    ticket = both.ticket(prompt)
    [said] = both.run(both.decode.add(prompt, 4, ticket))
    assert said.tokens == answer(prompt, 4) and said.external < PAGE
    until(lambda: both.prefill.free == both.prefill.blocks, both.prefill, both.decode)


def test_of_a_prompt_that_is_half_in_the_prefix_cache_the_rest_is_fetched(pair, words):
    both, prompt = pair(), words(100)
    both.decode.run(both.decode.add(prompt[:50], 1))
    [said] = both.run(both.decode.add(prompt, 4, both.ticket(prompt)))
    assert said.tokens == answer(prompt, 4)
    assert whole(prompt) - 3 * PAGE <= said.external <= 100 - 3 * PAGE


def test_what_was_fetched_is_in_the_prefix_cache_afterwards(pair, words):
    both, prompt = pair(), words(100)
    both.run(both.decode.add(prompt, 1, both.ticket(prompt)))
    [said] = both.decode.run(both.decode.add(prompt, 1))
    assert said.tokens == answer(prompt, 1) and said.cached >= whole(prompt) and said.external == 0


@LOOPS
def test_several_at_once_are_told_apart(pair, words, loop):
    both = pair(pages=96, async_scheduling=loop)
    prompts = [words(20 + 13 * place) for place in range(7)]
    tickets = [both.prefill.add(prompt, 1, WISH) for prompt in prompts]
    tickets = [said.params for said in both.prefill.run(*tickets)]
    names = []
    for place, (prompt, ticket) in enumerate(zip(prompts, tickets, strict=True)):
        names.append(both.decode.add(prompt, 3 + place, ticket))
        names.append(both.decode.add(words(30 + place), 4))
        both.step()
    both.run(*names)
    for place, (prompt, name) in enumerate(zip(prompts, names[::2], strict=True)):
        assert both.decode.said[name].tokens == answer(prompt, 3 + place)
        assert both.decode.said[name].external >= whole(prompt)


def test_one_ticket_for_two_requests_serves_one_and_the_other_is_computed_or_served(pair, words):
    both, prompt = pair(), words(64)
    ticket = both.ticket(prompt)
    names = [both.decode.add(prompt, 3, ticket), both.decode.add(prompt, 3, ticket)]
    for said in both.run(*names):
        assert said.tokens == answer(prompt, 3)


def test_a_producer_whose_consumer_never_comes_has_its_pages_back_after_the_lease(pair, words):
    both = pair(options={"lease": 0.3})
    assert both.ticket(words(64)) is not None
    assert both.prefill.free < both.prefill.blocks and both.prefill.busy  # vLLM's loop must go on for it
    until(lambda: both.prefill.free == both.prefill.blocks, both.prefill)


def test_a_ticket_that_is_too_late_is_computed(pair, words):
    both, prompt = pair(options={"lease": 0.3}), words(64)
    ticket = both.ticket(prompt)
    until(lambda: both.prefill.free == both.prefill.blocks, both.prefill)
    [said] = both.run(both.decode.add(prompt, 3, ticket))
    assert said.tokens == answer(prompt, 3)


def test_an_engine_does_what_its_role_says(engine, meeting, words):
    prompt, roles = words(64), ("kv_producer", "kv_consumer")
    gives, takes = (engine(meeting.config(f"only-{role}", role=role)) for role in roles)
    [said] = gives.run(gives.add(prompt, 1, WISH))
    name = takes.add(prompt, 3, {**said.params, **WISH})
    until(lambda: takes.said[name].reason, gives, takes)
    assert takes.said[name].tokens == answer(prompt, 3) and takes.said[name].external >= whole(prompt)
    assert takes.said[name].params is None  # it hands nothing over
    [again] = gives.run(gives.add(words(64), 3, said.params))
    assert again.external == 0  # it fetches nothing


JUNK = [
    {},
    {"tensorway": None},
    {"tensorway": "x" * 100_000},
    {"tensorway": {}},
    {"tensorway": {"seal": 5, "engine": ["a"], "blocks": -1}},
    {"tensorway": [1, 2]},
    {"hand_over": "yes"},
    {"hand_over": True, "tensorway": {"a": {"b": {"c": None}}}},
    {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [1, 2]},
    {"do_remote_decode": True},
    {"tensorway": {str(place): place for place in range(2000)}},
]


@pytest.mark.parametrize("params", JUNK, ids=range(len(JUNK)))
def test_whatever_a_client_writes_as_a_ticket_is_computed(pair, words, params):
    both, prompt = pair(options={"lease": 0.3}), words(40)
    [said] = both.decode.run(both.decode.add(prompt, 2, params))
    assert said.tokens == answer(prompt, 2) and said.external == 0


def test_a_ticket_whose_seal_was_changed_is_computed(pair, words):
    both, prompt = pair(), words(64)
    ticket = both.ticket(prompt)
    forged = {"tensorway": {**ticket["tensorway"], "seal": "0" * 64}}
    [said] = both.run(both.decode.add(prompt, 3, forged))
    assert said.tokens == answer(prompt, 3) and said.external == 0
    [said] = both.run(both.decode.add(prompt, 3, ticket))  # the real one is good still
    assert said.tokens == answer(prompt, 3)


def test_a_ticket_of_another_prompt_is_never_taken_for_this_one(pair, words):
    both, prompt, other = pair(options={"lease": 0.5}), words(64), words(64)
    ticket = both.ticket(other)
    name = both.decode.add(prompt, 3, ticket)
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 3)
