"""A real Ray cluster of three nodes on this machine, once for all tests; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

#: What a node needs to start, and no more. The first node is the head and the driver's.
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
LEAN: dict[str, Any] = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nodes take ten seconds to start on a busy machine, actors five; and Ray leaves sockets to the collector."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(400))
            for category in ("ResourceWarning", "DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def ray() -> Any:
    """Ray; a session that was promised it fails without it."""
    found, promised = importlib.util.find_spec("ray"), os.environ.get("TENSORWAY_TEST_LIBRARY")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and ray is not installed")
    if found is None or promised == "without":
        pytest.skip("needs Ray: pip install ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.cluster_utils

    return ray


@pytest.fixture(scope="session")
def cluster(ray: Any) -> Iterator[Any]:
    """Three nodes, each with an address of its own; this process is a driver on the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={**LEAN, "node_ip_address": ADDRESSES[0], "resources": {"node1": 1}}
        )
        try:
            for number, address in enumerate(ADDRESSES[1:], 2):
                made.add_node(**LEAN, node_ip_address=address, resources={f"node{number}": 1}, wait=False)
            made.wait_for_nodes(120)
            ray.init(
                address=made.address,
                namespace="tests",
                _node_ip_address=ADDRESSES[0],
                log_to_driver=False,
                logging_level="ERROR",
            )
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `ray` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "ray", native=("ray",))
