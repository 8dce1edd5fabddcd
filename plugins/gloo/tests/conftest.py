"""Fresh interpreters in which a backend is probed the way the host does it, and ranks in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `gloo` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "eplb_communicator", "gloo", without=("GLOO_",))


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


def _harness() -> Any:
    """The module `ranks` beside this file, under one name in the tests and in their ranks."""
    name = "tensorway_ranks"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("ranks.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


harness = _harness()


@pytest.fixture(scope="module")
def torch_is_here() -> None:
    """A session that was promised torch fails without it; any other skips."""
    promised, found = os.environ.get("TENSORWAY_TEST_LIBRARY"), importlib.util.find_spec("torch")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and torch is not installed")
    if found is None or promised == "without":
        pytest.skip("needs torch: pip install torch -c constraints.txt")


@pytest.fixture(scope="module")
def all_ranks(torch_is_here: None) -> Iterator[Any]:
    """Processes that the tests of a module share."""
    ranks = harness.Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(all_ranks: Any) -> Callable[[int], Any]:
    """At least so many of them, alive."""

    def grown(count: int) -> Any:
        all_ranks.grow(count)
        return all_ranks

    return grown
