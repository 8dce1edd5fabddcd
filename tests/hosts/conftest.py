"""Hosts for these tests, and what runs on them. Without the privilege tests are skipped, unless hosts were promised."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tensorway import settings

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def lab(tensorway_lab):
    """Two hosts."""
    with tensorway_lab(2) as made:
        yield made


@pytest.fixture
def on(tensorway_process):
    """Start a process on a host; it ends with the test."""
    return tensorway_process


@pytest.fixture(scope="session")
def nixl():
    """NIXL's package; a session that promised hosts promised it, too."""
    found = next((name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name)), None)
    if found is None and settings.flag("TENSORWAY_REQUIRE_MULTIHOST"):
        pytest.fail("TENSORWAY_REQUIRE_MULTIHOST is set, and neither nixl_cu12 nor nixl_cu13 is installed")
    if found is None:
        pytest.skip("needs NIXL itself: pip install nixl-cu12")
    return found
