"""Servers of tests: they come back at the same port, say why they did not start, and do not outlive the test."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from tensorway.testing import Server, launching
from tensorway.testing.servers import program

#: Answers everybody with the number of its process.
SERVE = """
import os, socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        with listener.accept()[0] as sock:
            sock.sendall(b"%d" % os.getpid())
"""


class Numbered(Server):
    """A server that says which process it is."""

    def __init__(self, folder, code=SERVE):
        super().__init__(folder)
        self.command = [sys.executable, "-c", code, str(self.port)]

    def ask(self, seconds=10.0):
        with socket.create_connection(("127.0.0.1", self.port), seconds) as sock:
            return int(sock.recv(64))


@pytest.fixture
def launch(tmp_path):
    with launching(Numbered, tmp_path) as launch:
        yield launch


def test_a_server_that_was_killed_comes_back_at_its_port_as_another_process(launch):
    server = launch()
    first = server.ask()
    server.kill()
    assert not server.answers()
    server.start()
    assert first != server.ask()


def test_a_server_that_is_paused_is_connected_to_and_silent(launch):
    server = launch()
    server.pause()
    with pytest.raises(TimeoutError):
        server.ask(0.3)
    server.resume()
    assert server.ask() > 0


def test_servers_have_ports_and_folders_of_their_own_and_end_with_the_launching(tmp_path):
    with launching(Numbered, tmp_path) as launch:
        servers = [launch(), launch()]
        numbers = {server.ask() for server in servers}
        servers[1].pause()
    assert 2 == len(numbers) == len({server.port for server in servers}) == len({server.folder for server in servers})
    assert [False, False] == [server.answers() for server in servers]
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_a_server_that_ends_at_once_says_why(launch):
    with pytest.raises(AssertionError, match="no licence"):
        launch("raise SystemExit('no licence')")


def test_a_server_that_was_never_started_can_be_killed_and_not_paused(tmp_path):
    server = Numbered(tmp_path)
    server.kill()
    with pytest.raises(AssertionError, match="never started"):
        server.pause()


def test_a_program_that_is_missing_is_a_reason_to_skip_unless_it_was_promised():
    assert program("sh", "apt-get install dash", required=True).endswith("/sh")
    with pytest.raises(pytest.skip.Exception, match="needs no-such-server: apt-get install it"):
        program("no-such-server", "apt-get install it", required=False)
    with pytest.raises(pytest.fail.Exception, match="no-such-server is not installed: apt-get install it"):
        program("no-such-server", "apt-get install it", required=True)
