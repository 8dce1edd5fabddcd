"""A real server in a process of its own, which a test can pause, kill and start again: for backends that talk to one.

Room `testing`. Derive from `Server` and say how yours is started; `launching` makes the fixtures of it: one server that
all tests share and none harms, and some of a test's own. `rendezvous.ServedRendezvousSuite` harms the latter.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tensorway.testing.stops import stop

#: Seconds in which a server answers: some import a large library before, on a machine that is busy with other tests.
START = 60.0


class Server:
    """One server on this machine, at the same port in each of its lives; what it says is in `folder`/log.

    A class of yours calls this constructor and then sets `command`, which may use the port::

        class Memcached(Server):
            def __init__(self, folder: Path, *options: str) -> None:
                super().__init__(folder)
                self.command = ["memcached", "-l", "127.0.0.1", "-p", str(self.port), *options]
    """

    def __init__(self, folder: Path) -> None:
        #: Of its own, for what it keeps.
        self.folder = folder
        self.port = free_port()
        #: What starts it; a test may change it between two lives.
        self.command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers; fails with what it said last when it ends instead, or is late."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log)
        until = time.monotonic() + START
        while not self.answers():
            lives = self._process.poll() is None
            assert lives and time.monotonic() < until, self._log.read_text("utf-8", "replace")[-2000:]
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether it can be used: somebody listens at its port. Override this if yours listens before it serves."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def pause(self) -> None:
        """Stop its process: the system still accepts connections for it, and nobody answers."""
        stop(self._running)

    def resume(self) -> None:
        """Let it go on."""
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word; one that does not run, or is paused, too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._running.pid

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was never started"
        return self._process


_Server = TypeVar("_Server", bound=Server)


@contextlib.contextmanager
def launching(kind: Callable[..., _Server], folder: Path) -> Iterator[Callable[..., _Server]]:
    """A function that starts one more server, with options for `kind`; in the end all of them are killed.

    Each has a folder of its own below `folder`, which is the first thing that `kind` is given::

        @pytest.fixture(scope="session")
        def shared(tmp_path_factory):
            with launching(Memcached, tmp_path_factory.mktemp("memcached")) as launch:
                yield launch()

        @pytest.fixture
        def launch(tmp_path):
            with launching(Memcached, tmp_path) as launch:
                yield launch
    """
    with contextlib.ExitStack() as stack:
        count = 0

        def launch(*arguments: Any, **options: Any) -> _Server:
            nonlocal count
            own = folder / f"server{count}"
            own.mkdir()
            count += 1
            server = kind(own, *arguments, **options)
            stack.callback(server.kill)
            server.start()
            return server

        yield launch


def program(name: str, install: str, required: bool) -> str:
    """Where a server's program is. Without it the test is skipped, or fails if it is `required`: `install` it so."""
    import pytest  # not above: who measures needs a server, too, and no tests

    found = shutil.which(name)
    if found is None and required:
        pytest.fail(f"{name} is not installed: {install}")
    if found is None:
        pytest.skip(f"needs {name}: {install}")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened at a moment ago, and that no system gives to who asks for any."""
    while True:
        port = 15_000 + secrets.randbelow(17_000)  # what systems give begins above; `random` may be seeded, twice
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
