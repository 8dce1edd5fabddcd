"""The pytest plugin: a host of its own for each test that asks for one.

Room `testing`. pytest imports this before coverage starts and in every test run on the machine, so nothing heavy is
imported at the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tensorway.plugins import Host


@pytest.fixture
def tensorway_host() -> Iterator[Host]:
    """A plugin host that discovers nothing and ignores the environment; register offers on it."""
    from tensorway.plugins import isolated

    with isolated() as host:
        yield host
