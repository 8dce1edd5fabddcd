"""A real Redis, alone on this machine, in a folder of its own; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

INSTALL = "apt-get install redis-server"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """One Redis that can be killed, stopped and started again; it keeps nothing on disk unless it is told to."""

    def __init__(self, binary: str, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self.command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self.command += ["--save", "", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.02)

    def answers(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)


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
    found = shutil.which("redis-server")
    if found is None and "TENSORWAY_TEST_LIBRARY" in os.environ:
        pytest.fail(f"redis-server is not installed: {INSTALL}")
    if found is None:
        pytest.skip(f"needs redis-server: {INSTALL}")
    return found


@pytest.fixture(scope="session")
def shared(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all tests share, and none harms."""
    server = Server(binary, tmp_path_factory.mktemp("redis"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def launch(binary: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of this test's own."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        folder = tmp_path / f"redis{len(servers)}"
        folder.mkdir()
        servers.append(Server(binary, folder, *options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `redis` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "redis", native=("redis",))
