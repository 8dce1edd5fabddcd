"""Both ends of `tensorway probe`, in processes of their own, over the address that one prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

SECRET = "a secret of the tests"


def tensorway(*words, secret=SECRET):
    environment = {**os.environ, "TENSORWAY_SECRET": secret}
    return subprocess.run(
        [sys.executable, "-m", "tensorway", *words], capture_output=True, text=True, timeout=100, env=environment
    )


@pytest.fixture
def server():
    """A serving end, and its address."""
    command = [sys.executable, "-m", "tensorway", "probe", "--serve", "--host", "loopback", "--transport", "local"]
    environment = {**os.environ, "TENSORWAY_SECRET": SECRET}
    process = subprocess.Popen(
        [*command, "--seconds", "90"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        # What runs the tests in the background may have told them to ignore it, and they would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        assert "Serving transport local" in lines[1], lines
        yield process, lines[2].split()[-1]
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_reads_from_a_peer_are_measured_and_verified(server):
    process, address = server
    answered = tensorway("probe", address, "--json")
    assert answered.returncode == 0, answered.stderr
    found = json.loads(answered.stdout)
    (row,) = found["transports"]
    assert (found["peer"], row["name"], row["lane"], row["verified"]) == (address, "local", "cma", True)
    assert row["bandwidth_ratio"] > 0 and row["latency_ratio"] > 0
    assert " us for 4 KiB" in process.stdout.readline()


def test_what_does_not_fit_is_told(server):
    _, address = server
    refused = tensorway("probe", address, "--transport", "nixl")
    assert (refused.returncode, "It serves transport local." in refused.stderr) == (2, True)
    stranger = tensorway("probe", address, secret="another secret of tests")
    assert (stranger.returncode, "the secret differs" in stranger.stderr) == (2, True)


def test_a_server_that_is_interrupted_says_goodbye(server):
    process, _ = server
    process.send_signal(signal.SIGINT)
    assert "saying goodbye" in process.stdout.read()
    assert process.wait(20) == 0


def test_a_peer_that_is_not_there_is_told_in_time():
    answered = tensorway("probe", "127.0.0.1:1", "--deadline", "0.5")
    assert (answered.returncode, "Nothing answered there within 0.5 s" in answered.stderr) == (3, True)
