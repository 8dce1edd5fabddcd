"""`tensorway top` looks at real processes: that move bytes, hold leases, are stopped, killed, or hostile."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from tensorway.exports import short
from tensorway.metrics import Counters, Metric, vocabulary
from tensorway.metrics_server import MetricsServer

LIVES = Path(__file__).with_name("lives.py")
PATIENCE = 60


class Life:
    """A process of `lives.py`, which has begun."""

    def __init__(self, folder, *words):
        environment = {**os.environ, "TENSORWAY_METRICS": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(LIVES), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.pid = self.process.pid
        line = self.process.stdout.readline()
        assert line, f"{words} ended with {self.process.wait(PATIENCE)}"
        self.said = json.loads(line)

    def signal(self, number):
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(PATIENCE)

    def end(self):
        """Let it end as it wants to; what it says last."""
        self.process.stdin.close()
        said = self.process.stdout.read().splitlines()
        assert 0 == self.process.wait(PATIENCE)
        return json.loads(said[-1]) if said else {}

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def folder(tmp_path):
    """Where the processes of a test have their sockets."""
    return tmp_path / "seen"


@pytest.fixture
def live(folder):
    """Starts processes."""
    with contextlib.ExitStack() as stack:

        def start(*words):
            made = Life(folder, *words)
            stack.callback(made.close)
            return made

        yield start


TOP = [sys.executable, "-m", "tensorway", "top"]
WITHOUT = {name: value for name, value in os.environ.items() if name != "TENSORWAY_METRICS"}


def top(*words, code=0, environment=WITHOUT):
    """What it prints, and how long it took."""
    started = time.monotonic()
    done = subprocess.run([*TOP, *words], capture_output=True, timeout=60, env=environment, check=False)
    assert code == done.returncode, done
    return done.stdout.decode(), time.monotonic() - started


SCHEMA = json.loads((resources.files("tensorway_tools.top") / "schemas.json").read_text("utf-8"))["$defs"]


def seen(folder, *words, code=0):
    """As JSON; whoever lives has time to answer on a machine that is busy."""
    words = words if "--deadline" in words else (*words, "--deadline", "20")
    text = top("--json", "--folder", str(folder), *words, code=code)[0]
    answer = json.loads(text, parse_constant=pytest.fail)  # `Infinity` is no JSON
    jsonschema.validate(answer, SCHEMA[answer["schema"]])
    return answer


def by_pid(rows):
    return {row["pid"]: row for row in rows}


def test_what_endpoints_move_is_what_they_say_they_moved(live, folder):
    lives = [live("moves"), live("moves")]
    answer = seen(folder, "--interval", "4")
    assert {each.pid for each in lives} < {row["pid"] for row in answer["processes"] if row["state"] == "answers"}
    rows, peers = by_pid(answer["endpoints"]), by_pid(answer["peers"])
    for each in lives:
        row, peer, moved = rows[each.pid], peers[each.pid], each.end()["bytes_per_second"]
        assert each.said["endpoint"] == row["endpoint"] == peer["endpoint"]
        assert 1 / 3 < row["read_bytes_per_second"] / moved < 3
        assert peer["bytes_per_second"] == row["read_bytes_per_second"]
        assert (0, 0, 1, []) == (row["write_bytes_per_second"], row["failed"], row["peers"], row["hurts"])
        assert peer["blocks_per_second"] == pytest.approx(64 * peer["transfers_per_second"])
        assert 0 < peer["each"] < 10


def test_what_hurts_comes_first(live, folder):
    quiet, wounded = live("moves"), live("loses")
    rows = seen(folder)["endpoints"]
    assert wounded.pid == rows[0]["pid"] != quiet.pid
    assert 1 == rows[0]["failed"] and {"failed", "lost"} == set(rows[0]["hurts"])


def test_leases_are_seen_and_one_that_is_lost(live, folder):
    service = live("serves")
    member = live("holds", service.said["address"], "5")
    (row,) = seen(folder)["leases"]
    assert (member.pid, 1, 0) == (row["pid"], row["held"], row["lost"])
    assert 0 < row["left"] <= 5
    service.signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while not row["lost"] and time.monotonic() < until:
        (row,) = seen(folder)["leases"]
    assert (1, ["lost"]) == (row["lost"], row["hurts"])


MISSING = [name for name in ("tensorway_cpu", "tensorway_fs") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'tensorway[cpu,fs]'")
def test_tiers_are_seen(live, folder):
    life = live("offloads")
    until = time.monotonic() + 30
    rows = {}
    while not all(rows.get(name, {}).get("stored_per_second") for name in ("cpu", "fs")) and time.monotonic() < until:
        rows = {row["medium"]: row for row in seen(folder)["tiers"]}
    assert {life.pid} == {row["pid"] for row in rows.values()}
    assert {"engine-0"} == {row["engine"] for row in rows.values()}
    assert 0 < rows["cpu"]["blocks"] <= rows["cpu"]["room"] == 32
    assert rows["fs"]["bytes_per_second"] > 0 == rows["fs"]["breaker"]


def test_a_stopped_process_costs_its_own_row_only(live, folder):
    moving, stopped = live("moves"), live("moves")
    stopped.signal(signal.SIGSTOP)
    text, seconds = top("--once", "--folder", str(folder), "--deadline", "6", "--interval", "0.2")
    assert re.search(rf"{stopped.pid}  silent .*: it is stopped", text)
    assert re.search(rf"{moving.pid}  answers ", text)
    assert text.index(f"{stopped.pid}  silent") < text.index(f"{moving.pid}  answers")
    assert seconds < 50, "it waited for the stopped one longer than its deadlines"
    stopped.signal(signal.SIGCONT)
    assert "answers" == by_pid(seen(folder)["processes"])[stopped.pid]["state"]


def test_who_was_killed_leaves_a_socket_that_is_passed_over_and_swept(live, folder):
    killed = live("moves")
    (own,) = folder.glob(f"{killed.pid}-*")
    killed.signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while (answer := seen(folder))["left_over"] < 1 and time.monotonic() < until:
        pass
    assert killed.pid not in by_pid(answer["processes"]) and own.exists()
    other = live("moves")  # the next one that begins tidies up
    assert not own.exists()
    assert {other.pid} <= {row["pid"] for row in seen(folder)["processes"]}


def test_who_ends_leaves_nothing(live, folder):
    life = live("moves")
    assert list(folder.glob(f"{life.pid}-*"))
    life.end()
    assert [] == list(folder.glob(f"{life.pid}-*"))


def test_a_forked_child_is_seen_as_itself_or_not_at_all(live, folder):
    parent = live("forks")
    silent, speaking = parent.said["children"]
    until = time.monotonic() + 30
    while speaking not in by_pid((answer := seen(folder))["processes"]) and time.monotonic() < until:
        pass
    found = by_pid(answer["processes"])
    assert {"answers"} == {found[pid]["state"] for pid in (parent.pid, speaking)} and silent not in found
    endpoints = [row["endpoint"] for row in answer["endpoints"]]
    assert len(set(endpoints)) == len(endpoints), "a child answers for its parent"
    parent.end()
    assert [] == list(folder.glob(f"{parent.pid}-*"))


def test_the_socket_of_a_parent_that_was_killed_is_swept_although_its_children_live(live, folder):
    parent = live("forks")
    (own,) = folder.glob(f"{parent.pid}-*")
    parent.signal(signal.SIGKILL)
    live("moves")
    assert all(Path(f"/proc/{child}").exists() for child in parent.said["children"])
    assert not own.exists()


HOSTILE = {
    "escapes": "answers",
    "drips": "silent",
    "floods": "refused",
    "lies": "refused",
    "swells": "refused",
    "nameless": "answers",
    "swears": "refused",
    "hangs": "silent",
}


def test_hostile_sockets_neither_hang_it_nor_write_to_the_terminal(live, folder):
    moving = live("moves")
    lives = {what: live("hostile", str(folder / f"PID-{'0' * 8}.tensorway"), what) for what in HOSTILE}
    (folder / "1-00000000.tensorway").write_text("a file")
    imposter = live("hostile", str(folder / "1-11111111.tensorway"), "lies")
    answer = seen(folder, "--deadline", "6")
    states = {row["source"]: (row["state"], row["why"]) for row in answer["processes"]}
    found = {what: states[str(folder / f"{life.pid}-{'0' * 8}.tensorway")][0] for what, life in lives.items()}
    assert found == HOSTILE
    assert ("refused", "it is not a socket") == states[str(folder / "1-00000000.tensorway")]
    assert ("refused", f"process {imposter.pid} answers for 1") == states[str(folder / "1-11111111.tensorway")]
    assert "answers" == by_pid(answer["processes"])[moving.pid]["state"]
    assert ["?"] == by_pid(answer["processes"])[lives["nameless"].pid]["failing"]
    text, seconds = top("--once", "--folder", str(folder), "--deadline", "6", "--interval", "0.2")
    assert text.isascii() and all(line.isprintable() for line in text.split("\n"))
    assert "owned" in text and "tensorway_x" not in text
    assert seconds < 50, "somebody made it wait longer than its deadlines"


def test_prometheus_endpoints_are_looked_at_as_well():
    words = vocabulary(Metric("transport_bytes_total", "counter", ("peer", "operation"), "Bytes."))
    counts = Counters(words, transport="t", endpoint="e")
    with MetricsServer(words) as one, MetricsServer(words) as two:
        urls = ["http://{}:{}/metrics".format(*server.address) for server in (one, two)]
        for number, server in enumerate((one, two)):

            def growing(peer=str(number)):
                counts.add("transport_bytes_total", 1000, peer=peer, operation="write")
                return [row for row in counts.samples() if ("peer", peer) in row.labels]

            server.add("source", growing)
        words = ["--json", "--url", urls[0], "--url", urls[1], "--interval", "0.5", "--deadline", "20"]
        answer = json.loads(top(*words)[0])
    assert set(urls) == {row["source"] for row in answer["endpoints"]}
    for row in answer["endpoints"]:
        assert 100 < row["write_bytes_per_second"] < 2001  # one call between two looks, at least half a second apart
    away = json.loads(top(*words, code=3)[0])
    assert {"gone"} == {row["state"] for row in away["processes"]} and [] == away["endpoints"]


def test_a_source_that_raises_is_named():
    with MetricsServer({}) as server:
        server.add("a broken one", lambda: 1 / 0)
        url = "http://{}:{}/metrics".format(*server.address)
        answer = json.loads(top("--json", "--url", url, "--deadline", "20")[0])
        assert [["a broken one"]] == [row["failing"] for row in answer["processes"]]
        assert "raise when they are asked: a broken one" in top("--once", "--url", url, "--deadline", "20")[0]


def test_only_some_processes(live, folder):
    one, other = live("moves"), live("moves")
    assert [one.pid] == [row["pid"] for row in seen(folder, "--pid", str(one.pid))["processes"]]
    both = seen(folder, "--pid", str(one.pid), "--pid", str(other.pid))
    assert {one.pid, other.pid} == {row["pid"] for row in both["processes"]}


def test_nobody_there_is_a_line_that_says_how_to_switch_it_on(tmp_path):
    assert "TENSORWAY_METRICS is not set here." in top("--once")[0]
    text = top("--once", environment={**WITHOUT, "TENSORWAY_METRICS": str(tmp_path / "none")})[0]
    assert f"No process has a socket in {tmp_path / 'none'}." in text and "export TENSORWAY_METRICS=" in text
    assert [] == seen(tmp_path)["processes"]


@pytest.mark.parametrize("url", ["https://a/metrics", "ftp://a", "http://", "http://a:b/", "http://a b/", "a:1"])
def test_a_url_that_is_none_is_refused(url):
    error = json.loads(top("--json", "--url", url, code=2)[0])
    assert "OptionsInvalid" == error["error"] and "http://HOST:PORT" in error["true"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    error = json.loads(top("--json", "--folder", str(tmp_path / "file"), code=2)[0])
    assert "OptionsInvalid" == error["error"]


def until_seen(terminal, wanted, seconds=30.0):
    """What a terminal was sent until it holds that."""
    until, text = time.monotonic() + seconds, b""
    while not wanted(text):
        assert time.monotonic() < until, text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 1 << 16)
    return text


def test_a_terminal_is_drawn_on_again_and_again_until_it_is_interrupted(live, folder):
    life = live("moves")
    master, slave = pty.openpty()
    environment = {**WITHOUT, "TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    words = [*TOP, "--folder", str(folder), "--interval", "0.1"]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    try:
        text = until_seen(master, lambda text: text.count(b"\x1b[H") >= 3)
        assert str(life.pid).encode() in text
        for picture in text.split(b"\x1b[H")[1:-1]:
            lines = re.sub(rb"\x1b\[[0-9;]*[A-Za-z]", b"", picture).split(b"\r\n")
            assert len(lines) <= 20 and max(map(len, lines)) <= 60
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal is gone when nobody holds it any more
            while select.select([master], [], [], 10)[0] and os.read(master, 1 << 16):
                pass
        assert 0 == process.wait(30)
    finally:
        process.kill()
        process.wait(30)
        os.close(master)


def test_piped_it_is_plain_and_goes_on(live, folder):
    live("moves")
    words = [*TOP, "--folder", str(folder), "--interval", "0.1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=WITHOUT)
    try:
        text = until_seen(process.stdout.fileno(), lambda text: text.count(b"ENDPOINTS") >= 3)
        assert b"\x1b" not in text
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def test_a_socket_whose_queue_is_full_is_silent(folder):
    folder.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        path = folder / f"{os.getpid()}-00000000.tensorway"
        with short(path) as name:
            server.bind(name)
        server.listen(0)
        while True:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                with short(path) as name:
                    waiting.connect(name)
            except BlockingIOError:
                break
        (row,) = seen(folder, code=3)["processes"]
    assert ("silent", "it did not answer in time") == (row["state"], row["why"])
    assert Path(row["source"]).name.startswith(str(os.getpid()))
