"""What an operator is told: no device, no library, a library that does not do, and all well."""

from __future__ import annotations

import os

import pytest

from tensorway.platforms import PlatformReport, report
from tensorway_nccl import probe as module
from tensorway_nccl.library import Nccl, NotFound
from tensorway_nccl.probe import probe

WARNING = "eplb_communicator nccl (tensorway-nccl 0.1.0) is not available: "
NO_DEVICE = not (report("cuda").usable or report("rocm").usable)
INSTALL = 'pip install "tensorway[nccl]"'
GOOD = Nccl("/lib/libnccl.so.2", (2, 27, 3), ())


@pytest.fixture
def machine(monkeypatch):
    """A machine with the given devices and library; what was asked of `find` is returned."""

    def make(usable, found):
        asked = []
        monkeypatch.setattr(
            module, "report", lambda kind: PlatformReport(kind, kind in usable, (), (), f"no {kind}", f"Get {kind}.")
        )
        monkeypatch.setattr(module, "find", lambda kind: asked.append(kind) or found)
        return asked

    return make


@pytest.mark.skipif(not NO_DEVICE, reason="a device is here")
def test_without_a_device_it_says_what_the_platform_says(probed):
    answer = probed()

    cuda, rocm = report("cuda"), report("rocm")
    traces = [platform.reason for platform in (cuda, rocm) if platform.evidence]
    expected = traces[0] if traces else f"{cuda.reason}; {rocm.reason}"
    assert ("unusable", expected) == (answer["code"], answer["reason"])
    assert report("cuda").remedy[:200] == answer["remedy"]
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]
    if os.environ.get("TENSORWAY_TEST_LIBRARY") == "with":
        assert answer["facts"]["nccl"].startswith("2.")
    if os.environ.get("TENSORWAY_TEST_LIBRARY") == "without":
        assert {} == answer["facts"]


@pytest.mark.skipif(NO_DEVICE, reason="needs a machine with a CUDA or ROCm device")
def test_with_a_device_and_the_library_it_passes(probed):
    answer = probed()

    assert (None, "usable") == (answer["code"], answer["state"]), answer


def test_a_library_without_a_device_is_still_in_the_facts(machine):
    machine(usable=(), found=GOOD)
    result = probe()

    assert (False, "no cuda; no rocm", "Get cuda.") == (result.usable, result.reason, result.remedy)
    assert {"nccl": "2.27.3", "library": "/lib/libnccl.so.2"} == dict(result.facts)


@pytest.mark.parametrize(
    ("usable", "kind"), [(("cuda",), "cuda"), (("rocm",), "rocm"), (("cuda", "rocm"), "cuda"), ((), "cuda")]
)
def test_the_library_is_looked_for_that_drives_the_device(machine, usable, kind):
    asked = machine(usable, GOOD)
    result = probe()

    assert [kind] == asked
    assert bool(usable) == result.usable


@pytest.mark.parametrize(
    ("found", "reason", "remedy"),
    [
        (NotFound(), "NCCL is not installed", INSTALL),
        (NotFound("x.so: too short"), "NCCL is here but does not load (x.so: too short)", "Reinstall the package"),
        (Nccl("/x", (2, 17, 1), ()), "NCCL 2.17.1 is older than 2.18", f"Upgrade it: {INSTALL}"),
        (Nccl("/x", (2, 30, 0), ("ncclSend", "ncclRecv")), "NCCL 2.30.0 lacks ncclSend, ncclRecv", INSTALL),
    ],
)
def test_a_library_that_does_not_do_is_refused_with_the_reason(machine, found, reason, remedy):
    machine(("cuda",), found)
    result = probe()

    assert (False, reason) == (result.usable, result.reason)
    assert result.remedy.startswith(remedy)


def test_a_device_and_a_good_library_pass(machine):
    machine(("cuda",), GOOD)
    result = probe()

    assert (True, "NCCL 2.27.3 in /lib/libnccl.so.2") == (result.usable, result.reason)


def test_a_library_that_kills_its_process_kills_only_the_probes(probed, tmp_path):
    import shutil
    import subprocess

    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler: apt-get install gcc")
    file = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    file.parent.mkdir(parents=True)
    source = "#include <signal.h>\n__attribute__((constructor)) static void start(void) { raise(SIGILL); }\n"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(file)]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)

    answer = probed(tmp_path)

    assert "probe-aborted" == answer["code"]
    assert "its library killed the probe's process with SIGILL (an instruction that this CPU lacks)" == answer["reason"]
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]
