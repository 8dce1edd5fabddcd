"""Neither a crash nor a hang nor nonsense of a probe reaches the one who asks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from tensorway.plugins import probing
from tensorway.plugins.probing import ProbeFailure
from tensorway.testing.possessions import grown_since
from tensorway.testing.stops import children
from tensorway.testing.waiting import settled
from tensorway.types import Offer, ProbeResult

PROBES = """
import ctypes, os, signal, subprocess, sys, time
from tensorway.types import ProbeResult

def passes(): return ProbeResult.passed("it works", version="1.2", count=3)
def refuses(): return ProbeResult.failed("no device", "Plug it in.", seen=0)
def raises(): raise OSError("libx.so: cannot open shared object file")
def exits(): sys.exit(3)
def exits_at_once(): os._exit(7)
def nothing(): return None
def sleeps(): time.sleep(600)
def illegal(): os.kill(os.getpid(), signal.SIGILL)
def segfault(): print("about to touch page zero", flush=True); ctypes.string_at(0)
def aborts(): os.abort()
def refuses_loudly():
    print("x" * 5000, "what the code means", file=sys.stderr)
    return ProbeResult.failed("code -7", "Look it up.")
def talks():
    print("x" * 5000); print("the last line"); sys.stdout.flush()
    os.abort()
def floods():
    while True: os.write(1, b"x" * 65536)
def passes_and_aborts_at_exit():
    import atexit
    atexit.register(os.abort)
    return ProbeResult.passed("it works")
def leaves_a_helper():
    if os.fork() == 0:
        time.sleep(600)
    return ProbeResult.passed("it works")
def huge(): return ProbeResult.passed("x" * (2 << 20))
def environment(): return ProbeResult.passed("ok", pid=os.getpid(), session=os.getsid(0), modules=len(sys.modules))
def group():
    if os.fork() == 0:
        time.sleep(600)
    return ProbeResult.passed("ok", group=os.getpgid(0))
"""


@pytest.fixture(autouse=True)
def _probes(site) -> None:
    site.module("some_probes", PROBES)


def ask(name: str, seconds: float = 30, probe_in: str = "child") -> ProbeResult | ProbeFailure:
    import some_probes

    probe = getattr(some_probes, name)
    return answer(probe, seconds, probe_in).result


def answer(probe, seconds: float = 30, probe_in: str = "child") -> probing.Answer:
    return probing.run(Offer("x", "transport", "s", probe=probe, probe_in=probe_in), seconds)


@pytest.mark.parametrize("probe_in", ["child", "host"])
def test_an_answer_comes_back_whole(probe_in):
    assert ProbeResult(True, "it works", facts={"version": "1.2", "count": 3}) == ask("passes", probe_in=probe_in)
    assert ProbeResult(False, "no device", "Plug it in.", {"seen": 0}) == ask("refuses", probe_in=probe_in)


def test_a_library_that_aborts_in_its_teardown_does_not_turn_a_yes_into_a_no():
    assert ProbeResult(True, "it works") == ask("passes_and_aborts_at_exit")


@pytest.mark.parametrize("probe_in", ["child", "host"])
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("raises", "probe-raised", "raised OSError: libx.so: cannot open shared object file"),
        ("exits", "probe-raised", "called sys.exit(3)"),
        ("nothing", "probe-raised", "NoneType"),
        ("sleeps", "probe-timeout", "did not answer within 0.7 s"),
    ],
)
def test_what_goes_wrong_in_python_is_a_failure_with_its_reason(name, code, words, probe_in):
    result = ask(name, 0.7 if name == "sleeps" else 30, probe_in)
    assert isinstance(result, ProbeFailure)
    assert (code, True) == (result.code, words in result.reason)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("illegal", "SIGILL (an instruction that this CPU lacks)"),
        ("segfault", "SIGSEGV (a bad memory access)"),
        ("aborts", "SIGABRT (a failed assertion)"),
        ("exits_at_once", "exit status 7"),
    ],
)
def test_a_native_death_is_a_failure_that_names_the_signal(name, words):
    result = ask(name)
    assert isinstance(result, ProbeFailure)
    assert ("probe-aborted", True) == (result.code, words in result.reason)


def test_the_last_words_of_a_library_are_kept_and_bounded():
    import some_probes

    for probe, words in ((some_probes.talks, "the last line"), (some_probes.refuses_loudly, "what the code means")):
        output = answer(probe).output
        assert output.endswith(words)
        assert len(output) <= probing._TAIL_BYTES


def test_a_library_that_floods_its_output_is_stopped():
    started = time.monotonic()
    result = ask("floods", 20)
    assert isinstance(result, ProbeFailure)
    assert time.monotonic() - started < 20


def test_an_answer_too_large_to_be_one_is_refused_at_once():
    started = time.monotonic()
    assert "probe-raised" == ask("huge", 30).code
    assert time.monotonic() - started < 15


def test_a_helper_that_the_library_forked_neither_delays_the_answer_nor_survives_it():
    started = time.monotonic()
    result = ask("group", 20)
    assert isinstance(result, ProbeResult)
    assert time.monotonic() - started < 10
    _wait_for(lambda: not _living(result.facts["group"]))


def test_the_child_is_another_process_in_a_session_of_its_own():
    result = ask("environment")
    assert os.getpid() != result.facts["pid"]
    assert result.facts["pid"] == result.facts["session"]


def test_a_probe_that_nobody_could_import_is_refused_before_anything_starts():
    result = answer(lambda: ProbeResult.passed("yes")).result
    assert ("offer-invalid", True) == (result.code, "cannot be imported by name" in result.reason)


def test_no_interpreter_to_start_is_a_failure_not_an_exception(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "probe-not-run" == ask("passes").code
    monkeypatch.setattr(sys, "executable", "")
    assert "probe-not-run" == ask("passes").code


def processes():
    """Our children, those that have ended and were not waited for among them."""
    return set(children(os.getpid()))


def test_fifty_probes_leave_no_file_no_process_and_no_thread_behind():
    ask("passes")
    gc.collect()
    grown, before = grown_since(), processes()
    for name in ("passes", "raises", "illegal", "exits_at_once", "leaves_a_helper") * 5:
        ask(name)
    gc.collect()
    assert [] == settled(grown)
    assert processes() <= before, "who was started is not waited for"


def test_it_works_in_a_process_with_more_files_open_than_select_can_count(site):
    code = """
    import resource, socket
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [socket.socket() for _ in range(1200)]
    import some_probes
    from tensorway.plugins import probing
    from tensorway.types import Offer
    print(probing.run(Offer("x", "transport", "s", probe=some_probes.passes), 30).result.reason)
    """
    assert "it works" == site.python(code).stdout.strip()


def test_a_child_whose_parent_was_killed_ends_by_itself(site):
    code = """
    import some_probes, os, threading
    from tensorway.plugins import probing
    from tensorway.types import Offer
    print(os.getpid(), flush=True)
    probing.run(Offer("x", "transport", "s", probe=some_probes.sleeps), 2)
    """
    site.module("main_program", "import textwrap; exec(textwrap.dedent('''" + code + "'''))")
    environ = dict(os.environ, PYTHONPATH=str(site.path))
    parent = subprocess.Popen([sys.executable, "-m", "main_program"], stdout=subprocess.PIPE, env=environ)
    parent.stdout.readline()
    child = _wait_for(lambda: _children(parent.pid))[0]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_for(lambda: not os.path.exists(f"/proc/{child}") or _is_zombie(child), 10)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _living(group: int) -> list[int]:
    """Processes of a group that still run; one that was killed may wait for its new parent to notice."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if _group(pid) == group and not _is_zombie(pid)]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_for(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come about in time")


def test_the_signals_that_have_hints_exist():
    assert all(getattr(signal, name) for name in probing._HINTS)
