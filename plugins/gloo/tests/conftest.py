"""Fresh interpreters in which a backend is probed the way the host does it."""

from __future__ import annotations

from collections.abc import Callable
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
