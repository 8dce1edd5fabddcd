"""The calls of NCCL: their shapes with the library itself, and their order on a recorder."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tensorway.errors import Closed, PeerLost, TransferFailed
from tensorway_nccl import direct
from tensorway_nccl.direct import Communicator, Config, UniqueId
from tensorway_nccl.lanes import Piece

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
            if name == "ncclCommInitRankConfig":
                arguments[0]._obj.value = self.made
            result = (self.says.get(name) or [SUCCESS]).pop(0)
            if name == "ncclCommGetAsyncError":
                arguments[1]._obj.value = result
                return SUCCESS
            return result

        return call

    made = HANDLE


def joined(library, rank=0):
    return Communicator.join(library, bytes(UniqueId()), rank, 2)


def pieces(count):
    return [Piece(4096 + index, 1) for index in range(count)]


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


def test_every_group_that_is_started_is_ended():
    library = Recorder(ncclGroupEnd=[IN_PROGRESS], ncclCommGetAsyncError=[SUCCESS, IN_PROGRESS, SUCCESS])
    communicator = joined(library)
    assert communicator.settled()
    communicator.enqueue(1, pieces(2), pieces(3), 7)

    assert not communicator.settled()
    assert communicator.settled()
    asked = ["CommGetAsyncError"]
    group = ["GroupStart", *["Send"] * 2, *["Recv"] * 3, "GroupEnd"]
    assert ["CommInitRankConfig", *asked, *group, *asked * 2] == library.calls


def test_a_send_that_fails_ends_its_group_before_the_communicator_is_aborted():
    library = Recorder(ncclSend=[SUCCESS, 5])
    communicator = joined(library)

    with pytest.raises(TransferFailed) as failed:
        communicator.enqueue(1, pieces(3), [], 7)

    assert "NCCL says: what it is (5): why it is." == failed.value.true
    calls = [call for call in library.calls[1:] if not call.startswith("Get")]
    assert ["GroupStart", "Send", "Send", "GroupEnd", "CommAbort"] == calls
    with pytest.raises(Closed):
        communicator.enqueue(1, [], pieces(1), 7)
    assert "GroupStart" not in library.calls[library.calls.index("CommAbort") :]


def test_a_group_whose_end_fails_is_an_error_of_the_communicator():
    library = Recorder(ncclGroupEnd=[3])
    communicator = joined(library)
    communicator.enqueue(1, pieces(1), [], 7)

    with pytest.raises(TransferFailed):
        communicator.settled()
    assert "CommAbort" == library.calls[-1]


def test_a_group_that_does_not_start_is_not_ended():
    library = Recorder(ncclGroupStart=[2])
    communicator = joined(library)

    with pytest.raises(TransferFailed):
        communicator.enqueue(1, pieces(1), [], 7)
    assert not {"Send", "GroupEnd"} & {*library.calls}
    assert "CommAbort" == library.calls[-1]


def test_a_lost_peer_is_told_before_the_communicator_is_aborted():
    library = Recorder(ncclCommGetAsyncError=[SUCCESS, REMOTE])
    communicator = joined(library)
    assert communicator.settled()

    with pytest.raises(PeerLost):
        communicator.settled()

    assert ["GetErrorString", "GetLastError", "CommAbort"] == library.calls[-3:]
    communicator.abort()
    assert 1 == library.calls.count("CommAbort")


def test_a_library_that_makes_no_communicator_says_why():
    library = Recorder(ncclCommInitRankConfig=[1])
    library.made = None

    with pytest.raises(TransferFailed, match="what it is"):
        joined(library)
    assert "CommAbort" not in library.calls


def test_an_id_that_cannot_be_made_is_an_error():
    assert 128 == len(direct.unique_id(Recorder()))
    with pytest.raises(TransferFailed):
        direct.unique_id(Recorder(ncclGetUniqueId=[2]))


def test_the_real_library_says_why_it_makes_no_communicator_without_a_device(real, monkeypatch):
    from tensorway.platforms import report

    if report("cuda").usable:
        pytest.skip("a device is here")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    library = direct.load(str(real))
    identity = direct.unique_id(library)

    assert 128 == len(identity) and any(identity)

    def join_for_a_while():
        communicator = Communicator.join(library, identity, 0, 2)
        until = time.monotonic() + 30
        while not communicator.settled() and time.monotonic() < until:
            time.sleep(0.01)

    with pytest.raises(TransferFailed, match="NCCL says: "):
        join_for_a_while()
