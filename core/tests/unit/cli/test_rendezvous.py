"""`tensorway rendezvous` in a process of its own, and what `--status` says of it."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tensorway
from tensorway import cli
from tensorway.cli.rendezvous import METRICS, samples
from tensorway.rendezvous import Directory
from tensorway.rendezvous.hosts import choose
from tensorway.rendezvous.service import Service

SECRET = "a secret of the tests"


@contextmanager
def serving(*words, limit=None, **environment):
    """The command; and what it printed first, as JSON."""

    def begin():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs the tests in the background may have it ignored
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    process = subprocess.Popen(
        [sys.executable, "-m", "tensorway", "rendezvous", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TENSORWAY_SECRET": SECRET, **environment},
        preexec_fn=begin,
    )
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate(timeout=30)


def status(address, *words, secret=SECRET):
    return subprocess.run(
        [sys.executable, "-m", "tensorway", "rendezvous", "--status", address, *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TENSORWAY_SECRET": secret},
    )


def enter(address):
    return tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(number):
    with serving() as (process, said):
        with enter(said["address"]) as client:
            client.put("/a", b"x")
            assert client.get("/a").value == b"x"
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
        assert (process.returncode, told) == (0, "")


def test_a_secret_in_a_file_is_the_one_that_counts(tmp_path):
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    with serving("--secret-file", str(file), TENSORWAY_SECRET="another, which does not count") as (_, said):
        assert status(said["address"]).returncode == 0
        stranger = status(said["address"], secret="another, which does not count")
        assert (stranger.returncode, "the secret differs" in stranger.stderr) == (2, True)
    missing = status("127.0.0.1:1", "--secret-file", str(tmp_path / "none"))
    assert (missing.returncode, "--secret-file" in missing.stderr) == (2, True)


def test_status_says_who_is_there_in_which_state_and_for_how_long():
    with serving() as (_, said), ExitStack() as stack:
        client = stack.enter_context(enter(said["address"]))
        for name in ("prefill-0", "decode-0"):
            endpoint = stack.enter_context(tensorway.create("transport", "local", {"name": name}))
            member = stack.enter_context(Directory(client, endpoint, name, "/prod/kv", ttl=60))
            if name == "prefill-0":
                member.live()
        client.put("/prod/kv/odd", b"no member")
        client.put("/test/else", b"elsewhere")
        found = json.loads(status(said["address"], "--prefix", "/prod/", "--json").stdout)
        rows = {row["name"]: row for row in found["members"]}
        states = {name: (row["group"], row["state"], row["transport"]) for name, row in rows.items()}
        assert states == {"prefill-0": ("/prod/kv", "live", "local"), "decode-0": ("/prod/kv", "joining", "local")}
        assert all(30 < row["lease_seconds"] <= 60 for row in rows.values())
        assert (found["others"], found["records"], found["leases"], found["watches"]) == (1, 5, 2, 2)
        assert found["memory_bytes"] > 1 << 20
        assert found["calls"]["put"] == 6 and found["calls"]["status"] == 1
        text = status(said["address"]).stdout
        assert "prefill-0            live      local" in text
        assert "2 records are no members." in text


def test_metrics_are_served_at_a_port_of_their_own():
    with serving("--metrics-port", "0") as (_, said), enter(said["address"]) as client:
        client.put("/a", b"four")
        connection = http.client.HTTPConnection(said["metrics"].split("/")[2], timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        families = list(text_string_to_metric_families(text))
        values = {
            sample.name: sample.value for family in families for sample in family.samples if "call" not in sample.labels
        }
        assert (values["tensorway_rendezvous_records"], values["tensorway_rendezvous_record_bytes"]) == (1, 4)
        assert values["tensorway_source_up"] == 1


def test_every_word_of_the_vocabulary_is_counted():
    service = Service(choose("loopback"), 0, SECRET)
    try:
        with enter(service.address) as client:
            client.put("/a", b"x")
        assert {sample.metric for sample in samples(service.status())} == set(METRICS)
    finally:
        service.close()


def test_more_clients_are_served_than_the_usual_limit_of_files_has_room_for():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(limit=(48, most)) as (_, said), ExitStack() as stack:
        for each in range(60):
            client = stack.enter_context(enter(said["address"]))
            client.put(f"/clients/{each}", b"x", deadline=30)
        assert len(client.list("/clients/")) == 60


def test_a_service_whose_port_is_taken_says_so():
    with serving() as (_, said):
        port = said["address"].rpartition(":")[2]
        words = [sys.executable, "-m", "tensorway", "rendezvous", "--port", port]
        second = subprocess.run(
            words, capture_output=True, text=True, timeout=100, env={**os.environ, "TENSORWAY_SECRET": SECRET}
        )
        assert (second.returncode, "Address already in use" in second.stderr) == (2, True)


def test_others_are_told_what_the_operator_says():
    with serving("--host", "any:loopback", "--advertise", "localhost") as (_, said):
        assert said["address"].startswith("localhost:")


def test_a_service_that_ends_by_itself_ends_the_command(monkeypatch, capsys):
    monkeypatch.setenv("TENSORWAY_SECRET", SECRET)
    monkeypatch.setattr(Service, "alive", False)
    assert cli.main(["rendezvous", "--seconds", "60"]) == 70
    assert "has ended by itself" in capsys.readouterr().err
