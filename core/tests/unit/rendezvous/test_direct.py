"""The store `direct`: the suite, with the service in this process and, where it comes to harm, in one of its own."""

from __future__ import annotations

import sys

import pytest

from tensorway.testing import ServedRendezvousSuite, Server, launching

SECRET = "a secret of the tests"

#: Runs the service of `direct` until it is killed.
SERVE = """
import sys, time, tensorway
service = tensorway.create("rendezvous", "direct", {"secret": sys.argv[1], "port": int(sys.argv[2])})
time.sleep(600)
"""


class Service(Server):
    """One process that holds the records; empty when it is started again."""

    def __init__(self, folder):
        super().__init__(folder)
        self.address = f"127.0.0.1:{self.port}"
        self.command = [sys.executable, "-c", SERVE, SECRET, str(self.port)]


class TestDirect(ServedRendezvousSuite):
    name = "direct"

    def entrance(self, server):
        return {"address": server.address, "secret": SECRET}

    @pytest.fixture
    def options(self):
        import tensorway

        with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
            yield self.entrance(service)

    @pytest.fixture
    def server(self, tmp_path):
        with launching(Service, tmp_path) as launch:
            yield launch()
