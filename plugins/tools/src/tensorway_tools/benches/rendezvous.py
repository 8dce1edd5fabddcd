"""What the rendezvous `direct` takes for a record, a lease and a change that is told, beside TCP on this machine.

Of the dist only an entry point refers to this module; it may import the core and `benchmark`. How a thousand members
get on is measured by tests/bench/rendezvous_scale.py, which needs minutes and the servers of other stores.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from tensorway_tools.benchmark import Benchmark, Row, Run

_MANY: Final = 20
_MEMBERS: Final = 100
_VALUE: Final = b"x" * 1024
_TO: Final = "as many bytes there and back over TCP"
_ECHO: Final = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := connection.recv(65536):
    connection.sendall(data)
"""
_SERVICE: Final = """
import sys, tensorway
store = tensorway.create("rendezvous", "direct", {"secret": sys.argv[1]})
print(store.address, flush=True)
sys.stdin.read()
"""


def rows(run: Run) -> Iterator[Row]:
    """A service in a process of its own; and an echo in another."""
    secret = secrets.token_hex(16)
    with (
        _Other(_ECHO) as echo,
        _Other(_SERVICE, secret) as service,
        run.create("rendezvous", "direct", {"address": service.said, "secret": secret}) as rendezvous,
        socket.create_connection(("127.0.0.1", int(echo.said)), timeout=60) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield from _calls(run, rendezvous, connection)


def _calls(run: Run, rendezvous: Any, connection: socket.socket) -> Iterator[Row]:
    rounds = run.either(30, 5)

    def back(nbytes: int = len(_VALUE)) -> None:
        connection.sendall(_VALUE[:nbytes])
        left = nbytes
        while left:
            left -= len(connection.recv(left))

    def many(call: Callable[[], object], times: int = _MANY) -> Callable[[], object]:
        return lambda: [call() for _ in range(times)]

    yield run.measured(
        "putting a record of 1 KiB",
        many(lambda: rendezvous.put("/bench/one", _VALUE)),
        many(back),
        to=_TO,
        rounds=rounds,
    )
    yield run.measured("reading it", many(lambda: rendezvous.get("/bench/one")), many(back), to=_TO, rounds=rounds)

    def leased() -> None:
        rendezvous.end(rendezvous.lease(10.0))

    yield run.measured("a lease, from its beginning to its end", many(leased), many(back), to=_TO, rounds=rounds)
    for number in range(_MEMBERS):
        rendezvous.put(f"/bench/all/{number}", _VALUE)
    yield run.measured(
        f"listing {_MEMBERS} records of 1 KiB", lambda: rendezvous.list("/bench/all/"),
        many(back, _MEMBERS), to=_TO, rounds=rounds, nbytes=_MEMBERS * len(_VALUE),
    )  # fmt: skip
    with rendezvous.watch("/bench/watched/") as watch:

        def told() -> None:
            rendezvous.put("/bench/watched/one", _VALUE)
            assert watch.next(30.0), "no change was told"

        yield run.measured("a change, from the call to whoever watches", many(told), many(back), to=_TO, rounds=rounds)


class _Other:
    """A process that says one line, and ends with its input."""

    def __init__(self, code: str, *words: str) -> None:
        command = [sys.executable, "-c", code, *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    def __enter__(self) -> _Other:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


BENCH: Final = Benchmark("Records, leases and changes in the rendezvous direct, beside TCP on this machine.", rows)
