"""A real vLLM on a tiny model, in a process of its own: tokens with offloading are those without. Needs vLLM.

Several engines run in one process, one after the other, and many checks look at what one run has told.
"""

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
#: With two pages a block, the ninth page is in none.
PAIRS = 3 * 8 * 32

MANAGER = [f"CPUManager.{name}" for name in ("begins", "lookup", "prepare_load", "complete_load", "poll", "ended")]
OTHERS = [f"CPUManager.{name}" for name in ("busy", "take_events", "statistics", "touch")]
#: What happens in memory alone: what is done before a round, what is broken in it, and what is loaded in it.
STORY = [
    ("first", "", [], 0),
    ("again", "reset", [], ALL),
    ("rows", "reset", ["rows"], ALL),  # counted when it was begun
    ("forgotten", "reset", [], 0),
    ("stored once more", "reset", [], ALL),
    ("load", "reset", ["CPUWorker.load"], ALL),
    ("manager", "reset", [*MANAGER, *OTHERS], 0),
    ("no store", "reset_all", ["CPUManager.prepare_store", "CPUManager.complete_store"], 0),
    ("no worker's store", "reset", ["CPUWorker.store"], 0),
    ("nothing was stored", "reset", [], 0),
    ("in order again", "reset", [], ALL),
    ("salted", "reset", [], 0),
    ("poll", "reset", ["CPUWorker.poll"], ALL),
    ("without the worker", "reset_all", [], 0),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    folder = tmp_path_factory.mktemp("tiny")
    return {kind: str(make(folder / kind, kind)) for kind in ("llama", "gemma2")}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Carry plans out in one process; what it told of each, and its log."""

    def carried_out(*plans, model="llama", **environment):
        surroundings = {
            **os.environ,
            "HOME": str(tmp_path_factory.mktemp("home")),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        whole = [{"model": models[model], "wait": 0.5, "kv": None, "rounds": [""], **plan} for plan in plans]
        command = [sys.executable, "-m", "tensorway_vllm.testing.engine", json.dumps(whole)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=800, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('[{"start"')]
        log = done.stdout + done.stderr
        return [told["rounds"] for told in json.loads(lines[-1])] if lines else [], log

    return carried_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks of all engines of this module are, in files."""
    return str(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def told(run, folder):
    """What an engine without offloading says, what one says in the story, and one that writes files."""
    broken = {str(number): broken for number, (_, _, broken, _) in enumerate(STORY) if broken}
    salts = {str(number): "a tenant" for number, (name, *_) in enumerate(STORY) if name == "salted"}
    story = {"kv": offloading(), "rounds": [before for _, before, _, _ in STORY], "broken": broken, "salts": salts}
    engines, log = run({}, story, {"kv": offloading(options=filed(folder)), "rounds": ["", "reset_all"]})
    assert len(engines) == 3, log[-5000:]
    return *engines, log


@pytest.fixture(scope="module")
def without(told):
    """What the engine says when nothing is offloaded."""
    return told[0][0]["tokens"]


def offloading(**extra):
    return {**OURS, "kv_connector_extra_config": {"options": {"capacity_blocks": 128}, **extra}}


def filed(folder, blocks=256):
    return {"capacity_blocks": blocks, "tiers": [{"backend": "fs", "options": {"folder": folder}}]}


def hits(rounds):
    return [each["hits"] for each in rounds]


def same(rounds, tokens):
    return all(each["tokens"] == tokens for each in rounds)


def test_tokens_are_those_without_offloading_whatever_the_backend_raises(told, without):
    _, rounds, _, _ = told
    assert [name for (name, *_), each in zip(STORY, rounds, strict=True) if each["tokens"] != without] == []


def test_prompts_are_loaded_after_a_reset_and_what_failed_is_stored_once_more(told):
    _, rounds, _, _ = told
    assert dict(zip([name for name, *_ in STORY], hits(rounds), strict=True)) == {
        name: loaded for name, _, _, loaded in STORY
    }


def test_no_page_is_lost_to_a_failure(told):
    _, rounds, _, _ = told
    assert {each["free"] for each in rounds} == {rounds[0]["free"]}


def test_each_kind_of_failure_is_logged_once(told):
    *_, log = told
    assert log.count("Recovered from KV load failure: 3 request(s)") == 3
    for call in ("lookup", "prepare_store", "load", "store"):
        assert log.count(f"Offloading 'cpu' raised in {call},") == 1, call


def test_after_a_reset_of_the_connector_blocks_come_from_files(told, without):
    _, _, rounds, _ = told
    assert hits(rounds) == [0, ALL] and same(rounds, without)
    assert rounds[1]["sources"] in ({"disk": ALL}, {}), "vLLM 0.31 and older does not say where they came from"


def test_memory_is_told_as_the_source_of_what_is_there(told):
    _, rounds, _, _ = told
    assert rounds[1]["sources"] in ({"host": ALL}, {})


def test_a_restarted_engine_finds_its_blocks_in_files(run, told, without, folder):
    [rounds], log = run({"kv": offloading(options=filed(folder))})
    assert hits(rounds) == [ALL] and same(rounds, without), log[-3000:]


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a processor of its own")
def test_an_engine_of_two_ranks_finds_blocks_of_one_of_one_rank_in_files(run, told, without, folder):
    one, other, *_ = sorted(os.sched_getaffinity(0))
    plan = {"rounds": ["", "reset"], "engine": {"tensor_parallel_size": 2}}
    options = filed(folder)
    [rounds], log = run({**plan, "kv": offloading(options=options)}, VLLM_CPU_OMP_THREADS_BIND=f"{one}|{other}")
    assert hits(rounds) == [ALL, ALL] and same(rounds, without), log[-3000:]


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a processor of its own")
def test_an_engine_of_one_rank_finds_blocks_of_one_of_two_ranks_in_files(run, without, tmp_path):
    one, other, *_ = sorted(os.sched_getaffinity(0))
    kv = offloading(options=filed(str(tmp_path)))
    plan = {"rounds": ["", "reset", "reset_all"], "engine": {"tensor_parallel_size": 2}, "kv": kv}
    [first], log = run(plan, VLLM_CPU_OMP_THREADS_BIND=f"{one}|{other}")
    assert hits(first) == [0, ALL, ALL] and same(first, without), log[-3000:]
    [second], log = run({"kv": kv})
    assert hits(second) == [ALL] and same(second, without), log[-3000:]


@pytest.mark.long
def test_windows_and_full_attention_are_offloaded_together(run):
    plan = {
        "kv": offloading(options={"capacity_blocks": 256}),
        "rounds": ["", *["reset"] * 4],
        "broken": {"2": ["rows"]},
    }
    engines, log = run({}, plan, model="gemma2")
    [alone], rounds = engines
    assert same(rounds, alone["tokens"]), log[-3000:]
    assert [each["hits"] for each in rounds if each is not rounds[2]] == [0, ALL, 0, ALL]


@pytest.mark.long
def test_blocks_of_two_pages_are_those_of_an_engine_with_pages_twice_as_long(run, tmp_path):
    """With several cache groups vLLM may be told how many tokens a hash is of; with one it refuses to be."""
    options = {"options": filed(str(tmp_path)), "other_block_sizes": True}
    short = {"kv": offloading(**options, blocks_per_chunk=2), "rounds": ["", "reset"]}
    long = {"kv": offloading(**options), "rounds": ["", "reset"], "engine": {"block_size": 64, "prefix_match_unit": 32}}
    engines, log = run({}, short, long, model="gemma2")
    [alone], first, second = engines
    assert same([*first, *second], alone["tokens"]), log[-3000:]
    assert (hits(first), hits(second)) == ([0, PAIRS], [PAIRS, PAIRS])


@pytest.mark.long
def test_other_connectors_of_vllm_use_the_spec(run, without):
    """vLLM's own one, with longer blocks; and one that has several inside of it, where loads fail, too."""
    extra = {"spec_name": "TensorwayOffloadingSpec", "blocks_per_chunk": 2, "options": {"capacity_blocks": 128}}
    own = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    several = {**OURS, "kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [offloading()]}}
    engines, log = run(
        {"kv": own, "rounds": ["", "reset"]},
        {"kv": several, "rounds": ["", *["reset"] * 4], "broken": {"2": ["rows"]}},
    )
    assert "will end the engine" in log
    first, second = engines
    assert hits(first) == [0, PAIRS] and hits(second)[:2] == [0, ALL] and hits(second)[3:] == [0, ALL], log[-3000:]
    assert same([*first, *second], without)


@pytest.mark.long
def test_it_is_used_by_its_module_in_an_engines_own_process_where_the_plugin_is_left_out(run, without):
    kv = {**offloading(), "kv_connector_module_path": "tensorway_vllm.offloading.connector"}
    plan = {"kv": kv, "rounds": ["", "reset"]}
    [rounds], log = run(plan, VLLM_PLUGINS="none", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert hits(rounds) == [0, ALL] and same(rounds, without), log[-3000:]


@pytest.mark.long
def test_a_misspelt_option_ends_the_start_with_the_nearest_name(run):
    engines, log = run({"kv": offloading(flush_secnds=1)})
    assert not engines and "Did you mean 'flush_seconds'?" in log
