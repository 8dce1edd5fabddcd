"""Fresh interpreters in which a backend is probed the way the host does it, and ranks in processes of their own."""

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
from tensorway.testing.ranks import Ranks
from tensorway.testing.session_groups import lent


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `gloo` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "eplb_communicator", "gloo", without=("GLOO_",))


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture(scope="module")
def torch_is_here() -> None:
    """A session that was promised torch fails without it; any other skips."""
    promised, found = os.environ.get("TENSORWAY_TEST_LIBRARY"), importlib.util.find_spec("torch")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and torch is not installed")
    if found is None or promised == "without":
        pytest.skip("needs torch: pip install torch -c constraints.txt")
    with warnings.catch_warnings():  # without numpy torch says so when it is imported, and it is not needed
        warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
        importlib.import_module("torch")


@pytest.fixture(scope="module")
def all_ranks(torch_is_here: None) -> Iterator[Ranks]:
    """Processes that the tests of a module share."""
    with Ranks() as ranks:
        yield ranks


@pytest.fixture
def ranks(all_ranks: Ranks) -> Iterator[Ranks]:
    """The same, for one test."""
    with lent(all_ranks) as ranks:
        yield ranks
