"""A producer that is killed or stopped while another engine reads its blocks by NIXL over TCP.

There nobody can take a transfer back: what was begun may write until the wire lets go. So these are tests of who waits,
for how long, and of whose pages those are meanwhile. The prompts are long, and their blocks large, so that a read takes
milliseconds; in which of them the producer ends is chance, and every moment must do.
"""

from __future__ import annotations

import importlib.util
import time

import pytest

from tensorway_vllm.testing.deployment import HAND_OVER, OPTIONS, Deployment, prompt_of

NIXL = ("nixl_cu12", "nixl_cu13")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif(not any(map(importlib.util.find_spec, NIXL)), reason="needs NIXL: pip install nixl-cu12"),
    pytest.mark.timeout(1200),
    pytest.mark.long,
]
TOKENS = 2048
LAYERS = 16
#: A step that reads is not the first one; a read of these blocks takes some tens of milliseconds.
MOMENTS = [0.0, 0.005, 0.01, 0.02, 0.04, 0.08]
ENGINE = {
    "max_model_len": TOKENS + 64,
    "kv_cache_memory_bytes": 4 * TOKENS * LAYERS * 2 * 4 * 64 * 4,
    "load_format": "dummy",
    "hf_overrides": {
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2 * TOKENS,
    },
}


#: Pages of vLLM's own, which are read into directly; or staging memory, from which they are copied when all has come.
WAYS = {"pages": {}, "staging": {"stage": True, "staging_blocks": 3 * TOKENS // 32}}


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def deployment(tmp_path_factory, way):
    wire = {"transport": "nixl", "transport_options": {"ucx_tls": ["tcp"]}, **WAYS[way]}
    made = Deployment(tmp_path_factory.mktemp("wire"), **wire)
    yield made
    made.close()


@pytest.fixture
def handed(deployment):
    """A new prompt with its ticket, and what an engine says that computes it."""

    def new(seed):
        producer, _ = deployment.engines("prefill", "decode", **ENGINE)
        prompt = prompt_of(seed, TOKENS - 50)
        expected = deployment.alone(prompt, 4, "decode")
        return prompt, producer.ask(prompt, 1, HAND_OVER).params, expected

    return new


def comes_over(deployment, handed, seed):
    """A hand-over as if nothing had been; nothing is left of it."""
    prompt, params, expected = handed(seed)
    decode = deployment.engine("decode", **ENGINE)
    before = decode.state()["loaded"]
    assert expected == decode.ask(prompt, 4, params).tokens
    assert before + 1 == decode.state()["loaded"]
    deployment.at_rest("prefill")
    deployment.at_rest("decode")


def test_a_producer_that_stands_still_while_it_is_read_costs_a_computation(deployment, handed, way):
    """Its kernel acknowledges whatever it is sent, so that the wire never lets go by itself.

    What was to be written into pages keeps them, and the request, until it goes on. Through staging memory no request
    waits for that: only staging blocks do.
    """
    comes_over(deployment, handed, 2999)
    for number, moment in enumerate(MOMENTS):
        prompt, params, expected = handed(3000 + number)
        producer, decode = deployment.engine("prefill"), deployment.engine("decode")
        name = decode.begin(prompt, 4, params)
        time.sleep(moment)
        producer.stop()
        try:
            if way == "staging":
                assert expected == decode.answer(name).tokens, f"stopped after {moment:g} s"
                deployment.at_rest("decode")
            else:
                time.sleep(OPTIONS["deadline"] + 1)
        finally:
            producer.resume()
        if way == "pages":
            assert expected == decode.answer(name).tokens, f"stopped after {moment:g} s, and went on"
            deployment.at_rest("decode")
        deployment.at_rest("prefill")
    comes_over(deployment, handed, 3099)


def test_a_producer_that_is_killed_while_it_is_read_costs_a_computation(deployment, handed):
    for number, moment in enumerate(MOMENTS[::2]):
        prompt, params, expected = handed(4000 + number)
        producer, decode = deployment.engine("prefill"), deployment.engine("decode")
        name = decode.begin(prompt, 4, params)
        time.sleep(moment)
        producer.kill()
        assert expected == decode.answer(name).tokens, f"killed after {moment:g} s"
        deployment.at_rest("decode")
    comes_over(deployment, handed, 4099)
