"""A small crowd: what a long one is judged by holds for it, and what is wrong with one is told."""

from __future__ import annotations

import shutil
import socket
import time

import pytest

from tensorway.testing.crowd import Crowd, Traffic, direct
from tensorway.testing.waiting import eventually


def test_a_crowd_meets_comes_back_and_misses_its_dead(tmp_path):
    report = Crowd(direct(tmp_path), members=8, processes=2, ttl=1.0, patience=60.0).run(rest=1.0)
    assert report.breaches == []
    assert report.members == 8
    assert report.mesh_seconds > 0 and report.again_seconds > 0
    assert report.server_peak_bytes >= report.server_bytes > 1 << 20
    # The store ends a lease in its time, and a tick later tells so; it had been kept up to a third of that before.
    assert 0.5 <= report.missed_last <= 3 * 1.0 + 2


def test_a_member_that_nobody_writes_again_is_told(tmp_path):
    store = direct(tmp_path)

    class Forgetful(type(store.server)):
        """A service whose second life is at another place."""

        def kill(self):
            super().kill()
            self.command[self.command.index("--port") + 1] = "0"

        def answers(self):
            return super().answers() or "0" in self.command

    store.server.__class__ = Forgetful
    report = Crowd(store, members=2, processes=1, ttl=0.5, patience=3.0).run(rest=0.5)
    assert any("written again" in breach or "did not answer" in breach for breach in report.breaches), report


def test_what_reaches_a_port_is_counted():
    if shutil.which("ss") is None:
        pytest.skip("needs ss: apt-get install iproute2")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as there,
        Traffic(server.getsockname()[1]) as traffic,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = 0

        def send() -> None:
            nonlocal sent
            client.sendall(b"x")
            there.recv(1)
            sent += 1
            time.sleep(0.03)

        eventually(lambda: traffic.rate, step=send)
    assert traffic.rate > 0
    assert 0 < traffic.burst <= sent
