"""A real Redis, alone on this machine, in a folder of its own; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import Server, elsewhere, launching
from tensorway.testing.servers import program


class Redis(Server):
    """One Redis that can be killed, stopped and started again; it keeps nothing on disk unless it is told to."""

    def __init__(self, binary: str, folder: Path, *options: str) -> None:
        super().__init__(folder)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self.command += ["--save", "", *options]


@pytest.fixture(scope="session")
def client() -> Any:
    """The client package; a session that was promised it fails without it."""
    found, promised = importlib.util.find_spec("redis"), os.environ.get("TENSORWAY_TEST_LIBRARY")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and redis is not installed")
    if found is None or promised == "without":
        pytest.skip("needs the client: pip install redis")
    import redis

    return redis


@pytest.fixture(scope="session")
def binary(client: Any) -> str:
    """The server's program; a session that was promised the library fails without it."""
    return program("redis-server", "apt-get install redis-server", required="TENSORWAY_TEST_LIBRARY" in os.environ)


@pytest.fixture(scope="session")
def shared(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A server that all tests share, and none harms."""
    with launching(partial(Redis, binary), tmp_path_factory.mktemp("redis")) as launch:
        yield launch()


@pytest.fixture
def launch(binary: str, tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    """Start servers of this test's own."""
    with launching(partial(Redis, binary), tmp_path) as launch:
        yield launch


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `redis` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "redis", native=("redis",))
