"""A real vLLM on a tiny model, in a process of its own: tokens with offloading are those without. Needs vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(900),
]

OURS = {"kv_connector": "TensorwayOffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
#: Three prompts of 300, 307 and 314 tokens have nine whole pages of 32 each.
ALL = 3 * 9 * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def surroundings(tmp_path):
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def run(model, surroundings):
    def carried_out(kv, rounds, **plan):
        environment = {**surroundings, **plan.pop("environment", {})}
        whole = {"model": str(model), "kv": kv, "rounds": rounds, "wait": 0.5, **plan}
        command = [sys.executable, "-m", "tensorway_vllm.testing.engine", json.dumps(whole)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"start"')]
        return json.loads(lines[-1])["rounds"] if lines else [], done.stdout + done.stderr

    return carried_out


@pytest.fixture(scope="module")
def _known():
    return {}


@pytest.fixture
def without(run, _known):
    """What the engine says when nothing is offloaded."""
    if not _known:
        [told], _ = run(None, [""])
        _known["tokens"] = told["tokens"]
    return _known["tokens"]


def offloading(**extra):
    return {**OURS, "kv_connector_extra_config": {"options": {"capacity_blocks": 128}, **extra}}


def test_prompts_are_loaded_after_the_engines_own_cache_was_reset(run, without):
    rounds, log = run(offloading(), ["", "reset", "reset_all"])
    assert [each["hits"] for each in rounds] == [0, ALL, 0], log[-3000:]
    assert all(each["tokens"] == without for each in rounds)


def test_loads_that_fail_are_computed(run, without):
    rounds, log = run(offloading(), ["", "reset", "reset", "reset"], fail=1)
    assert "Recovered from KV load failure: 3 request(s)" in log
    assert all(each["tokens"] == without for each in rounds)
    # What failed is forgotten, so it is computed and stored once more.
    assert [each["hits"] for each in rounds[2:]] == [0, ALL]


def test_a_restarted_engine_finds_its_blocks_in_files(run, without, tmp_path):
    folder = tmp_path / "blocks"
    folder.mkdir()
    options = {"capacity_blocks": 128, "tiers": [{"backend": "fs", "options": {"folder": str(folder)}}]}
    [first], _ = run(offloading(options=options), [""])
    [second], log = run(offloading(options=options), [""])
    assert (first["hits"], second["hits"]) == (0, ALL), log[-3000:]
    assert first["tokens"] == second["tokens"] == without


def test_vllms_own_connector_uses_the_spec_with_longer_blocks(run, without):
    extra = {"spec_name": "TensorwayOffloadingSpec", "blocks_per_chunk": 2, "options": {"capacity_blocks": 128}}
    kv = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    rounds, log = run(kv, ["", "reset"])
    assert [each["hits"] for each in rounds] == [0, 3 * 8 * 32], log[-3000:]
    assert all(each["tokens"] == without for each in rounds)


def test_it_is_used_by_its_module_where_the_plugin_is_left_out(run, without):
    kv = {**offloading(), "kv_connector_module_path": "tensorway_vllm.connector"}
    rounds, log = run(kv, ["", "reset"], environment={"VLLM_PLUGINS": "none"})
    assert [each["hits"] for each in rounds] == [0, ALL], log[-3000:]


def test_a_misspelt_option_ends_the_start_with_the_nearest_name(run):
    rounds, log = run(offloading(flush_secnds=1), [""])
    assert not rounds and "Did you mean 'flush_seconds'?" in log


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a processor of its own")
def test_ranks_of_several_processes_share_the_rows(run, without):
    one, other, *_ = sorted(os.sched_getaffinity(0))
    ranks = {"engine": {"tensor_parallel_size": 2}, "environment": {"VLLM_CPU_OMP_THREADS_BIND": f"{one}|{other}"}}
    rounds, log = run(offloading(), ["", "reset", "reset_all"], **ranks)
    assert [each["hits"] for each in rounds] == [0, ALL, 0], log[-3000:]
    assert all(each["tokens"] == rounds[0]["tokens"] for each in rounds)


def test_windows_and_full_attention_are_offloaded_together(run, tmp_path):
    from tensorway_vllm.testing.tiny import make

    folder = str(make(tmp_path / "gemma", "gemma2"))
    kv = offloading(options={"capacity_blocks": 256})
    [alone], _ = run(None, [""], model=folder)
    rounds, log = run(kv, ["", "reset", "reset", "reset", "reset"], model=folder, fail=2)
    assert all(each["tokens"] == alone["tokens"] for each in rounds), log[-3000:]
    assert [each["hits"] for each in rounds if each is not rounds[2]] == [0, ALL, 0, ALL]
