"""What is done to engines in the middle of a hand-over, the shortest proof of it: they go on, and tokens are equal."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def deployment(tmp_path):
    from tensorway_vllm.testing.deployment import Deployment

    made = Deployment(tmp_path)
    yield made
    made.close()


def changed(params):
    """The same ticket with another seal."""
    return {"tensorway": {**params["tensorway"], "seal": "0" * 64}}


def test_a_handover_is_that_of_a_lone_engine_whatever_becomes_of_its_ticket_and_its_producer(deployment):
    from tensorway_vllm.testing.deployment import HAND_OVER, prompt_of

    prefill, decode = deployment.engines("prefill", "decode")
    steps = []
    for seed in range(3):
        prompt = prompt_of(seed, 300 + 7 * seed)
        first, known = prefill.ask(prompt, 1, HAND_OVER), decode.state()["hits"]
        handed = decode.ask(prompt, 8, first.params)
        assert decode.state()["hits"] - known == len(prompt) - 1
        assert handed.tokens == deployment.alone(prompt, 8, "decode") and first.tokens == handed.tokens[:1]
        steps.append(handed.steps)
        known = decode.state()["hits"]
        assert decode.ask(prompt, 8, changed(first.params)).tokens == handed.tokens
        assert decode.state()["hits"] == known
        decode.forget()
    # Once connected: one step in which nothing is computed, and the one with the first token. An engine that is kept
    # from writing its words has the other look once more.
    assert min(steps[1:]) <= 2, steps
    # A client that hangs up, before its blocks are here and after.
    prompt = prompt_of(3)
    given = [prefill.ask(prompt_of(seed), 1, HAND_OVER).params for seed in (3, 4)]
    decode.abort(decode.begin(prompt, 64, given[0]))
    name = decode.begin(prompt_of(4), 64, given[1])
    decode.began(name)
    decode.abort(name)
    deployment.at_rest("decode")
    deployment.at_rest("prefill")
    orphan = prefill.ask(prompt, 1, HAND_OVER)
    prefill.kill()
    assert decode.ask(prompt, 8, orphan.params).tokens == deployment.alone(prompt, 8, "decode")
    deployment.at_rest("decode")
