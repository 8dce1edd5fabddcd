"""Every guard between a mistake and a Mooncake that would crash at it; with a stand-in that counts what reaches it."""

from __future__ import annotations

import os
import warnings

import pytest

from tensorway.errors import AddressInvalid, BackendUnavailable, Closed, MemoryInvalid, TransferFailed, Unsupported
from tensorway.memory import Region
from tensorway.rendezvous.hosts import HostChoice
from tensorway_mooncake import engine as engines
from tensorway_mooncake.library import REFUSED


class Native:
    """Mooncake's engine, as far as these tests ask it."""

    def __init__(self):
        self.calls = []
        self.answers = {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, 0)
            return answer.pop(0) if isinstance(answer, list) else answer

        return call


@pytest.fixture
def native():
    return Native()


@pytest.fixture
def engine(native):
    made = engines.Engine("127.0.0.1", 15_000, native, {"Notify": lambda *words: words, "Opcode": type(native)()})
    engines._open.add(made)
    return made


def region(address, nbytes):
    return Region(address, nbytes, "cpu")


# -- operations


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, -1), (1 << 63, 1, 1), (1, (1 << 63) - 1, 2)]
)
def test_an_operation_that_cannot_be_meant_does_not_reach_mooncake(engine, native, numbers):
    with pytest.raises(MemoryInvalid):
        engine.submit("read", "127.0.0.1:15001", *numbers)
    assert [] == native.calls


@pytest.mark.parametrize("none", [0, -1, (1 << 64) - 1])
def test_a_handle_that_is_none_is_never_asked_about(engine, native, none):
    native.answers["batch_transfer_async_read"] = none
    assert 0 == engine.submit("read", "127.0.0.1:15001", 1, 1, 1)
    with pytest.raises(LookupError):
        engine.check(none)
    assert ["batch_transfer_async_read"] == [name for name, *_ in native.calls]


def test_each_operation_is_a_batch_of_its_own(engine, native):
    native.answers |= {"batch_transfer_async_read": 7, "batch_transfer_async_write": 8}
    engine.submit("read", "peer:1", 1, 2, 3)
    engine.submit("write", "peer:1", 4, 5, 6)
    assert [
        ("batch_transfer_async_read", "peer:1", [1], [2], [3]),
        ("batch_transfer_async_write", "peer:1", [4], [5], [6]),
    ] == native.calls


@pytest.mark.parametrize("end", [engines.DONE, engines.FAILED])
def test_a_handle_is_not_asked_about_after_its_end(engine, native, end):
    native.answers |= {"batch_transfer_async_read": 7, "transfer_check_status": [0, end]}
    handle = engine.submit("read", "peer:1", 1, 2, 3)
    assert [engines.PENDING, end] == [engine.check(handle), engine.check(handle)]
    before = len(native.calls)
    with pytest.raises(LookupError):
        engine.check(handle)
    assert before == len(native.calls)


def test_a_handle_that_another_thread_gets_while_it_is_asked_about_is_that_thread_s(engine, native):
    """What Mooncake frees with its last answer it may give away again before that answer is here."""
    native.answers["batch_transfer_async_read"] = 7
    first = engine.submit("read", "peer:1", 1, 2, 3)
    asked = native.calls.append

    class Freeing:
        def append(self, call):
            asked(call)
            if call == ("transfer_check_status", first) and len(seen) == 1:
                seen.append(engine.submit("read", "peer:1", 4, 5, 6))

    native.calls, seen = Freeing(), [first]
    native.answers["transfer_check_status"] = [engines.DONE, engines.PENDING, engines.DONE]
    assert engines.DONE == engine.check(first)
    assert [first, first] == seen
    assert [engines.PENDING, engines.DONE] == [engine.check(first), engine.check(first)]


@pytest.mark.parametrize("error", [RuntimeError("LargestInt out of UInt64 range"), MemoryError(), UnicodeError()])
def test_what_mooncake_raises_about_a_peer_s_answer_is_a_failure_like_any_other(engine, native, error):
    def raising(*words):
        raise error

    for name in ("batch_transfer_async_read", "transfer_sync", "send_probe"):
        setattr(native, name, raising)
    assert 0 == engine.submit("read", "peer:1", 1, 2, 3)
    assert not engine.notify("peer:1", "x", 1, 2)
    assert not engine.answers("peer:1")


def test_an_answer_that_is_none_poisons_the_engine_and_the_handle_stays(engine, native):
    native.answers |= {"batch_transfer_async_read": 7, "transfer_check_status": [-2, -1]}
    handle = engine.submit("read", "peer:1", 1, 2, 3)
    assert -2 == engine.check(handle)
    for call in (
        lambda: engine.submit("read", "peer:1", 1, 2, 3),
        lambda: engine.register(region(1, 1)),
        lambda: engine.notify("peer:1", "x", 1, 1),
        engine.notified,
    ):
        with pytest.raises(TransferFailed, match="answered -2"):
            call()
    assert engines.FAILED == engine.check(handle), "what is under way is still asked after"


# -- memory


def test_memory_within_what_is_registered_is_counted_and_goes_with_the_last_user(engine, native):
    whole, part, again = (engine.register(region(*row)) for row in ((4096, 8192), (8192, 4096), (4096, 8192)))
    for handle in (whole, again, part):
        assert [("register_memory", 4096, 8192)] == native.calls
        engine.deregister(handle)
    assert ("unregister_memory", 4096) == native.calls[-1]


def test_memory_that_overlaps_is_refused_with_what_it_overlaps(engine, native):
    engine.register(region(4096, 4096))
    native.answers["register_memory"] = -7
    with pytest.raises(MemoryInvalid, match="overlap 4,096 bytes at 0x1000"):
        engine.register(region(8000, 4096))
    with pytest.raises(Unsupported, match="code -7"):
        engine.register(region(1 << 20, 4096))


# -- notifications


@pytest.mark.parametrize(("code", "probe", "delivered"), [(0, 0, True), (0, -102, False), (-1, 0, False)])
def test_a_notification_counts_only_if_the_peer_was_there_afterwards(engine, native, code, probe, delivered):
    native.answers |= {"transfer_sync": code, "send_probe": probe}
    assert delivered is engine.notify("peer:1", "x", 1, 2)


def test_messages_of_others_and_what_is_no_text_are_dropped(engine, native):
    class Note:
        def __init__(self, name, message):
            self.name, self._message = name, message

        @property
        def msg(self):
            if self._message is None:
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return self._message

    native.answers["get_notifies"] = [[Note("tensorway", "a"), Note("else", "b"), Note("tensorway", None)]]
    assert ["a"] == engine.notified()


# -- beginning and end


def test_the_end_is_when_the_last_reference_is_dropped(engine, native):
    native.answers |= {"batch_transfer_async_read": 7}
    handle = engine.submit("read", "peer:1", 1, 2, 3)
    assert not engine.close(), "the fixture has a reference"
    assert engines.PENDING == engine.check(handle), "it may still write"
    with pytest.raises(Closed):
        engine.submit("read", "peer:1", 1, 2, 3)
    engine.close()


def test_what_was_in_flight_is_over_when_the_engine_is_gone():
    made = engines.Engine("127.0.0.1", 15_000, Native(), {})
    assert made.close()
    assert engines.FAILED == made.check(7)


def test_in_a_forked_child_it_is_refused(engine, native):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.submit("read", "peer:1", 1, 2, 3)
        except Closed:
            code = 0
        finally:
            os._exit(code)
    assert 0 == os.waitpid(child, 0)[1]


@pytest.mark.parametrize("variable", REFUSED)
def test_a_variable_that_changes_mooncake_stops_an_endpoint_before_it_is_loaded(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BackendUnavailable, match=f"{variable} is set"):
        engines.create("127.0.0.1")


def test_an_address_of_another_machine_is_refused_before_an_engine_is_made(monkeypatch):
    class Loaded:
        symbols = {"Engine": None}

    monkeypatch.setattr(engines, "load", Loaded)
    with pytest.raises(BackendUnavailable, match=r"192\.0\.2\.1, and no interface"):
        engines.create("192.0.2.1")


def test_a_host_policy_is_resolved_on_this_machine():
    assert ("127.0.0.1", "127.0.0.1") == (engines.address_of("loopback"), engines.address_of("any:cidr:127.0.0.1/32"))
    assert "10.0.0.7" == engines.address_of("10.0.0.7")
    with pytest.raises(AddressInvalid, match="It fits no address"):
        engines.address_of("iface:none0")


def test_a_host_policy_that_gives_an_address_mooncake_was_not_tried_with_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "choose", lambda policy: HostChoice("fd77::2", "fd77::2", policy, "eth0"))
    with pytest.raises(BackendUnavailable, match="gives fd77::2 here, and Mooncake has been tried with IPv4 only"):
        engines.address_of("auto")


def test_an_engine_that_does_not_initialize_is_reported_and_never_destroyed(monkeypatch):
    native = Native()
    native.answers["initialize"] = -1
    kept = []

    class Loaded:
        symbols = {"Engine": lambda: native}

    monkeypatch.setattr(engines, "load", Loaded)
    monkeypatch.setattr(engines, "_keep_for_ever", kept.append)
    with pytest.raises(BackendUnavailable, match="code -1"):
        engines.create("127.0.0.1")
    assert [native] == kept
