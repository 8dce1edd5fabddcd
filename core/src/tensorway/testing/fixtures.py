"""The pytest plugin: a plugin host of its own for each test that asks for one, and hosts on a network.

Room `testing`. pytest imports this before coverage starts and in every test run on the machine, so nothing heavy is
imported at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tensorway.plugins import Host
    from tensorway.testing import netlab
    from tensorway.testing.ranks import RankProcess


@pytest.fixture
def tensorway_host() -> Iterator[Host]:
    """A plugin host that discovers nothing and ignores the environment; register offers on it."""
    from tensorway.plugins import isolated

    with isolated() as host:
        yield host


@pytest.fixture(scope="session")
def tensorway_lab() -> Callable[..., netlab.Lab]:
    """A function that makes a `netlab.Lab`, with its arguments, for a `with`; `faults` are those that you will need.

    Where there can be none the test is skipped with the reason, or fails with it under TENSORWAY_REQUIRE_MULTIHOST.
    """
    from tensorway import settings
    from tensorway.testing import netlab

    def make(count: int = 2, *, faults: tuple[str, ...] = (), **given: Any) -> netlab.Lab:
        if why := netlab.missing(*faults):
            if settings.flag("TENSORWAY_REQUIRE_MULTIHOST"):
                pytest.fail(f"TENSORWAY_REQUIRE_MULTIHOST is set, and there can be no such hosts: {why}")
            pytest.skip(f"needs several hosts: {why}")
        return netlab.Lab(count, **given)

    return make


@pytest.fixture
def tensorway_process() -> Iterator[Callable[..., RankProcess]]:
    """A function that starts a process on a host of a lab, with variables of its environment; it ends with the test.

    What it returns calls functions there, each with the process's `Rank` first: `process.call(function, 1, 2)`.
    """
    from tensorway.testing.ranks import RankProcess

    started: list[RankProcess] = []

    def start(host: netlab.LabHost, **environment: str) -> RankProcess:
        variables = [f"{name}={value}" for name, value in environment.items()]
        started.append(RankProcess("", lambda *command: host.command("env", *variables, *command)))
        return started[-1]

    yield start
    for process in started:
        process.close()
