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
def needed():
    """Skip where one of these modules is not installed; a session that promised hosts promised them, too."""

    def needs(how, *modules):
        missing = ", ".join(name for name in modules if importlib.util.find_spec(name) is None)
        if missing and settings.flag("TENSORWAY_REQUIRE_MULTIHOST"):
            pytest.fail(f"TENSORWAY_REQUIRE_MULTIHOST is set, and these are not installed: {missing}; {how}")
        if missing:
            pytest.skip(f"needs {missing}: {how}")

    return needs


@pytest.fixture(scope="session")
def nixl(needed):
    """NIXL's package, whichever CUDA it was built for."""
    found = next((name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name)), "nixl_cu12")
    needed("pip install nixl-cu12", found)
    return found
