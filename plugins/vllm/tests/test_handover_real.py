"""Hand-overs between real engines: windows beside full attention, two ranks. Long."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(900),
    pytest.mark.long,
]


@pytest.fixture
def deployment(tmp_path):
    from tensorway_vllm.testing.deployment import Deployment

    made = Deployment(tmp_path)
    yield made
    made.close()


def handed_over(deployment, prefill, decode, tokens, seed):
    """A prompt of so many tokens, from one to the other: hits there; what it says is what a lone engine says."""
    from tensorway_vllm.testing.deployment import HAND_OVER, prompt_of

    prompt = prompt_of(seed, tokens)
    given, known = prefill.ask(prompt, 1, HAND_OVER).params, decode.state()["hits"]
    said = decode.ask(prompt, 8, given).tokens
    hits = decode.state()["hits"] - known
    assert said == deployment.alone(prompt, 8, "decode")
    return given is not None, hits


def test_windows_and_full_attention_are_handed_over_together(deployment):
    from tensorway_vllm.testing.tiny import make

    model = str(make(deployment.folder / "gemma", "gemma2"))
    engines = list(deployment.engines("prefill", "decode", model=model))
    # The window is 64 tokens, a page 32: of 95 and 127 tokens its first one is the last of a page that vLLM gave away.
    found = {tokens: handed_over(deployment, *engines, tokens, tokens) for tokens in (5, 33, 95, 96, 127, 128, 300)}
    assert found == {tokens: (True, tokens - 1) if tokens not in (95, 127) else (False, 0) for tokens in found}
    for name in ("prefill", "decode"):
        deployment.at_rest(name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a processor of its own")
def test_each_of_two_ranks_reads_from_its_own(deployment):
    one, other, *_ = sorted(os.sched_getaffinity(0))
    deployment._variables["VLLM_CPU_OMP_THREADS_BIND"] = f"{one}|{other}"
    engines = list(deployment.engines("prefill", "decode", tensor_parallel_size=2))
    for tokens in (20, 300):
        assert handed_over(deployment, *engines, tokens, tokens) == (True, tokens - 1)
    for name in ("prefill", "decode"):
        deployment.at_rest(name)
