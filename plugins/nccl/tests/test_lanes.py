"""The two lanes without a group: what they call and in which order, how they wait, and that they let go."""

from __future__ import annotations

import threading
import time
from array import array

import pytest

from tensorway import memory
from tensorway.eplb import EplbContext, ExpertLayout, ExpertTensor, Group, Staging
from tensorway.errors import BackendUnavailable, DeadlineExceeded, MemoryInvalid, PeerLost, TransferFailed
from tensorway.memory import Region
from tensorway.platforms import PlatformReport
from tensorway_nccl import direct_lane, runtime, session
from tensorway_nccl.direct import UniqueId
from tensorway_nccl.direct_lane import DirectLane, DirectPair
from tensorway_nccl.lanes import Pair, Piece, Stuck, ran
from tensorway_nccl.library import Nccl, NotFound
from tensorway_nccl.options import NcclOptions
from tensorway_nccl.runtime import Runtime

SUCCESS, NOT_READY, BAD = 0, 600, 700


def soon():
    return time.monotonic() + 10


# -- waiting


def test_a_wait_ends_when_it_is_over_late_or_stopped():
    pair, looks = Pair("p1"), []
    pair.wait(lambda: looks.append(1) or len(looks) == 4, soon())
    assert 4 == len(looks)

    with pytest.raises(DeadlineExceeded, match="not over in time"):
        pair.wait(lambda: False, time.monotonic() + 0.05)

    threading.Timer(0.05, pair.stop, ["it was killed"]).start()
    with pytest.raises(PeerLost, match="The peer is lost: it was killed"):
        pair.wait(lambda: False, soon())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("", True)),
        (PeerLost.because("asked", "it is gone"), ("The peer is lost: it is gone.", True)),
        (Stuck("it is on the device"), ("it is on the device", False)),
        (OSError("what the library says"), ("OSError: what the library says", False)),
    ],
)
def test_rows_are_free_only_if_that_is_known(error, expected):
    class Its(Pair):
        def exchange(self, sends, receives, until):
            if error:
                raise error

    assert expected == ran(Its("p1"), [], [], soon())


# -- the lane direct


class Device:
    """The functions of the runtime and of NCCL that a pair calls; `states` and `queries` are answers, one by one."""

    def __init__(self, states=(), queries=()):
        self.calls = []
        self.states, self.queries = list(states), list(queries)

    def __getattr__(self, name):
        if not name.startswith(("nccl", "cuda")):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            match name:
                case "ncclGetErrorString" | "ncclGetLastError":
                    return b"no"
                case "ncclCommInitRankConfig":
                    arguments[0]._obj.value = 0xC0
                    return 7
                case "ncclCommGetAsyncError":
                    arguments[1]._obj.value = self.states.pop(0) if self.states else SUCCESS
                case "cudaStreamCreateWithFlags":
                    arguments[0]._obj.value = 0x50
                case "cudaStreamQuery":
                    return self.queries.pop(0) if self.queries else SUCCESS
            return SUCCESS

        function = call
        self.__dict__[name] = function
        return function


def direct_pair(device):
    return DirectPair("p1", device, Runtime(device, "cuda", 0), bytes(UniqueId()), 0, None)


def test_a_round_is_over_when_nccl_and_the_stream_say_so():
    device = Device(states=[7, 7, 0, 7, 0], queries=[NOT_READY, NOT_READY, SUCCESS])
    direct_pair(device).exchange([Piece(4096, 1)], [Piece(8192, 1)], soon())

    order = ["cudaSetDevice", "cudaStreamCreateWithFlags", "ncclCommInitRankConfig", *["ncclCommGetAsyncError"] * 3]
    order += ["ncclGroupStart", "ncclSend", "ncclRecv", "ncclGroupEnd", "ncclCommGetAsyncError"]
    order += ["ncclCommGetAsyncError", "cudaStreamQuery"] * 3
    assert order == device.calls


def test_a_late_round_is_aborted_and_over_when_its_stream_is_idle():
    device = Device(queries=[NOT_READY] * 10_000)
    pair = direct_pair(device)

    def abort(handle):
        device.calls.append("ncclCommAbort")
        del device.queries[5:]  # the device has let go a few looks later
        return SUCCESS

    device.ncclCommAbort = abort
    with pytest.raises(DeadlineExceeded):
        pair.exchange([Piece(4096, 1)], [], time.monotonic() + 0.05)

    aborted = device.calls.index("ncclCommAbort")
    assert {"cudaStreamQuery"} == {*device.calls[aborted + 1 : -1]}
    assert "cudaStreamDestroy" == device.calls[-1]
    pair.close()
    assert 1 == device.calls.count("ncclCommAbort") == device.calls.count("cudaStreamDestroy")


def test_a_stream_that_never_gets_idle_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(direct_lane, "LET_GO", 0.05)
    device = Device(queries=[NOT_READY] * 100_000)
    with pytest.raises(Stuck):
        direct_pair(device).exchange([Piece(4096, 1)], [], time.monotonic() + 0.01)

    assert "cudaStreamDestroy" not in device.calls


def test_a_broken_device_is_not_taken_for_an_idle_one():
    device = Device(queries=[BAD] * 10)
    why, released = ran(direct_pair(device), [Piece(4096, 1)], [], soon())

    assert "The device's runtime says 700 to StreamQuery." == why
    assert not released


def test_a_runtime_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "FILES", {"cuda": ("libcudart_of_nobody.so",)})
    with pytest.raises(BackendUnavailable) as missing:
        runtime.load("cuda", 0, [str(tmp_path)])
    assert "libcudart_of_nobody.so" in missing.value.true

    broken = tmp_path / "torch" / "lib" / "libcudart_of_nobody.so"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no library")
    assert [str(broken)] == list(runtime._candidates(("libcudart_of_nobody.so",), [str(tmp_path)]))[1:]


def test_the_runtime_of_a_device_that_fails_says_so():
    class Failing(Device):
        def cudaSetDevice(self, number):
            return 101

    with pytest.raises(TransferFailed, match="says 101 to SetDevice"):
        Runtime(_Plain(Failing()), "cuda", 3).enter()


class _Plain:
    """Functions that take `argtypes`, which methods do not."""

    def __init__(self, device):
        for name in runtime.PROTOTYPES:
            method = getattr(device, f"cuda{name}")
            setattr(self, f"cuda{name}", lambda *arguments, method=method: method(*arguments))


# -- the lane torch


class Work:
    def __init__(self, answers, error=None):
        self.answers, self.error = list(answers), error

    def is_completed(self):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def exception(self):
        return self.error


class TorchGroup:
    """What a process group is asked; an end of coalescing gives this work."""

    def __init__(self, work, fails_at=""):
        self.calls, self.work, self.fails_at = [], work, fails_at

    def _start_coalescing(self):
        self.calls.append("start")

    def _end_coalescing(self):
        self.calls.append("end")
        return self.work

    def send(self, tensors, peer, tag):
        self._move("send", tensors, peer)

    def recv(self, tensors, peer, tag):
        self._move("recv", tensors, peer)

    def _move(self, what, tensors, peer):
        self.calls.append((what, tensors[0].data_ptr(), tensors[0].numel(), peer))
        if what == self.fails_at:
            raise RuntimeError("NCCL error: unhandled system error")

    def abort(self):
        self.calls.append("abort")


@pytest.fixture
def torch_pair():
    """A pair of the lane whose group is not torch's, and whose rows are on the host."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    import contextlib

    from tensorway_nccl.torch_lane import TorchPair, _Invitation

    class Its(TorchPair):
        waited = ()

        def _made(self):
            return self.given

        def _current(self):
            return contextlib.nullcontext()

        def _watch(self, works):
            return lambda: self.idle

    def made(group, idle=True):
        pair = Its("p1", _Invitation("127.0.0.1", 1, "x"), 0, torch.device("cpu"), 5.0)
        pair.given, pair.idle = group, idle
        return pair

    return made


@pytest.fixture
def row():
    return array("b", bytes(64))


def of(row, start, nbytes):
    return Piece(row.buffer_info()[0] + start, nbytes)


def test_a_batch_is_one_operation_and_is_asked_again_and_again(torch_pair, row):
    group = TorchGroup(Work([False, False, True]))
    torch_pair(group).exchange([of(row, 0, 8), of(row, 8, 8)], [of(row, 16, 4)], soon())

    address = row.buffer_info()[0]
    moves = [("send", address, 8, 1), ("send", address + 8, 8, 1), ("recv", address + 16, 4, 1)]
    assert ["start", *moves, "end"] == group.calls


def test_a_batch_that_fails_is_ended_and_aborted_and_its_rows_are_not_free(torch_pair, row):
    group = TorchGroup(Work([True]), fails_at="recv")
    with pytest.raises(Stuck, match="unhandled system error"):
        torch_pair(group).exchange([of(row, 0, 8)], [of(row, 8, 8)], soon())

    assert ["end", "abort"] == [call for call in group.calls if isinstance(call, str)][1:]


def test_what_torch_calls_complete_may_have_failed(torch_pair, row):
    group = TorchGroup(Work([False, True], RuntimeError("remote process exited")))
    with pytest.raises(PeerLost, match="remote process exited"):
        torch_pair(group).exchange([of(row, 0, 8)], [], soon())
    assert "abort" == group.calls[-1]


def test_a_late_batch_is_aborted(torch_pair, row):
    group = TorchGroup(Work([False]))
    with pytest.raises(DeadlineExceeded):
        torch_pair(group).exchange([of(row, 0, 8)], [], time.monotonic() + 0.05)
    assert "abort" == group.calls[-1]


def test_rows_of_a_batch_that_the_device_keeps_are_not_free(torch_pair, row, monkeypatch):
    from tensorway_nccl import torch_lane

    monkeypatch.setattr(torch_lane, "LET_GO", 0.05)
    pair = torch_pair(TorchGroup(Work([True])), idle=False)
    pair._watch = lambda works: lambda: pair.stop("it is lost")  # while it is on its way
    with pytest.raises(Stuck):
        pair.exchange([of(row, 0, 8)], [], soon())


def test_a_group_that_is_made_too_late_is_aborted(torch_pair, row):
    group = TorchGroup(Work([True]))
    pair = torch_pair(group)
    pair.stop("it is lost")
    with pytest.raises(PeerLost):
        pair.exchange([of(row, 0, 8)], [], soon())
    assert ["abort"] == group.calls


def test_a_torch_without_nccl_is_refused():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL")
    from tensorway_nccl.torch_lane import TorchLane

    with pytest.raises(BackendUnavailable, match="was built without it"):
        TorchLane("cuda:0", 5.0)


# -- which lane, and of which memory


def layout_on(device):
    region = Region.of(memory.shared(64))
    return ExpertLayout(
        (((ExpertTensor("w", "uint8", 16, 16, Region(region.address, 64, device, owner=region))),),), 4, 4
    )


GOOD = Nccl("/lib/libnccl.so.2", (2, 27, 3), ())


@pytest.mark.parametrize(
    ("option", "found", "expected"),
    [
        ("auto", GOOD, "direct"),
        ("direct", GOOD, "direct"),
        ("torch", GOOD, "torch"),
        ("auto", NotFound(), "torch"),
        ("auto", Nccl("/x", (2, 17, 1), ()), "torch"),
        ("auto", Nccl("/x", (2, 27, 1), ("ncclSend",)), "torch"),
        ("direct", NotFound(), None),
    ],
)
def test_the_lane_is_the_one_that_was_asked_for_or_that_there_is(option, found, expected, monkeypatch):
    if expected == "torch":
        pytest.importorskip("torch", reason="needs torch: pip install torch")
        from tensorway_nccl import torch_lane

        monkeypatch.setattr(torch_lane.TorchLane, "prepare", lambda lane: None)
    from tensorway_nccl import direct

    asked = []
    monkeypatch.setattr(session, "report", lambda kind: PlatformReport(kind, kind == "cuda", (), (), "", ""))
    monkeypatch.setattr(session, "find", lambda kind: found)
    monkeypatch.setattr(direct, "load", asked.append)
    monkeypatch.setattr(runtime, "load", lambda *arguments: asked.append(arguments))

    if expected is None:
        with pytest.raises(BackendUnavailable, match="No library of"):
            session.chosen(NcclOptions(option), layout_on("cuda:3"))
        return
    assert expected == session.chosen(NcclOptions(option), layout_on("cuda:3")).name
    assert asked == (["/lib/libnccl.so.2", ("cuda", 3)] if expected == "direct" else [])


@pytest.mark.parametrize(("device", "says"), [("cpu", "They are on cpu"), ("xpu:0", "They are on xpu:0")])
def test_memory_that_it_does_not_move_is_refused_before_anybody_is_called(device, says):
    layout = layout_on(device)
    staging = Staging(dict.fromkeys(layout.kinds, layout.layers[0][0].region), 2)
    context = EplbContext(Group("/x", ("a", "b"), 0), layout, staging, None)

    with pytest.raises(MemoryInvalid, match=says):
        session.NcclSession(NcclOptions(), context, DirectLane(None, None, None))


def test_staging_without_rows_of_a_kind_is_refused():
    layout = layout_on("cuda:0")
    context = EplbContext(Group("/x", ("a", "b"), 0), layout, Staging({}, 2), None)

    with pytest.raises(MemoryInvalid, match="no rows of w"):
        session.NcclSession(NcclOptions(), context, DirectLane(None, None, None))


def test_long_rows_are_cut_and_short_ones_are_not():
    assert [Piece(0, 5)] == session._cut(0, 5)
    pieces = session._cut(4096, 2 * session.PIECE + 3)
    assert [session.PIECE, session.PIECE, 3] == [piece.nbytes for piece in pieces]
    assert [4096, 4096 + session.PIECE, 4096 + 2 * session.PIECE] == [piece.address for piece in pieces]


def test_what_it_takes_is_taken_by_a_warmup():
    assert session.reserve(layout_on("cuda:0"), Staging({}, 1)).warmup
