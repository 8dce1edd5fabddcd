"""Blocks that are found by what they are, in a folder that engines share: no ticket is needed. Needs vLLM, no model."""

from __future__ import annotations

import random
import secrets
import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import answer
    from tensorway_vllm.testing.scheduling import WISH, Engine, Meeting, settled

pytestmark = [
    pytest.mark.timeout(300),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")),
]
PAGE = 16


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    model, folder = make(tmp_path_factory.mktemp("content")), tmp_path_factory.mktemp("blocks")
    meeting, secret = Meeting(), secrets.token_hex(16)
    made = []
    for name in ("writes", "reads"):
        kv = meeting.config(name)
        kv["kv_connector_extra_config"] |= {
            "connector": "shared-store",
            "options": {"folder": str(folder), "secret": secret, "lookup_deadline": 30.0},
        }
        made.append(Engine(model, kv))
    yield made
    for one in made:
        one.close()
    meeting.close()


@pytest.mark.parametrize("params", [None, WISH, {"tensorway": {"prompt_tokens": 20}}], ids=["none", "wish", "ticket"])
def test_what_one_engine_has_computed_another_one_loads(engines, params):
    writes, reads = engines
    numbers = random.Random(repr(params))
    prompt = [numbers.randrange(4, 2000) for _ in range(100)]
    settled(writes, reads)  # movers are there
    [said] = writes.run(writes.add(prompt, 20, params))
    assert said.tokens == answer(prompt, 20) and said.params is None
    settled(writes)  # saved, and the pages are vLLM's again
    longer = prompt + answer(prompt, 10)
    for asked, count in ((prompt, 6 * PAGE), (longer, 6 * PAGE)):
        [found] = reads.run(reads.add(asked, 3, params))
        assert (found.tokens, found.external) == (answer(asked, 3), count)
        settled(reads)
        reads.forget()
    assert [one.leaks() for one in (writes, reads)] == ["", ""]
