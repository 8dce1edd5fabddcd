"""Fresh interpreters, and stand-ins for Mooncake in the state that a test is about."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere


@pytest.fixture
def fresh_python() -> Callable[..., Any]:
    """Run code in a new interpreter with folders in front of its path; what its last line says, as JSON."""
    return partial(elsewhere.fresh_python, without=("MC_",))


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `mooncake` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "transport", "mooncake", native=("mooncake",), without=("MC_",))


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def fake_mooncake(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a package `mooncake` whose `engine` is the code that a test gives."""

    def write(engine: str) -> Path:
        folder = tmp_path / "fake"
        (folder / "mooncake").mkdir(parents=True)
        (folder / "mooncake" / "__init__.py").write_text("")
        (folder / "mooncake" / "engine.py").write_text(engine)
        return folder

    return write


@pytest.fixture(scope="session")
def real_mooncake() -> str:
    """The version of Mooncake that is here; a session that was promised one fails with the reason without it."""
    from tensorway_mooncake.library import lacking, version

    promised, missing = os.environ.get("TENSORWAY_TEST_LIBRARY"), ""
    if importlib.util.find_spec("mooncake") is None:
        missing = "mooncake is not installed: pip install --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1"
    elif (absent := lacking()) is not None:
        missing = f"{absent.reason}: {absent.remedy}, as root"
    if missing and promised == "with":
        pytest.fail(f"TENSORWAY_TEST_LIBRARY=with, and {missing}")
    if missing or promised == "without":
        pytest.skip(f"needs Mooncake itself: {missing or 'this is the session without it'}")
    return version()
