"""Memory that is lent again when nothing lies in it any more."""

from __future__ import annotations

import ctypes
import threading

import pytest

from tensorway_ray.landing import Landing

MIB = 1 << 20


def address(lent):
    return ctypes.addressof(lent)


def test_memory_is_lent_again_when_it_is_gone_and_not_before():
    landing = Landing()
    first = landing.take(3 * MIB)
    where, part = address(first), memoryview(first)[100:200]
    assert len(first) >= 3 * MIB
    del first
    other = landing.take(3 * MIB)
    assert address(other) != where
    del part
    assert address(landing.take(3 * MIB)) == where


def test_a_tensor_that_lies_in_it_keeps_it_also_when_it_is_only_a_part():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    landing = Landing()
    lent = landing.take(3 * MIB)
    where = address(lent)
    whole = torch.frombuffer(lent, dtype=torch.uint8, count=4096, offset=4096).view(torch.float32)
    part = whole[10:20]
    del lent, whole
    other = landing.take(3 * MIB)
    assert address(other) != where
    del part
    assert address(landing.take(3 * MIB)) == where


def test_a_small_object_does_not_take_what_a_large_one_needs():
    landing = Landing()
    large = landing.take(32 * MIB)
    where = address(large)
    del large
    small = landing.take(10 * MIB)
    assert (address(small) == where, len(small)) == (False, 10 * MIB)
    again = landing.take(17 * MIB)
    assert (address(again), len(again)) == (where, 32 * MIB)


def test_what_is_kept_while_nothing_lies_in_it_has_a_limit():
    landing = Landing(idle=8 * MIB)
    lent = [landing.take(4 * MIB) for _ in range(4)]
    where = [address(each) for each in lent]
    while lent:
        del lent[0]  # the longest gone are let go first
    again = [landing.take(4 * MIB) for _ in range(2)]
    assert {address(each) for each in again} == set(where[2:])
    assert not landing._kept


def left(landing):
    return sum(map(len, [*landing._kept, *landing._returned]))


def test_what_comes_back_beyond_the_limit_does_not_wait_for_the_next_who_takes():
    landing = Landing(idle=4 * MIB)
    lent = [landing.take(2 * MIB) for _ in range(20)]
    del lent
    assert left(landing) <= 4 * MIB


def test_what_comes_back_while_another_holds_the_lock_waits_for_that_one_only(monkeypatch):
    landing = Landing(idle=2 * MIB)
    lent = [landing.take(2 * MIB) for _ in range(8)]
    collect = landing._collect

    def collected():
        collect()
        lent.clear()  # as the garbage collector may, in the thread that holds the lock

    monkeypatch.setattr(landing, "_collect", collected)
    taken = landing.take(2 * MIB)
    assert left(landing) <= 2 * MIB and len(taken)


def test_threads_do_not_get_the_same_memory():
    landing, wrong = Landing(), []

    def use(number):
        for _ in range(200):
            lent = landing.take(2 * MIB)
            lent[:8] = lent[-8:] = [number] * 8
            if lent[:8] != [number] * 8 or lent[-8:] != [number] * 8:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert wrong == []
