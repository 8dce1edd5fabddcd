"""What a process shows of itself at a socket, and what may go wrong with that without anybody noticing."""

from __future__ import annotations

import gc
import logging
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tensorway import exports
from tensorway.exports import SUFFIX, VARIABLE, export, short
from tensorway.metrics import Counters, Metric, vocabulary

WORDS = vocabulary(Metric("jobs_total", "counter", ("worker",), "Jobs."))


class Worker:
    def __init__(self, name, count=1):
        self.name, self.count = name, count

    def samples(self):
        counts = Counters(WORDS)
        counts.add("jobs_total", self.count, worker=self.name)
        return counts.samples()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this process shows itself, until the test is over."""
    path = tmp_path / "seen"
    monkeypatch.setenv(VARIABLE, str(path))
    yield path
    opened = exports._servers.pop(str(path), None)
    if opened is not None:
        opened[0].close()
        opened[1].unlink(missing_ok=True)


def bind(sock, path):
    with short(path) as name:
        sock.bind(name)


def ask(path):
    with socket.socket(socket.AF_UNIX) as connection, short(path) as name:
        connection.settimeout(30)
        connection.connect(name)
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b""
        while part := connection.recv(65536):
            text += part
    return text.decode()


def test_without_the_variable_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    threads, made = set(threading.enumerate()), dict(exports._servers)
    export("worker", Worker("a").samples, WORDS)
    assert set(threading.enumerate()) <= threads and made == exports._servers


def test_a_source_is_asked_when_somebody_looks_and_as_long_as_its_object_lives(folder):
    one, other = Worker("one"), Worker("other", 2)
    export("worker", one.samples, WORDS)
    export("worker", other.samples, WORDS)
    (path,) = folder.iterdir()
    assert path.name.startswith(f"{os.getpid()}-") and path.suffix == SUFFIX
    one.count = 7
    text = ask(path)
    assert 'tensorway_jobs_total{worker="one"} 7.0' in text and 'tensorway_jobs_total{worker="other"} 2.0' in text
    del one
    gc.collect()
    text = ask(path)
    assert 'worker="one"' not in text and 'worker="other"' in text
    assert 1 == text.count("tensorway_source_up{"), "who is gone is still asked"


def test_only_the_user_can_reach_it(folder):
    export("worker", Worker("a").samples, WORDS)
    assert 0o700 == stat.S_IMODE(folder.stat().st_mode)


def test_a_table_that_grows_while_it_is_read_is_read_again(folder):
    class Growing(Worker):
        def samples(self):
            self.count += 1
            if self.count % 3:
                raise RuntimeError("dictionary changed size during iteration")
            return super().samples()

    growing = Growing("a", 3)
    export("worker", growing.samples, WORDS)
    (path,) = folder.iterdir()
    assert 'tensorway_jobs_total{worker="a"} 6.0' in ask(path)


def open_to_others(path):
    path.mkdir(mode=0o755)
    path.chmod(0o755)


def a_file(path):
    path.write_text("")


def a_link(path):
    target = path.with_name("target")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


@pytest.mark.parametrize("make", [open_to_others, a_file, a_link])
def test_a_folder_that_will_not_do_is_said_once_and_costs_nobody_anything(folder, make, caplog, monkeypatch):
    make(folder)
    with caplog.at_level(logging.WARNING, logger="tensorway"):
        export("worker", Worker("a").samples, WORDS)
        export("worker", Worker("b").samples, WORDS)
    (record,) = caplog.records
    assert record.getMessage().startswith("Nobody sees the metrics of this process: ")
    exports._servers.pop(os.environ[VARIABLE], None)


def test_what_was_left_over_is_swept_and_nothing_else(folder):
    folder.mkdir(mode=0o700)
    left, living, foreign = folder / f"1-a{SUFFIX}", folder / f"2-b{SUFFIX}", folder / "3.sock"
    with socket.socket(socket.AF_UNIX) as gone, socket.socket(socket.AF_UNIX) as here:
        bind(gone, left)
        bind(here, living)
        here.listen(1)
        with socket.socket(socket.AF_UNIX) as other:
            bind(other, foreign)
        gone.close()
        export("worker", Worker("a").samples, WORDS)
        names = {path.name for path in folder.iterdir()}
    assert left.name not in names and {living.name, foreign.name} < names and 3 == len(names)


def test_a_file_of_the_users_is_not_swept_whatever_it_is_called(folder):
    folder.mkdir(mode=0o700)
    notes, link, sub = (folder / f"{name}{SUFFIX}" for name in ("notes", "link", "sub"))
    notes.write_text("mine")
    link.symlink_to(notes)
    sub.mkdir()
    export("worker", Worker("a").samples, WORDS)
    assert "mine" == notes.read_text() and link.is_symlink() and sub.is_dir()
    assert exports._servers[str(folder)] is not None


def test_what_another_process_sweeps_first_costs_nobody_anything(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(Path, "glob", lambda place, pattern: [place / f"1-gone{SUFFIX}"])
    export("worker", Worker("a").samples, WORDS)
    assert exports._servers[str(folder)] is not None


def test_a_folder_may_have_a_longer_name_than_a_socket(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    monkeypatch.setenv(VARIABLE, str(deep))
    worker = Worker("deep")
    export("worker", worker.samples, WORDS)
    try:
        (path,) = deep.iterdir()
        assert 'worker="deep"' in ask(path)
        assert not exports._left_over(path)
    finally:
        exports._servers.pop(str(deep))[0].close()
    assert exports._left_over(path)


CHILD = """
import os, sys
from pathlib import Path
from tensorway.exports import export
from tensorway.metrics import Metric, vocabulary

class Worker:
    def samples(self):
        return ()

worker, folder = Worker(), Path(os.environ["TENSORWAY_METRICS"])
export("worker", worker.samples, vocabulary())
(path,) = folder.iterdir()
child = os.fork()
if not child:
    export("worker", worker.samples, vocabulary())
    names = sorted(each.name.partition("-")[0] for each in folder.iterdir())
    assert names == sorted([str(os.getpid()), str(os.getppid())]), names
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert list(folder.iterdir()) == [path], "a child took the parent's socket with it, or left its own"
"""


def test_a_forked_child_has_a_socket_of_its_own_and_leaves_the_parents(tmp_path):
    environment = {**os.environ, VARIABLE: str(tmp_path / "seen")}
    code = textwrap.dedent(CHILD)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert [] == list((tmp_path / "seen").iterdir()), "who has ended left its socket"


def test_it_is_not_paid_for_by_who_does_not_want_it():
    code = "import sys, tensorway.exports; print('http.server' in sys.modules or 'socketserver' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "False" == done.stdout.strip()


def test_the_folder_is_found_again_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "relative")
    worker = Worker("a")
    export("worker", worker.samples, WORDS)
    opened = exports._servers.pop("relative")
    assert opened is not None and opened[1].is_absolute() and Path(opened[1]).exists()
    opened[0].close()
