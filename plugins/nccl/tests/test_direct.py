"""The calls of NCCL: their shapes with the library itself, and their order on a recorder."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import Closed, DeadlineExceeded, PeerLost, TransferFailed, Unsupported
from tensorway_nccl import direct
from tensorway_nccl.direct import Communicator, Config, Move, UniqueId, rounds

SUCCESS, REMOTE, IN_PROGRESS = 0, 6, 7
HANDLE = 0xABC0


class Recorder:
    """A library that does nothing and remembers in which order; `says` are the results of a function, one by one."""

    def __init__(self, **says):
        self.calls = []
        self.says = {name: list(results) for name, results in says.items()}

    def __getattr__(self, name):
        if not name.startswith("nccl"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name.removeprefix("nccl"))
            if name == "ncclGetErrorString":
                return b"what it is"
            if name == "ncclGetLastError":
                return b"why it is"
            if name in ("ncclCommInitRankConfig", "ncclCommShrink"):
                arguments[0 if name == "ncclCommInitRankConfig" else 3]._obj.value = self.made
            result = (self.says.get(name) or [SUCCESS]).pop(0)
            if name == "ncclCommGetAsyncError":
                arguments[1]._obj.value = result
                return SUCCESS
            return result

        return call

    made = HANDLE


def joined(library, rank=0, ranks=2):
    return Communicator.join(library, UniqueId(), rank, ranks, 5.0)


def moves(peer, count):
    return [Move(peer, 4096 + index, 1) for index in range(count)]


# -- shapes


@pytest.fixture
def real():
    """NCCL's own library and its header, where the wheel is installed."""
    found = [Path(entry, "nvidia/nccl/lib/libnccl.so.2") for entry in sys.path]
    found = [path for path in found if path.is_file()]
    promised = os.environ.get("TENSORWAY_TEST_LIBRARY")
    if not found and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and no wheel of NCCL is installed: pip install nvidia-nccl-cu12")
    if not found or promised == "without":
        pytest.skip("needs NCCL itself: pip install --no-deps nvidia-nccl-cu12")
    return found[0]


def test_the_real_library_has_every_function_and_tells_its_errors(real):
    library = direct.load(str(real))
    version = ctypes.c_int()

    assert SUCCESS == library.ncclGetVersion(ctypes.byref(version))
    assert version.value >= 21_800
    assert b"no error" == library.ncclGetErrorString(SUCCESS)
    assert b"remote process exited or there was a network error" == library.ncclGetErrorString(REMOTE)
    assert b"NCCL operation in progress" == library.ncclGetErrorString(IN_PROGRESS)


def test_an_open_group_of_the_real_library_is_ended(real):
    library = direct.load(str(real))

    for _ in range(3):
        with direct._grouped(library, "asked") as ended:
            pass
        assert [SUCCESS] == ended


def test_numbers_and_structures_are_those_of_the_real_header(real, tmp_path):
    header, compiler = real.parent.parent / "include" / "nccl.h", shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not header.is_file():
        pytest.skip("needs a C compiler and the header of the wheel: apt-get install gcc")
    for name, text in {
        "cuda_runtime.h": "typedef void *cudaStream_t, *cudaEvent_t;",
        "cuda_fp16.h": "",
        "cuda_bf16.h": "",
        "cuda_fp8.h": "",
    }.items():
        (tmp_path / name).write_text(text)
    fields = {
        "size": "size",
        "magic": "magic",
        "version": "version",
        "blocking": "blocking",
        "cga_cluster_size": "cgaClusterSize",
        "min_ctas": "minCTAs",
        "max_ctas": "maxCTAs",
        "net_name": "netName",
        "split_share": "splitShare",
    }
    assert list(fields) == [name for name, _ in Config._fields_]
    offsets = "\n".join(f'printf("%zu\\n", offsetof(ncclConfig_t, {name}));' for name in fields.values())
    source = f"""
        #include <stdio.h>
        #include <stddef.h>
        #include "nccl.h"
        int main(void) {{
            ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
            {offsets}
            printf("%zu\\n%u\\n%d\\n", sizeof(ncclUniqueId), config.magic, config.minCTAs);
            printf("%d\\n%d\\n%d\\n%d\\n", ncclUint8, ncclSuccess, ncclRemoteError, ncclInProgress);
            return 0;
        }}
    """
    (tmp_path / "main.c").write_text(source)
    command = [compiler, "-I", str(tmp_path), "-I", str(header.parent), "main.c", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True, timeout=60)

    ours = [getattr(Config, name).offset for name in fields]
    ours += [ctypes.sizeof(UniqueId), direct._MAGIC, direct.UNDEFINED]
    ours += [direct._BYTES, direct._SUCCESS, direct._REMOTE_ERROR, direct._IN_PROGRESS]
    assert ours == [int(line) for line in done.stdout.split()]


def test_the_structures_have_the_lengths_that_nccl_counts():
    assert 128 == ctypes.sizeof(UniqueId)
    assert 48 == ctypes.sizeof(Config)
    config = Config.non_blocking(4)
    assert (48, 0xCAFEBEEF, 0, 4) == (config.size, config.magic, config.blocking, config.max_ctas)
    assert direct.UNDEFINED == Config.non_blocking().max_ctas


# -- order


@given(
    ranks=st.integers(2, 5),
    counts=st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(0, 100), max_size=12),
)
def test_rounds_move_everything_once_and_nobody_waits_in_a_circle(ranks, counts):
    counts = {(a, b): count for (a, b), count in counts.items() if a != b and a < ranks and b < ranks}
    schedules = [
        rounds(
            rank,
            ranks,
            [move for (a, b), count in counts.items() if a == rank for move in moves(b, count)],
            [move for (a, b), count in counts.items() if b == rank for move in moves(a, count)],
        )
        for rank in range(ranks)
    ]
    assert all(len(out) + len(back) <= direct.ROUND for schedule in schedules for out, back in schedule)
    # Where the n-th move of a pair stands at its sender, and at its receiver.
    stands = [{}, {}]
    for rank, schedule in enumerate(schedules):
        for index, group in enumerate(schedule):
            for side in (0, 1):
                for move in group[side]:
                    pair = (rank, move.peer) if side == 0 else (move.peer, rank)
                    stands[side].setdefault(pair, []).append(index)
    for side in (0, 1):
        assert {pair: count for pair, count in counts.items() if count} == {
            pair: len(indices) for pair, indices in stands[side].items()
        }
    # Played: a group is over when everybody has come to the groups in which its moves stand there.
    at = [0] * ranks
    while any(at[rank] < len(schedules[rank]) for rank in range(ranks)):
        over = [
            rank
            for rank in range(ranks)
            if at[rank] < len(schedules[rank])
            and all(
                at[pair[1 - side]] >= there
                for side in (0, 1)
                for pair, indices in stands[side].items()
                if pair[side] == rank
                for here, there in zip(indices, stands[1 - side][pair], strict=True)
                if here == at[rank]
            )
        ]
        assert over, "every rank waits for another"
        for rank in over:
            at[rank] += 1


def test_every_group_that_is_started_is_ended_and_is_bounded():
    library = Recorder()
    joined(library).exchange(moves(1, 40), moves(1, 40), 7, 5.0)

    assert library.calls[1:] == [
        *["GroupStart", *["Send"] * 32, *["Recv"] * 32, "GroupEnd"],
        *["GroupStart", *["Send"] * 8, *["Recv"] * 8, "GroupEnd"],
    ]


def test_a_send_that_fails_ends_its_group_before_the_communicator_is_aborted():
    library = Recorder(ncclSend=[SUCCESS, 5])
    communicator = joined(library)

    with pytest.raises(TransferFailed) as failed:
        communicator.exchange(moves(1, 3), [], 7, 5.0)

    assert "NCCL says: what it is (5): why it is." == failed.value.true
    calls = [call for call in library.calls[1:] if not call.startswith("Get")]
    assert ["GroupStart", "Send", "Send", "GroupEnd", "CommAbort"] == calls
    with pytest.raises(Closed):
        communicator.exchange([], moves(1, 1), 7, 5.0)
    assert "GroupStart" not in library.calls[library.calls.index("CommAbort") :]


def test_the_end_of_a_group_is_waited_for_and_so_is_joining():
    library = Recorder(
        ncclCommInitRankConfig=[IN_PROGRESS],
        ncclCommGetAsyncError=[IN_PROGRESS, SUCCESS, IN_PROGRESS, IN_PROGRESS, SUCCESS],
        ncclGroupEnd=[IN_PROGRESS],
    )
    joined(library).exchange(moves(1, 1), [], 7, 5.0)

    asked = ["CommGetAsyncError"]
    assert ["CommInitRankConfig", *asked * 2, "GroupStart", "Send", "GroupEnd", *asked * 3] == library.calls


def test_who_does_not_come_ends_the_wait_with_an_abort():
    library = Recorder(ncclCommInitRankConfig=[IN_PROGRESS], ncclCommGetAsyncError=[IN_PROGRESS] * 10_000)

    with pytest.raises(DeadlineExceeded, match="NCCL was not done within"):
        Communicator.join(library, UniqueId(), 0, 2, 0.05)

    assert 1 == library.calls.count("CommAbort")
    assert "CommAbort" == library.calls[-1]


def test_a_lost_peer_is_told_before_the_communicator_is_aborted():
    library = Recorder(ncclCommGetAsyncError=[SUCCESS, REMOTE])
    communicator = joined(library)
    communicator.check()

    with pytest.raises(PeerLost):
        communicator.check()

    assert ["GetErrorString", "GetLastError", "CommAbort"] == library.calls[-3:]
    communicator.abort()
    assert 1 == library.calls.count("CommAbort")


def test_a_library_that_makes_no_communicator_says_why():
    library = Recorder(ncclCommInitRankConfig=[1])
    library.made = None

    with pytest.raises(TransferFailed, match="what it is"):
        joined(library)
    assert "CommAbort" not in library.calls


def test_what_is_left_after_some_are_lost_has_ranks_without_gaps_and_the_old_one_is_aborted():
    library = Recorder(ncclCommShrink=[IN_PROGRESS], ncclCommGetAsyncError=[SUCCESS])
    communicator = joined(library, rank=3, ranks=5)

    smaller = communicator.shrink({1, 4}, 5.0)

    assert (2, 3) == (smaller.rank, smaller.ranks)
    assert ["CommShrink", "CommGetAsyncError", "CommAbort"] == library.calls[-3:]
    with pytest.raises(Closed):
        communicator.check()
    smaller.check()


@pytest.mark.parametrize("excluded", [{3}, {5}, {0, 1, 2, 3, 4}])
def test_who_cannot_be_left_out_is_refused(excluded):
    library = Recorder()
    with pytest.raises(Unsupported):
        joined(library, rank=3, ranks=5).shrink(excluded, 5.0)
    assert "CommShrink" not in library.calls


def test_an_old_library_cannot_shrink_and_says_so():
    class Old(Recorder):
        def __getattr__(self, name):
            if name == "ncclCommShrink":
                raise AttributeError(name)
            return super().__getattr__(name)

    with pytest.raises(Unsupported, match=r"came with 2\.27"):
        joined(Old()).shrink({1}, 5.0)


def test_an_id_that_cannot_be_made_is_an_error():
    assert isinstance(direct.unique_id(Recorder()), UniqueId)
    with pytest.raises(TransferFailed):
        direct.unique_id(Recorder(ncclGetUniqueId=[2]))
