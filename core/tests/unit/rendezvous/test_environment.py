"""Which variables travel: by scope, whatever way they came; and what a worker drops."""

from __future__ import annotations

import json

import pytest

from tensorway.rendezvous.environment import STAMP, VARIABLES, Variable, cache_key, leaked, outgoing, scope_of

DRIVER = {
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "eth7",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.77.0.1",
    "VLLM_P2P_SIDE_CHANNEL_HOST": "10.77.0.1",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600",
    "CUDA_VISIBLE_DEVICES": "0",
    "TENSORWAY_SECRET": "do not tell",
    "AWS_SECRET_ACCESS_KEY": "do not tell",
    "HOME": "/home/driver",
    "TENSORWAY_PLUGINS": "nixl",
}


def test_only_what_is_true_in_the_cluster_travels():
    copied = outgoing(DRIVER, "driver")
    assert {name: value for name, value in copied.items() if name != STAMP} == {
        "UCX_TLS": "tcp",
        "TENSORWAY_PLUGINS": "nixl",
    }


def test_a_secret_is_nowhere_in_what_travels():
    assert "do not tell" not in json.dumps(outgoing(DRIVER, "driver"))


def test_the_study_s_leak_is_found_whatever_way_it_came():
    worker = {**DRIVER, **outgoing(DRIVER, "driver"), "PATH": "/bin"}  # a job-level environment copied everything
    assert leaked(worker, "worker") == [
        "UCX_NET_DEVICES",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_P2P_SIDE_CHANNEL_HOST",
    ]


def test_what_the_operator_set_for_this_host_stays():
    worker = {**outgoing(DRIVER, "driver"), "UCX_NET_DEVICES": "ib0", "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.77.0.2"}
    assert leaked(worker, "worker") == []


def test_on_the_launcher_s_own_host_nothing_has_leaked():
    assert leaked({**DRIVER, **outgoing(DRIVER, "driver")}, "driver") == []


@pytest.mark.parametrize("stamp", ["", "{", "[]", "1", '{"left": 1}', '{"host": "x", "left": [1]}', "null"])
def test_a_stamp_that_is_none_says_nothing(stamp):
    assert leaked({STAMP: stamp, "UCX_NET_DEVICES": "eth0"}, "worker") == []


def test_a_stamp_is_not_copied_on():
    first = outgoing(DRIVER, "driver")
    assert json.loads(outgoing({**first, "UCX_TLS": "tcp"}, "second")[STAMP])["host"] == "second"


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("MASTER_ADDR", "cluster"),
        ("NCCL_SOCKET_IFNAME", "host"),
        ("NCCL_DEBUG", "cluster"),
        ("TENSORWAY_LOCAL_RANK", "rank"),
        ("HF_TOKEN", "secret"),
        ("MC_TCP_BIND_ADDRESS", "host"),
        ("MC_LOG_LEVEL", "cluster"),
        ("EDITOR", None),
    ],
)
def test_scopes(name, scope):
    assert scope_of(name) == scope


def test_only_what_opted_in_is_part_of_a_cache_key():
    variables = (Variable("LAYOUT", "cluster", cache_key=True), *VARIABLES)
    key = cache_key({"LAYOUT": "HND", "UCX_TLS": "tcp"}, variables)
    assert key == cache_key({"LAYOUT": "HND", "UCX_TLS": "rc"}, variables)
    assert key != cache_key({"LAYOUT": "NHD", "UCX_TLS": "tcp"}, variables)


def test_what_differs_by_host_cannot_be_part_of_a_cache_key():
    with pytest.raises(ValueError, match="fit nobody else"):
        Variable("HOST", "host", cache_key=True)
