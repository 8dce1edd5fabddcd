"""Several workers, several cache groups, and what vLLM decides by the connector's class. Needs vLLM, and no model."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from vllm.v1.core.sched.scheduler import Scheduler

    from tensorway_vllm.testing.hollow import WrongPages, answer
    from tensorway_vllm.testing.scheduling import WISH, Engine, settled, until

PAGE = 16
RANKS = pytest.mark.parametrize("ranks", [2, 4])


def warm(both, words):
    prompt = words(40)
    both.run(both.decode.add(prompt, 1, both.ticket(prompt)))


# -- several workers


@RANKS
def test_each_rank_is_handed_its_own_part(pair, words, ranks):
    both, prompts = pair(ranks=ranks), [words(64), words(50)]
    for prompt in prompts:
        [said] = both.run(both.decode.add(prompt, 5, both.ticket(prompt)))
        assert said.tokens == answer(prompt, 5) and said.external >= 48


@RANKS
@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("fault", ["refuse", "partial"])
def test_a_request_of_which_one_rank_fails_has_failed_once(pair, words, ranks, policy, fault):
    options = {"lease": 1.0, "deadline": 1.0}
    both, prompt = pair(faulty=True, ranks=ranks, policy=policy, options=options), words(64)
    warm(both, words)
    ticket = both.ticket(prompt)
    both.fabric(ranks - 1).faults.rates = {fault: 1.0}
    [said] = both.run(both.decode.add(prompt, 3, ticket))
    if policy == "fail":
        assert (said.reason, said.tokens) == ("error", [])
    else:
        assert said.tokens == answer(prompt, 3)
    both.fabric(ranks - 1).faults.rates = {}
    both.fabric(ranks - 1).release()
    [said] = both.run(both.decode.add(prompt, 3))  # nothing of it is cached wrongly, on no rank
    assert said.tokens == answer(prompt, 3)


@RANKS
def test_a_request_waits_for_the_rank_that_is_last(pair, words, ranks):
    both, prompt = pair(faulty=True, ranks=ranks), words(64)
    warm(both, words)
    ticket = both.ticket(prompt)
    slow = both.fabric(0)
    slow.faults.rates = {"stall": 1.0}
    name = both.decode.add(prompt, 3, ticket)
    until(lambda: both.decode.parked(name), both.decode)
    for _ in range(20):
        both.step()
    assert both.decode.parked(name)
    slow.faults.rates = {}
    slow.release()
    [said] = both.run(name)
    assert said.tokens == answer(prompt, 3) and said.external >= 48


def told_later(engine, number, steps):
    """What a rank's worker side says comes so many steps later, as if its process were slow."""
    held = []

    def say(output):
        held.append(output.kv_connector_worker_meta)
        output.kv_connector_worker_meta = held.pop(0) if len(held) > steps else None
        return output

    engine.ranks[number].said = say


def told_twice(engine, number):
    """What a rank's worker side says is said again with what it says next."""
    before = [None]

    def say(output):
        now = output.kv_connector_worker_meta
        if before[0] is not None:
            output.kv_connector_worker_meta = before[0].aggregate(now) if now is not None else before[0]
        before[0] = now
        return output

    engine.ranks[number].said = say


@RANKS
def test_a_rank_whose_word_comes_later_delays_a_request_and_nothing_else(pair, words, ranks):
    both = pair(ranks=ranks)
    warm(both, words)
    told_later(both.decode, 1, 7)
    told_later(both.prefill, 1, 5)
    for _ in range(3):
        prompt = words(64)
        [said] = both.run(both.decode.add(prompt, 3, both.ticket(prompt)))
        assert said.tokens == answer(prompt, 3)


@RANKS
def test_a_rank_that_says_everything_twice_is_heard_once(pair, words, ranks):
    both = pair(ranks=ranks)
    warm(both, words)
    for number in range(ranks):
        told_twice(both.decode, number)
        told_twice(both.prefill, number)
    names, prompts = [], [words(64) for _ in range(3)]
    for prompt in prompts:
        names.append(both.decode.add(prompt, 3, both.ticket(prompt)))
    for prompt, said in zip(prompts, both.run(*names), strict=True):
        assert said.tokens == answer(prompt, 3)


def test_words_of_a_rank_survive_in_any_order_of_the_ranks(pair, words):
    both, prompt = pair(ranks=4), words(64)
    warm(both, words)
    executor = both.decode.core.model_executor
    aggregate = executor.kv_output_aggregator.aggregate

    def backwards(outputs, output_rank=0):
        last = len(outputs) - 1
        return aggregate([*reversed(outputs)], last - output_rank)

    executor.kv_output_aggregator.aggregate = backwards
    [said] = both.run(both.decode.add(prompt, 3, both.ticket(prompt)))
    assert said.tokens == answer(prompt, 3)


# -- what vLLM decides by the class


def test_vllms_hybrid_cache_manager_stays_on(pair, gemma):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma

    from tensorway_vllm.handover import TensorwayConnector

    assert supports_hma(TensorwayConnector)
    both = pair()
    assert not both.decode.core.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager


def test_the_layout_is_the_one_that_the_connector_can_hand_over(model, meeting, engines, words):
    made = Engine(model, meeting.config("layouts"), layouts=["LBNHC", "LBHNC"])
    engines.append(made)
    assert made.core.vllm_config.cache_config.kv_cache_layout == "LBHNC"


def test_a_scheduler_that_builds_its_metadata_itself_gets_ours(pair, words, monkeypatch):
    both, prompt, built = pair(), words(64), []
    whole = Scheduler._build_kv_connector_meta

    def build(self, connector, scheduler_output):
        built.append(whole(self, connector, scheduler_output))
        return built[-1]

    monkeypatch.setattr(Scheduler, "_build_kv_connector_meta", build)
    [said] = both.run(both.decode.add(prompt, 3, both.ticket(prompt)))
    assert said.tokens == answer(prompt, 3)
    assert built and {type(each).__module__.partition(".")[0] for each in built} == {"tensorway_vllm"}


def test_a_connector_that_is_shut_down_twice_is_shut_down(model, meeting, words):
    made = Engine(model, meeting.config("twice"))
    made.run(made.add(words(20), 2))
    made.close()
    made.close()


def test_an_engine_without_work_is_not_stepped_for_nothing(pair, words):
    both = pair()
    warm(both, words)
    settled(both.prefill, both.decode)
    assert not both.prefill.busy and not both.decode.busy


# -- several cache groups


def test_windows_and_full_attention_are_handed_over_together(pair, gemma, words):
    both, prompt = pair(model=gemma, kind="gemma2", pages=96), words(150)
    assert len(both.decode.scheduler.kv_cache_config.kv_cache_groups) == 2
    ticket = both.ticket(prompt)
    [said] = both.run(both.decode.add(prompt, 30, ticket))
    assert said.tokens == answer(prompt, 30) and said.external >= 144


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_load_into_several_groups_that_fails_is_one_requests(pair, gemma, words, policy):
    options = {"lease": 1.0, "deadline": 1.0}
    both = pair(model=gemma, kind="gemma2", pages=96, faulty=True, policy=policy, options=options)
    prompt = words(40)
    both.run(both.decode.add(prompt, 1, both.ticket(prompt)))
    prompt = words(150)
    ticket, beside = both.ticket(prompt), words(30)
    both.fabric().faults.rates = {"partial": 1.0}
    names = [both.decode.add(prompt, 3, ticket), both.decode.add(beside, 9)]
    said, other = both.run(*names)
    assert other.tokens == answer(beside, 9)
    assert (said.reason == "error") if policy == "fail" else (said.tokens == answer(prompt, 3))
    both.fabric().faults.rates = {}
    both.fabric().release()


# -- the harness itself


def test_the_harness_sees_a_page_that_nobody_filled(pair, words, engines):
    both, prompt = pair(options={"lease": 0.5}), words(64)
    ticket = both.ticket(prompt)
    rank = both.decode.ranks[0]
    name = both.decode.add(prompt, 30, ticket)
    until(lambda: both.decode.said[name].tokens, both.decode, both.prefill)
    pages = rank._groups[0][0][0]
    block = both.decode.scheduler.kv_cache_manager.get_block_ids(name)[0][1]
    pages[block, 3] += 1
    with pytest.raises(WrongPages, match="token 19 is foreign"):
        both.decode.step()
    engines.remove(both.decode)  # it ended in the midst of a step
    both.decode.close()


def test_the_harness_says_what_is_still_held(pair, words):
    both = pair(options={"lease": 0.5})
    both.prefill.run(both.prefill.add(words(64), 1, WISH))
    assert "blocks" in both.prefill.leaks() and "requests" in both.prefill.leaks()
