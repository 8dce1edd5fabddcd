"""A real TCPStore in a process of its own; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import Server, elsewhere, launching

# torch looks up the names of addresses; where no name server answers, that is five seconds for each, or ten.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

#: Runs a TCPStore until it is killed.
SERVE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
time.sleep(600)
"""


class TcpStore(Server):
    """One TCPStore that can be killed, stopped and started again, empty then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.address = f"127.0.0.1:{self.port}"
        self.command = [sys.executable, "-c", SERVE, str(self.port)]


@pytest.fixture(scope="session")
def torch_version() -> str:
    """The version of the torch that is installed; a session that was promised one fails without it."""
    promised, found = os.environ.get("TENSORWAY_TEST_LIBRARY"), importlib.util.find_spec("torch")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and torch is not installed")
    if found is None or promised == "without":
        pytest.skip("needs torch: pip install torch -c constraints.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns while it is imported, where there is no numpy
        import torch.distributed as dist

    assert dist.is_available()
    from tensorway.platforms import torch_build

    return str(torch_build().version)


@pytest.fixture(scope="session")
def shared(torch_version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpStore]:
    """A store that all tests share, and none harms."""
    with launching(TcpStore, tmp_path_factory.mktemp("tcpstore")) as launch:
        yield launch()


@pytest.fixture
def launch(torch_version: str, tmp_path: Path) -> Iterator[Callable[..., TcpStore]]:
    """Start stores of this test's own."""
    with launching(TcpStore, tmp_path) as launch:
        yield launch


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `tcpstore` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "tcpstore")
