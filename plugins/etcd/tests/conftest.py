"""A real etcd, alone on this machine, in a folder of its own; and fresh interpreters."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

INSTALL = "apt-get install etcd-server"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """One etcd that can be killed, stopped and started again with what it knew."""

    def __init__(self, binary: str, folder: Path, *options: str, scheme: str = "http") -> None:
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{free_port()}"
        self.folder = folder
        self.command = [binary, "--name", "one", "--data-dir", str(folder / "data"), *options]
        self.command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self.command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self.command += ["--initial-cluster", f"one={peer}", "--log-level", "error"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def answers(self) -> bool:
        if not self.url.startswith("http:"):
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.port)) == 0
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def call(self, path: str, body: bytes) -> bytes:
        with urllib.request.urlopen(f"{self.url}/v3/{path}", body, timeout=5) as answer:
            return bytes(answer.read())

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture(scope="session")
def binary() -> str:
    """The server's program; a session that was promised the library fails without it."""
    found = shutil.which("etcd")
    if found is None and "TENSORWAY_TEST_LIBRARY" in os.environ:
        pytest.fail(f"etcd is not installed: {INSTALL}")
    if found is None:
        pytest.skip(f"needs etcd: {INSTALL}")
    return found


@pytest.fixture(scope="session")
def shared(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all tests share, and none harms."""
    server = Server(binary, tmp_path_factory.mktemp("etcd"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def launch(binary: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of this test's own."""
    servers: list[Server] = []

    def start(*options: str, scheme: str = "http") -> Server:
        folder = tmp_path / f"etcd{len(servers)}"
        folder.mkdir()
        servers.append(Server(binary, folder, *options, scheme=scheme))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `etcd` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "etcd")
