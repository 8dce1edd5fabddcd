"""Hosts for tests. Without the privilege tests are skipped, unless the session promised that there are hosts."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hosts_lab as labs
from hosts_actor import Actor


@pytest.fixture(scope="session")
def _possible():
    why = labs.missing()
    if why and os.environ.get("TENSORWAY_TEST_HOSTS") == "required":
        pytest.fail(f"TENSORWAY_TEST_HOSTS=required, and {why}")
    if why:
        pytest.skip(f"needs hosts of its own: {why}")


@pytest.fixture(scope="module")
def lab(_possible):
    """Two hosts."""
    with labs.Lab(2) as made:
        yield made


@pytest.fixture(scope="module")
def six(_possible):
    """Two hosts without IPv4."""
    with labs.Lab(2, ipv4=False) as made:
        yield made


@pytest.fixture
def on():
    """Start a process on a host; it ends with the test."""
    actors = []

    def start(host, **environment):
        actors.append(Actor(host, **environment))
        return actors[-1]

    yield start
    for actor in actors:
        actor.close()


@pytest.fixture(scope="session")
def nixl():
    """NIXL's package; a session that promised hosts promised it, too."""
    found = next((name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name)), None)
    if found is None and os.environ.get("TENSORWAY_TEST_HOSTS") == "required":
        pytest.fail("TENSORWAY_TEST_HOSTS=required, and neither nixl_cu12 nor nixl_cu13 is installed")
    if found is None:
        pytest.skip("needs NIXL itself: pip install nixl-cu12")
    return found
