"""An engine that is killed again and again while it stores blocks to files: what is found afterwards is whole."""

from __future__ import annotations

import importlib.util
import random
import time

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(1200),
    pytest.mark.long,
]
PAGE, LIVES = 32, 3


def test_an_engine_that_is_killed_while_it_stores_finds_whole_blocks_or_none(tmp_path):
    from tensorway_vllm.testing.deployment import Deployment, prompt_of

    blocks = tmp_path / "blocks"
    blocks.mkdir()
    tiers = [{"backend": "fs", "options": {"folder": str(blocks)}}]
    kv = {
        "kv_connector": "TensorwayOffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"options": {"capacity_blocks": 256, "tiers": tiers}},
    }
    deployment = Deployment(tmp_path)
    try:
        prompts = [prompt_of(seed, 600 + 16 * seed) for seed in range(4)]
        whole = sum((len(prompt) - 1) // PAGE * PAGE for prompt in prompts)
        plain = deployment.engine("plain", kv={})
        expected = [plain.ask(prompt, 8).tokens for prompt in prompts]
        plain.close()
        numbers = random.Random(7)
        for life in range(LIVES):
            served = deployment.engine(f"life-{life}", kv=kv)
            names = [served.begin(prompt, 8) for prompt in prompts]
            served.began(names[0])
            time.sleep(numbers.uniform(0.0, 0.4))
            served.kill()
        last = deployment.engine("last", kv=kv)
        assert [last.ask(prompt, 8).tokens for prompt in prompts] == expected
        found = last.state()["hits"]
        assert 0 <= found <= whole
        time.sleep(2.0)  # what was computed is on its way to the rows
        last.forget()
        assert [last.ask(prompt, 8).tokens for prompt in prompts] == expected
        assert last.state()["hits"] - found == whole
        deployment.at_rest("last")
        assert " ERROR " not in last.log
        last.close()
        # And once more from files alone, of an engine that ended as it should.
        again = deployment.engine("again", kv=kv)
        assert [again.ask(prompt, 8).tokens for prompt in prompts] == expected
        assert again.state()["hits"] == whole
    finally:
        deployment.close()
