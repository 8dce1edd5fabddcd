"""The registry of variables: who may add to it, what counts, and what may not be said."""

from __future__ import annotations

import pytest

from tensorway.errors import PluginDefect, SettingInvalid
from tensorway.rendezvous import variables
from tensorway.rendezvous.variables import VARIABLES, Variable, policy, register, registered, row_of


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(variables, "_registered", [])


def scope(name, operator=()):
    row = row_of(name, registered(operator))
    return row.scope if row else None


def test_what_a_plugin_registers_is_known():
    assert None is scope("MY_NIC")
    register(Variable("MY_*", "cluster"), Variable("MY_NIC", "host"), by="tensorway-my")
    assert ("host", "cluster") == (scope("MY_NIC"), scope("MY_OTHER"))


def test_the_most_particular_counts_whoever_says_it_and_whenever():
    register(Variable("MC_FABRIC_ADDRESS_*", "host"), by="tensorway-one")
    register(Variable("MC_FABRIC_*", "rank"), Variable("MC_FABRIC_ADDRESS_OF_ALL", "cluster"), by="tensorway-two")
    assert ("host", "rank") == (scope("MC_FABRIC_ADDRESS_7"), scope("MC_FABRIC_SLOT"))
    assert ("cluster", "cluster") == (scope("MC_FABRIC_ADDRESS_OF_ALL"), scope("MC_LOG_LEVEL"))


def test_two_that_disagree_are_an_error_that_names_both():
    register(Variable("MY_NIC", "host"), by="tensorway-one")
    with pytest.raises(PluginDefect) as caught:
        register(Variable("MY_NIC", "cluster", cache_key=True), by="tensorway-two")
    assert "tensorway-two registers MY_NIC as of scope cluster, in the cache key." == caught.value.asked
    assert "tensorway-one has registered MY_NIC as of scope host." == caught.value.true
    with pytest.raises(PluginDefect, match="tensorway has registered UCX_\\* as of scope cluster"):
        register(Variable("UCX_*", "host"), by="tensorway-two")


def test_the_same_again_is_no_error():
    for name in ("tensorway-one", "tensorway-two"):
        register(Variable("MY_NIC", "host"), by=name)
    assert len(registered()) == len(VARIABLES) + 1


def test_with_one_that_is_refused_none_is_registered():
    register(Variable("MY_OTHER", "rank"), by="tensorway-one")
    with pytest.raises(PluginDefect):
        register(Variable("MY_NIC", "host"), Variable("UCX_*", "host"), by="tensorway-two")
    assert (None, "rank") == (scope("MY_NIC"), scope("MY_OTHER"))


@pytest.mark.parametrize("name", ["HF_TOKEN", "TENSORWAY_SECRET", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_can_be_nothing_else(name):
    with pytest.raises(PluginDefect, match=f"{name} as of scope cluster"):
        register(Variable(name, "cluster"), by="tensorway-two")
    register(Variable(f"{name[:-1]}*", "cluster"), by="tensorway-two")
    assert "secret" == scope(name) == scope(name.lower()) == scope(name, policy(f"{name}=cluster"))


def test_the_operator_wins_over_all_but_secrets():
    register(Variable("UCX_NET_DEVICES_OF_MINE", "host"), by="tensorway-one")
    operator = policy("UCX_NET_*=cluster, SITE_NIC = host,")
    assert ("cluster", "cluster") == (scope("UCX_NET_DEVICES", operator), scope("UCX_NET_DEVICES_OF_MINE", operator))
    assert ("host", "host") == (scope("SITE_NIC", operator), scope("NCCL_SOCKET_IFNAME", operator))


@pytest.mark.parametrize(("text", "rows"), [("", ()), ("on", ()), (" On ", ()), ("off", None), ("OFF", None)])
def test_the_policy_is_on_or_off(text, rows):
    assert rows == policy(text)


@pytest.mark.parametrize("text", ["of", "UCX_TLS", "UCX_TLS=", "UCX_TLS=everywhere", "=host", "*=host", "A B=host"])
def test_a_policy_that_cannot_be_meant_is_refused(text):
    with pytest.raises(SettingInvalid, match="TENSORWAY_ENVIRONMENT_POLICY"):
        policy(text)


@pytest.mark.parametrize("pattern", ["", "*", "A B", "A=B", "A?", "[A]", "Ä"])
def test_a_pattern_says_something_that_a_variable_can_be_called(pattern):
    with pytest.raises(ValueError, match="a name or a pattern"):
        Variable(pattern, "host")


@pytest.mark.parametrize("scope", ["host", "rank", "secret"])
def test_what_differs_between_processes_cannot_be_part_of_a_cache_key(scope):
    with pytest.raises(ValueError, match="fit nobody else"):
        Variable("HOST", scope, cache_key=True)


@pytest.mark.parametrize("name", ["", "UCX_TLS=x", "UCX_\udcff", "UCX_ Ä", "7UCX"])
def test_what_cannot_be_the_name_of_a_variable_is_not_known(name):
    assert None is scope(name)


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        # What the study found to travel in vLLM 0.32 though it must not, and the rest of its kind.
        (
            "host",
            "VLLM_P2P_SIDE_CHANNEL_HOST VLLM_EC_SIDE_CHANNEL_HOST VLLM_NIXL_SIDE_CHANNEL_HOST VLLM_LOOPBACK_IP "
            "VLLM_HOST_IP MOONCAKE_REQUESTER_LOCAL_HOSTNAME VLLM_GPU_NIC_PCIE_MAPPING UCX_NET_DEVICES NCCL_IB_HCA "
            "NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME MC_TCP_BIND_ADDRESS POD_IP "
            "MOONCAKE_LOCAL_HOSTNAME VLLM_CPU_OMP_THREADS_BIND NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
        ),
        (
            "rank",
            "VLLM_NIXL_SIDE_CHANNEL_PORT VLLM_P2P_SIDE_CHANNEL_PORT VLLM_EC_SIDE_CHANNEL_PORT VLLM_PORT VLLM_DP_RANK "
            "VLLM_MOONCAKE_BOOTSTRAP_PORT VLLM_DP_RANK_LOCAL CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES RANK LOCAL_RANK "
            "SLURM_PROCID SLURMD_NODENAME TENSORWAY_LOCAL_RANK MOONCAKE_PREFERRED_SEGMENT VLLM_RAY_BUNDLE_INDICES",
        ),
        (
            "cluster",
            "VLLM_DP_MASTER_IP VLLM_DP_MASTER_PORT VLLM_KV_CACHE_LAYOUT VLLM_NIC_SELECTION_VARS MASTER_ADDR UCX_TLS "
            "UCX_TCP_USER_TIMEOUT NCCL_DEBUG NIXL_ETCD_ENDPOINTS NIXL_LOG_LEVEL MC_LOG_LEVEL TENSORWAY_SECRET_FILE "
            "VLLM_RAY_DP_PLACEMENT_NODE_IPS PYTHONHASHSEED",
        ),
        (
            "secret",
            "TENSORWAY_SECRET VLLM_API_KEY S3_SECRET_ACCESS_KEY S3_ACCESS_KEY_ID AWS_SESSION_TOKEN HF_TOKEN SLURM_JWT "
            "REDIS_PASSWORD UCX_SITE_PASSWORD hf_token",
        ),
    ],
)
def test_scopes(expected, names):
    assert dict.fromkeys(names.split(), expected) == {name: scope(name) for name in names.split()}


@pytest.mark.parametrize("name", ["EDITOR", "PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_HOME"])
def test_what_is_not_ours_is_not_known(name):
    assert None is scope(name)
