"""Fixtures of the tests of the demo, and what lies beside them (`demo_runs`, `browser`) is found.

pytest imports test modules by path, and a module beside them is not found then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from demo_runs import QUICK, Folder


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    found = Folder(tmp_path)
    yield found
    found.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One run with everything that shows something: its JSON, and the text of its report."""
    folder = Folder(tmp_path_factory.mktemp("shown"))
    data, code = folder.answer(*QUICK)
    states = {row["movement"]: row["state"] for row in data["movements"]}
    missing = [row["error"] for row in data["movements"] if row["state"] == "missing"]
    if missing and "TENSORWAY_TEST_LIBRARY" not in os.environ:
        pytest.skip(f"a part of the demo is not installed: {missing[0]['to_do']}")
    assert (0, {"rebalance": "right", "handover": "right", "offload": "right"}) == (code, states)
    return data, folder.path / "tensorway-demo.html"
