"""Ours inside of vLLM's MultiConnector, with offloading beside it. Needs vLLM, and no model."""

from __future__ import annotations

import random
import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import WISH, Engine, Meeting, settled, until

pytestmark = [
    pytest.mark.timeout(300),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")),
]
PAGE = 16


def child(kv):
    """One connector of several: vLLM gives it the name of the engine itself."""
    return {name: value for name, value in kv.items() if name not in ("engine_id", "kv_load_failure_policy")}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def pair(request, tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    model, meeting, made = make(tmp_path_factory.mktemp("beside")), Meeting(), []
    for name in ("prefill", "decode"):
        ours = meeting.config(f"{name}-{request.param}")
        theirs = {
            "kv_connector": "TensorwayOffloadingConnector",
            "kv_connector_module_path": "tensorway_vllm.offloading.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"options": {"capacity_blocks": 64, "pin": False}},
        }
        several = {"connectors": [child(ours), theirs]}
        kv = {**ours, "kv_connector": "MultiConnector", "kv_connector_extra_config": several}
        del kv["kv_connector_module_path"]
        made.append(Engine(model, kv, ranks=request.param))
    yield made
    for one in made:
        one.close()
    meeting.close()


def test_requests_are_handed_over_and_their_blocks_are_offloaded(pair):
    prefill, decode = pair
    settled(prefill, decode)
    numbers = random.Random(7)
    prompt = [numbers.randrange(4, 2000) for _ in range(100)]
    [said] = prefill.run(prefill.add(prompt, 1, WISH))
    name = decode.add(prompt, 20, said.params)
    until(lambda: decode.said[name].reason, prefill, decode)
    assert (decode.said[name].tokens, decode.said[name].external) == (answer(prompt, 20), 99)
    settled(prefill, decode)
    for one in (prefill, decode):  # from what was offloaded: a ticket is used once
        one.forget()
        [said] = one.run(one.add(prompt, 3))
        assert (said.tokens, said.external) == (answer(prompt, 3), 6 * PAGE)
    settled(prefill, decode)
    assert [one.leaks() for one in pair] == ["", ""]
