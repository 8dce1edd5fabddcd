"""The bug that started it, on real nodes: what a driver exports for itself reaches actors elsewhere, and is dropped."""

from __future__ import annotations

import pytest

import tensorway_ray
from tensorway.rendezvous import environment
from tensorway.testing import elsewhere

VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST"

#: A driver that exports an address of its own node, here in a process of its own, as `ray.init` changes a whole one.
DRIVER = """
import json, sys
import ray
import tensorway_ray
from tensorway import settings

address, head, way = sys.argv[1:]
settings.set_default("VLLM_NIXL_SIDE_CHANNEL_HOST", head)
settings.set_default("UCX_TLS", "tcp")
settings.set_default("HF_TOKEN", "hidden")
copied = {name: settings.get(name) for name in ("VLLM_NIXL_SIDE_CHANNEL_HOST", "UCX_TLS")}
job = {"env_vars": copied} if way != "actor" else None
ray.init(address=address, _node_ip_address=head, runtime_env=job, log_to_driver=False, logging_level="ERROR")

class Engine:
    def __init__(self):
        self.dropped = tensorway_ray.enter().names("dropped")

    def look(self):
        import os, socket
        from tensorway.rendezvous.hosts import choose
        host = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST")
        with socket.create_server((host or "127.0.0.1", 0)) as listening:
            bound = listening.getsockname()[0]
        chosen = choose("runtime")
        return {
            "node": ray.util.get_node_ip_address(), "host": host, "bound": bound, "dropped": self.dropped,
            "tls": os.environ.get("UCX_TLS"), "token": os.environ.get("HF_TOKEN"),
            "chosen": chosen.address, "source": chosen.source,
        }

engines = []
for number in (1, 2, 3):
    sent = tensorway_ray.runtime_env() if way != "copied" else {"env_vars": copied}
    options = {"resources": {f"node{number}": 0.1}, "num_cpus": 0, "runtime_env": sent}
    engines.append(ray.remote(Engine).options(**options).remote())
print(json.dumps(ray.get([engine.look.remote() for engine in engines], timeout=200)))
"""


def driven(cluster, way, **variables):
    head = cluster.address.rpartition(":")[0]
    return elsewhere.fresh_python(DRIVER, cluster.address, head, way, without=("TENSORWAY_", "RAY_"), **variables)


@pytest.mark.parametrize("way", ["actor", "job"])
def test_an_address_that_the_driver_exports_is_dropped_on_other_nodes_which_take_their_own(cluster, way):
    engines = driven(cluster, way)

    assert [engine["node"] for engine in engines] == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    # On the driver's own node it is right, where it arrives at all.
    assert engines[0]["dropped"] == []
    assert engines[0]["host"] == (None if way == "actor" else "127.0.0.2")
    for engine in engines[1:]:
        assert engine["dropped"] == ([] if way == "actor" else [VARIABLE])
        assert engine["host"] == (None if way == "actor" else engine["node"])
        assert way == "actor" or engine["bound"] == engine["node"]
        assert (engine["chosen"], engine["source"]) == (engine["node"], "runtime ray")
        assert (engine["tls"], engine["token"]) == ("tcp", None)


@pytest.mark.parametrize("variables", [{}, {environment.POLICY: "off"}], ids=["copied", "off"])
def test_without_the_policy_the_driver_s_address_is_what_every_node_takes(cluster, variables):
    engines = driven(cluster, "job" if variables else "copied", **variables)

    assert [engine["host"] for engine in engines] == ["127.0.0.2"] * 3
    assert all(engine["dropped"] == [] for engine in engines)


def test_a_runtime_environment_keeps_what_else_is_in_it():
    environ = {"UCX_TLS": "tcp", VARIABLE: "10.0.0.1", "HF_TOKEN": "hidden", "HOME": "/home/us"}
    made = tensorway_ray.runtime_env(environ, working_dir="x", env_vars={"MINE": "1"})

    assert (made["working_dir"], made["env_vars"]["MINE"], made["env_vars"]["UCX_TLS"]) == ("x", "1", "tcp")
    assert {"MINE", "UCX_TLS", environment.STAMP} == set(made["env_vars"])
    assert "hidden" not in str(made)
