"""Ranks as processes: what they return and raise comes back, waits end, and none of them outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tensorway.testing.possessions import grown_since
from tensorway.testing.ranks import RankFailed, RankProcess, Ranks, _results
from tensorway.testing.waiting import settled

# -- what a rank calls


def remember(rank, key, value):
    rank.notes[key] = value


def recall(rank, key):
    return rank.notes.get(key), os.getpid()


def place(rank, place, *given):
    return (place.path, place.members, place.me, place.epoch), given, os.getpid()


def fail(rank, word):
    raise KeyError(word)


def leave(rank, code):
    os._exit(code)


def nap(rank, seconds):
    time.sleep(seconds)
    return seconds


def print_much(rank):
    print("x" * 100_000)
    os.write(1, b"of a native library")
    return "done"


def echo(rank, data):
    return data


def put(rank, key):
    return rank.rendezvous() is rank.rendezvous(), rank.rendezvous().put(key, str(os.getpid()).encode())


class Inside:
    @staticmethod
    def echo(rank, data):
        return data


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


# -- calls


def test_a_rank_is_a_process_that_keeps_what_it_is_told(ranks):
    ranks.each([0, 1], remember, "answer", 42)
    answers = ranks.each([1, 0], recall, "answer")
    assert [(42, ranks[1].pid), (42, ranks[0].pid)] == answers
    assert os.getpid() not in {pid for _, pid in answers}


def test_it_can_be_seen_whether_a_rank_answers(ranks):
    ranks[0].start(nap, 0.5)
    assert not ranks[0].answers
    until = time.monotonic() + 60
    while not ranks[0].answers:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert 0.5 == ranks[0].result() and not ranks[0].answers


def test_what_a_function_raises_is_raised_with_its_traceback_and_the_rank_goes_on(ranks):
    with pytest.raises(RankFailed, match=rf"process {ranks[0].pid} raised:\nTraceback") as caught:
        ranks[0].call(fail, "lanes")
    assert "KeyError: 'lanes'" in str(caught.value)
    assert "in fail" in str(caught.value)
    assert 7 == ranks[0].call(echo, 7)


def test_answers_come_in_the_order_of_the_calls(ranks):
    for number in range(3):
        ranks[0].start(echo, number)
    assert [0, 1, 2] == [ranks[0].result() for _ in range(3)]


def test_an_answer_may_be_large(ranks):
    data = os.urandom(3 << 20)
    assert data == ranks[0].call(echo, data)


def test_what_is_printed_does_not_disturb_the_answers(ranks):
    assert "done" == ranks[0].call(print_much)
    assert 1 == ranks[0].call(echo, 1)


def test_a_function_of_a_class_and_of_an_installed_module_can_be_called(ranks):
    assert 5 == ranks[0].call(Inside.echo, 5)
    with pytest.raises(RankFailed, match="TypeError"):
        ranks[0].call(os.path.join)  # a rank is no part of a path


def test_ranks_that_are_told_together_work_at_once(ranks):
    ranks.each([0, 1], echo, None)  # they have started
    started = time.monotonic()
    assert [2.0, 2.0] == ranks.each([0, 1], nap, 2.0)
    assert time.monotonic() - started < 3.9


def test_they_meet_in_the_rendezvous_of_the_test(ranks):
    assert [True, True] == [same for same, _ in (ranks[index].call(put, f"/t/{index}") for index in (0, 1))]
    assert str(ranks[1].pid).encode() == ranks.rendezvous.get("/t/1").value


def test_each_is_told_its_place_in_the_order_that_is_given(ranks):
    found = ranks.enter([1, 0], place, "/t/experts", 3, "x")
    members = ("p1", "p0")
    assert [(("/t/experts", members, 0, 3), ("x",)), (("/t/experts", members, 1, 3), ("x",))] == [
        (where, given) for where, given, _ in found
    ]
    assert [ranks[1].pid, ranks[0].pid] == [pid for _, _, pid in found]


# -- ends


def test_a_rank_that_is_gone_before_it_is_told_anything_is_the_same_error():
    with contextlib.closing(RankProcess("")) as rank:
        os.kill(rank.pid, signal.SIGKILL)
        assert -signal.SIGKILL == rank.wait()
        with pytest.raises(RankFailed, match=f"ended with -{signal.SIGKILL:d}"):
            rank.call(os.path.abspath, ".")


def test_a_rank_that_ends_is_an_error_that_says_how():
    with Ranks(1) as ranks:
        pid = ranks[0].pid
        with pytest.raises(RankFailed, match=f"process {pid} ended with 3"):
            ranks[0].call(leave, 3)
        assert not ranks[0].alive
        assert 3 == ranks[0].wait()


def test_a_rank_that_does_not_answer_is_an_error_in_time_and_its_answer_is_not_lost():
    with Ranks(1) as ranks:
        assert 0 == ranks[0].call(nap, 0)
        started = time.monotonic()
        with pytest.raises(RankFailed, match="did not answer in time"):
            ranks[0].call(nap, 3.0, seconds=0.2)
        assert time.monotonic() - started < 2.5
        assert 3.0 == ranks[0].result()


def test_a_stopped_rank_goes_on_and_a_killed_one_is_gone():
    with Ranks(1) as ranks:
        rank = ranks[0]
        assert 1 == rank.call(echo, 1)
        rank.signal(signal.SIGSTOP)
        rank.start(echo, 2)
        with pytest.raises(RankFailed, match="in time"):
            rank.result(0.3)
        rank.signal(signal.SIGCONT)
        assert 2 == rank.result()
        rank.signal(signal.SIGKILL)
        assert not rank.alive
        with pytest.raises((RankFailed, BrokenPipeError)):
            rank.call(echo, 3)


def test_who_has_ended_is_replaced_and_the_others_stay():
    with Ranks(2) as ranks:
        killed, other = ranks[0].pid, ranks[1].pid
        ranks[0].signal(signal.SIGKILL)
        ranks.grow(3)
        assert 3 == len(ranks)
        assert other == ranks[1].pid
        assert killed != ranks[0].pid
        assert ["x"] * 3 == ranks.each(range(3), echo, "x")
        ranks.grow(1)
        assert 3 == len(ranks), "they do not become fewer"


def test_no_rank_outlives_its_test_whatever_it_is_doing():
    with Ranks(3) as ranks:
        pids = [ranks[index].pid for index in range(3)]
        ranks[0].start(nap, 1000)
        assert 1 == ranks[1].call(echo, 1)
        ranks[1].signal(signal.SIGSTOP)
        ranks[2].signal(signal.SIGKILL)
    assert [True] * 3 == [gone(pid) for pid in pids]


def test_a_rank_whose_test_is_gone_ends_by_itself():
    with Ranks(0) as ranks:
        rank = RankProcess(ranks.rendezvous.address)
        assert 1 == rank.call(echo, 1)
        rank._process.stdin.close()
        try:
            assert 0 == rank.wait(30)
        finally:
            rank.close()


def test_closing_again_does_nothing_and_leaves_no_file_and_no_thread_behind():
    for turn in range(4):
        ranks = Ranks(1)
        assert turn == ranks[0].call(echo, turn)
        ranks.close()
        ranks.close()
        if turn == 1:  # the first made what stays
            grown = grown_since()
    assert [] == settled(grown)


def start_napping(rank, seconds):
    """Let a rank of a rank be in the middle of something, and say which process it is."""
    rank.notes["below"] = RankProcess("")
    rank.notes["below"].start(nap, seconds)
    return rank.notes["below"].pid


def test_a_rank_in_the_middle_of_a_call_ends_when_who_started_it_is_killed():
    process = RankProcess("")
    try:
        below = process.call(start_napping, 600)
        process.signal(signal.SIGKILL)
        until = time.monotonic() + 60
        while b"tensorway.testing.ranks" in _command(below):
            assert time.monotonic() < until, "it goes on for nobody"
            time.sleep(0.05)
    finally:
        process.close()


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_ctrl_c_is_for_who_started_a_rank():
    process = RankProcess("")
    try:
        assert "x" == process.call(echo, "x")
        process.signal(signal.SIGINT)
        assert "y" == process.call(echo, "y")
    finally:
        process.close()


def test_so_many_seconds_are_for_all_of_them_together():
    with Ranks(2) as ranks:
        ranks.each(range(2), echo, "x")
        ranks[0].start(nap, 3.0)
        ranks[1].start(nap, 6.0)
        with pytest.raises(RankFailed, match="did not answer in time"):
            _results([ranks[0], ranks[1]], 4.5)
