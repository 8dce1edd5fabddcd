"""Processes that tests share; and what lies beside the tests (`questions`) is found.

pytest imports test modules by path, and a module beside them is not found then.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tensorway.testing.ranks import Ranks
from tensorway.testing.session_groups import lent

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def all_ranks():
    """Processes that the tests of a module share."""
    with Ranks() as ranks:
        yield ranks


@pytest.fixture
def world(all_ranks):
    """The same, for one test: each has groups of its own, and what it leaves unanswered is replaced."""
    with lent(all_ranks) as ranks:
        yield ranks
