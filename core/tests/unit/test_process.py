"""What a process has in memory, and how many files it may open."""

from __future__ import annotations

import resource
import subprocess
import sys

from tensorway.process import raise_limit_of_files, resident_bytes

TAKEN = 64 << 20


def test_memory_that_is_written_is_resident_and_the_most_stays_when_it_is_given_back():
    before = resident_bytes()
    memory = bytearray(TAKEN)
    memory[::4096] = b"x" * len(memory[::4096])
    with_it, most = resident_bytes(), resident_bytes(most=True)
    del memory
    assert with_it - before > TAKEN * 0.9
    assert most > with_it - (4 << 20)
    assert resident_bytes() < with_it - TAKEN // 2
    assert resident_bytes(most=True) > most - (4 << 20)  # the kernel counts it roughly


def test_another_process_is_asked_by_its_number():
    code = "import sys; sys.stdout.write('here'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.read(4) == b"here"
        assert 1 << 20 < resident_bytes(child.pid) <= resident_bytes(child.pid, most=True)
        child.stdin.close()


def test_as_many_files_may_be_opened_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_limit_of_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
