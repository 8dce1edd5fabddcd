"""A real etcd, alone on this machine, in a folder of its own; and fresh interpreters."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import Server, elsewhere, launching
from tensorway.testing.servers import free_port, program


class Etcd(Server):
    """One etcd that can be killed, stopped and started again with what it knew."""

    def __init__(self, binary: str, folder: Path, *options: str, scheme: str = "http") -> None:
        super().__init__(folder)
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{free_port()}"
        self.command = [binary, "--name", "one", "--data-dir", str(folder / "data"), *options]
        self.command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self.command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self.command += ["--initial-cluster", f"one={peer}", "--log-level", "error"]

    def answers(self) -> bool:
        if not self.url.startswith("http:"):
            return super().answers()
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def call(self, path: str, body: bytes) -> bytes:
        with urllib.request.urlopen(f"{self.url}/v3/{path}", body, timeout=5) as answer:
            return bytes(answer.read())


@pytest.fixture(scope="session")
def binary() -> str:
    """The server's program; a session that was promised the library fails without it."""
    return program("etcd", "apt-get install etcd-server", required="TENSORWAY_TEST_LIBRARY" in os.environ)


@pytest.fixture(scope="session")
def shared(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """A server that all tests share, and none harms."""
    with launching(partial(Etcd, binary), tmp_path_factory.mktemp("etcd")) as launch:
        yield launch()


@pytest.fixture
def launch(binary: str, tmp_path: Path) -> Iterator[Callable[..., Etcd]]:
    """Start servers of this test's own."""
    with launching(partial(Etcd, binary), tmp_path) as launch:
        yield launch


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `etcd` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "etcd")
