"""Blocks that are offloaded and come back, by vLLM's own scheduler and connector. Needs vLLM, and no model."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import offloads, settled, until

from tensorway_cpu.worker import CPUWorker

PAGE = 16
OURS, THEIRS = "TensorwayOffloadingConnector", "OffloadingConnector"
LOOPS = pytest.mark.parametrize("loop", [False, True], ids=["waiting", "ahead"])
#: Our connector, and vLLM's own with our spec.
BOTH = pytest.mark.parametrize("connector", [OURS, THEIRS])


def whole(prompt):
    """Tokens of its whole pages."""
    return len(prompt) // PAGE * PAGE


def say(one, prompt, count=1, **more):
    """Ask, and let stores that this begins end."""
    [said] = one.run(one.add(prompt, count, **more))
    settled(one)
    assert said.tokens == answer(prompt, count)
    return said


@pytest.fixture
def held(monkeypatch):
    """While it is set, no job of any worker of this process is said to have ended."""
    state = {"held": False}
    poll = CPUWorker.poll
    monkeypatch.setattr(CPUWorker, "poll", lambda self: [] if state["held"] else poll(self))
    return state


@pytest.fixture
def broken(monkeypatch):
    """Methods of the worker that are named in it have no row to copy from or to."""
    from tensorway_cpu.common import CPULoadStoreSpec

    methods = set()

    def nowhere(spec):
        return CPULoadStoreSpec.of([-1] * len(spec))

    load, store = CPUWorker.load, CPUWorker.store

    def broken_load(self, job, source, target):
        load(self, job, nowhere(source) if "load" in methods else source, target)

    def broken_store(self, job, source, target):
        store(self, job, source, nowhere(target) if "store" in methods else target)

    monkeypatch.setattr(CPUWorker, "load", broken_load)
    monkeypatch.setattr(CPUWorker, "store", broken_store)
    return methods


# -- stored and loaded


@BOTH
@LOOPS
def test_what_was_computed_is_stored_and_comes_back(engine, words, connector, loop):
    one, prompt = engine(offloads(connector), async_scheduling=loop), words(100)
    assert say(one, prompt, 4).external == 0
    one.forget()
    assert say(one, prompt, 4).external == whole(prompt)
    assert say(one, prompt, 4).external == 0  # now the engine has it itself


def test_what_nobody_computed_is_not_found(engine, words):
    one = engine(offloads())
    say(one, words(100))
    one.forget()
    assert say(one, words(100)).external == 0


def test_of_a_prompt_that_begins_like_another_the_beginning_comes_back(engine, words):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    one.forget()
    assert say(one, prompt[:70] + words(50)).external == 64


def test_what_the_engine_has_itself_is_not_loaded(engine, words):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    one.forget()
    say(one, prompt[:50])
    said = say(one, prompt)
    assert said.cached == 48 and said.external == whole(prompt) - 48


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33])
def test_short_prompts_and_those_of_whole_pages_are_answered_alike(engine, words, count):
    one, prompt = engine(offloads()), words(count)
    say(one, prompt, 5)
    one.forget()
    assert say(one, prompt, 5).external == whole(prompt)


def test_blocks_of_several_pages_come_back(engine, words):
    one, prompt = engine(offloads(blocks_per_chunk=2)), words(100)
    say(one, prompt)
    one.forget()
    assert say(one, prompt).external == 96


def test_a_prompt_with_another_salt_is_another_prompt(engine, words):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt, cache_salt="a")
    one.forget()
    assert say(one, prompt, cache_salt="b").external == 0
    one.forget()
    assert say(one, prompt, cache_salt="a").external == whole(prompt)


def test_what_a_request_says_is_stored_only_if_that_is_asked_for(engine, words):
    prompt = words(40)
    text = prompt + answer(prompt, 60)
    for prompt_only, expected in ((True, 32), (False, 96)):
        one = engine(offloads(offload_prompt_only=prompt_only))
        say(one, prompt, 60)
        one.forget()
        assert say(one, text).external == expected


@LOOPS
def test_several_at_once_are_told_apart(engine, words, loop):
    one = engine(offloads(), pages=128, async_scheduling=loop)
    prompts = [words(20 + 13 * place) for place in range(8)]
    one.run(*[one.add(prompt, 2) for prompt in prompts])
    settled(one)
    one.forget()
    names = [one.add(prompt, 3 + place) for place, prompt in enumerate(prompts)]
    for place, (prompt, said) in enumerate(zip(prompts, one.run(*names), strict=True)):
        assert said.tokens == answer(prompt, 3 + place) and said.external == whole(prompt)


def test_two_requests_for_the_same_blocks_have_them_both(engine, words):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    one.forget()
    for said in one.run(one.add(prompt, 2), one.add(prompt, 2)):
        assert said.tokens == answer(prompt, 2)


def test_when_there_is_no_room_for_more_what_comes_back_is_right(engine, words):
    one = engine(offloads(capacity=10), pages=64)
    prompts = [words(70) for _ in range(6)]
    for prompt in prompts:
        say(one, prompt)
    one.forget()
    found = [say(one, prompt).external for prompt in reversed(prompts)]
    assert found[0] == 64 and 0 in found


def test_a_prompt_that_is_longer_than_all_the_room_is_answered(engine, words):
    one, prompt = engine(offloads(capacity=3)), words(150)
    say(one, prompt)
    one.forget()
    say(one, prompt)


# -- while something is on its way


@LOOPS
def test_a_request_waits_for_blocks_that_are_being_stored_or_computes_them(engine, words, held, loop):
    one, prompt = engine(offloads(), async_scheduling=loop), words(100)
    held["held"] = True
    one.run(one.add(prompt, 1))
    one.forget()
    name = one.add(prompt, 3)
    for _ in range(5):
        one.step()
    held["held"] = False
    [said] = one.run(name)
    assert said.tokens == answer(prompt, 3)


def test_pages_are_not_given_away_while_they_are_being_loaded_for_who_was_aborted(engine, words, held):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    one.forget()
    held["held"] = True
    name = one.add(prompt, 3)
    until(lambda: one.parked(name), one)
    free = one.free
    one.abort(name)
    for _ in range(3):
        one.step()
    assert one.free == free < one.blocks
    held["held"] = False
    settled(one)
    assert say(one, prompt, 3).reason == "length"


def test_requests_are_aborted_after_each_number_of_steps(engine, words):
    one, prompt = engine(offloads()), words(100)
    for steps in range(7):
        say(one, prompt)
        one.forget()
        name = one.add(prompt, 4)
        for _ in range(steps):
            one.step()
        one.abort(name, computing=steps % 2 == 1)
        settled(one)


@BOTH
@LOOPS
def test_pages_of_preempted_requests_are_stored_before_others_write_there(engine, words, connector, loop, held):
    one = engine(offloads(connector, offload_prompt_only=False), pages=16, async_scheduling=loop)
    prompts = [words(64), words(64)]
    held["held"] = True
    names = [one.add(prompt, 100) for prompt in prompts]
    requests = [one.scheduler.requests[name] for name in names]
    until(lambda: sum(request.num_preemptions for request in requests), one)
    held["held"] = False
    for prompt, said in zip(prompts, one.run(*names), strict=True):
        assert said.tokens == answer(prompt, 100)
    settled(one)
    one.forget()
    for prompt in prompts:
        say(one, prompt, 3)


# -- reset


@pytest.mark.parametrize("running", [False, True])
def test_a_reset_of_all_forgets_all(engine, words, running):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    assert one.scheduler.reset_prefix_cache(reset_running_requests=running, reset_connector=True)
    assert say(one, prompt).external == 0
    one.forget()
    assert say(one, prompt).external == whole(prompt)


@BOTH
def test_a_reset_while_blocks_are_being_stored_leaves_no_old_ones(engine, words, held, connector):
    one, prompt = engine(offloads(connector)), words(100)
    held["held"] = True
    one.run(one.add(prompt, 1))
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.step()
    held["held"] = False
    settled(one)
    assert say(one, prompt).external == 0
    one.forget()
    assert say(one, prompt).external == whole(prompt)


def test_a_reset_while_blocks_are_being_loaded_is_answered_all_the_same(engine, words, held):
    one, prompt = engine(offloads()), words(100)
    say(one, prompt)
    one.forget()
    held["held"] = True
    name = one.add(prompt, 3)
    until(lambda: one.parked(name), one)
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.step()
    held["held"] = False
    [said] = one.run(name)
    assert said.tokens == answer(prompt, 3)


def test_a_reset_while_requests_run_is_answered_all_the_same(engine, words):
    one, prompt = engine(offloads()), words(100)
    name = one.add(prompt, 30)
    until(lambda: len(one.said[name].tokens) > 3, one)
    one.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    [said] = one.run(name)
    assert said.tokens == answer(prompt, 30)


def test_two_resets_before_the_next_step_are_one(engine, words, held):
    one, prompt = engine(offloads()), words(100)
    held["held"] = True
    one.run(one.add(prompt, 1))
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    held["held"] = False
    settled(one)
    assert say(one, prompt).external == 0


@LOOPS
def test_running_requests_that_are_reset_and_found_again_do_not_end_the_engine(engine, words, loop):
    one, prompt = engine(offloads(), async_scheduling=loop), words(100)
    say(one, prompt)
    name = one.add(prompt, 30)
    until(lambda: len(one.said[name].tokens) > 3, one)
    one.scheduler.reset_prefix_cache(reset_running_requests=True)
    [said] = one.run(name)
    assert said.tokens == answer(prompt, 30)


# -- failures


@LOOPS
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_load_that_fails_is_computed_or_told_to_its_client_alone(engine, words, broken, policy, loop):
    one, prompt, beside = engine(offloads(policy=policy), async_scheduling=loop), words(100), words(30)
    say(one, prompt)
    one.forget()
    broken.add("load")
    said, other = one.run(one.add(prompt, 3), one.add(beside, 20))
    broken.clear()
    assert other.tokens == answer(beside, 20)
    assert (said.reason == "error") if policy == "fail" else (said.tokens == answer(prompt, 3))
    settled(one)
    assert say(one, prompt).reason == "length"  # nothing wrong is cached
    one.forget()
    assert say(one, prompt).reason == "length"
    one.forget()
    assert say(one, prompt).external == whole(prompt)  # and it was stored again


def test_a_store_that_fails_is_never_found(engine, words, broken):
    one, prompt = engine(offloads()), words(100)
    broken.add("store")
    say(one, prompt)
    broken.clear()
    one.forget()
    assert say(one, prompt).external == 0
    one.forget()
    assert say(one, prompt).external == whole(prompt)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_load_that_fails_behind_a_cached_beginning_leaves_that_alone(engine, words, broken, policy):
    one, prompt = engine(offloads(policy=policy)), words(100)
    say(one, prompt)
    one.forget()
    say(one, prompt[:50])
    broken.add("load")
    [said] = one.run(one.add(prompt, 3))
    broken.clear()
    settled(one)
    assert said.reason == "error" or said.tokens == answer(prompt, 3)
    again = say(one, prompt[:50])
    assert again.cached == 48 and again.external == 0


# -- several ranks, several groups


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_stores_and_loads_its_own_part(engine, words, ranks):
    one, prompt = engine(offloads(), ranks=ranks), words(100)
    say(one, prompt)
    one.forget()
    assert say(one, prompt, 4).external == whole(prompt)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_load_that_fails_on_one_rank_is_computed_on_all(engine, words, ranks, monkeypatch):
    one, prompt = engine(offloads(), ranks=ranks), words(100)
    say(one, prompt)
    one.forget()
    from tensorway_cpu.common import CPULoadStoreSpec

    load, loads = CPUWorker.load, []

    def some(self, job, source, target):
        loads.append(job)
        load(self, job, source if len(loads) != ranks else CPULoadStoreSpec.of([-1] * len(source)), target)

    monkeypatch.setattr(CPUWorker, "load", some)
    assert say(one, prompt, 4).reason == "length"
    assert len(loads) >= ranks


def test_windows_and_full_attention_come_back_together(engine, gemma, words, broken):
    one, prompt = engine(offloads(), model=gemma, kind="gemma2", pages=64), words(150)
    assert len(one.scheduler.kv_cache_config.kv_cache_groups) == 2
    say(one, prompt, 20)
    one.forget()
    assert say(one, prompt, 20).external == whole(prompt)
    one.forget()
    broken.add("load")
    assert say(one, prompt, 20).reason == "length"
    broken.clear()
    one.forget()
    assert say(one, prompt, 20).reason == "length"


# -- beside others


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_an_engine_of_another_tensor_parallel_size_finds_them_in_files(engine, words, tmp_path, before, after):
    tiers = [{"backend": "fs", "options": {"folder": str(tmp_path)}}]
    first, prompt = engine(offloads(tiers=tiers), ranks=before), words(100)
    say(first, prompt)
    until(lambda: any(tmp_path.rglob("*")), first)
    said = say(engine(offloads(tiers=tiers), ranks=after), prompt, 4)
    assert said.external == whole(prompt)


def test_another_engine_finds_in_files_what_this_one_stored(engine, words, tmp_path):
    tiers = [{"backend": "fs", "options": {"folder": str(tmp_path)}}]
    first, prompt = engine(offloads(tiers=tiers)), words(100)
    say(first, prompt)
    second = engine(offloads(tiers=tiers))
    until(lambda: any(tmp_path.rglob("*")), first)
    said = say(second, prompt, 4)
    assert said.external == whole(prompt)


def test_beside_the_connector_that_hands_over_both_do_their_work(model, meeting, pair, engines, words):
    from tensorway_vllm.testing.scheduling import Engine

    both, prompt = pair(), words(100)
    children = [{**meeting.config("unused")}, {**offloads()}]
    for child in children:
        child.pop("engine_id", None)
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children},
    }
    one = Engine(model, multi)
    engines.append(one)
    name = one.add(prompt, 4, both.ticket(prompt))
    until(lambda: one.said[name].reason, one, both.prefill)
    assert one.said[name].tokens == answer(prompt, 4) and one.said[name].external >= whole(prompt)
    settled(one)
    one.forget()
    said = say(one, prompt, 4)
    assert said.external >= whole(prompt)
