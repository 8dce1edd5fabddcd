from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tensorway_nccl import library
from tensorway_nccl.library import SYMBOLS, Nccl, NotFound, find


@pytest.fixture
def build(tmp_path):
    """Compile a library with NCCL's interface: real code for the loader, without 350 MB of wheel."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler: apt-get install gcc")

    def compile_to(file, code, without=(), status=0):
        functions = "\n".join(f"int {name}(void) {{ return 0; }}" for name in SYMBOLS if name not in without)
        source = f"int ncclGetVersion(int *v) {{ *v = {code}; return {status}; }}\n{functions}\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(file)]
        subprocess.run(command, input=source, text=True, check=True, timeout=60)

    return compile_to


@pytest.fixture
def no_system_library(monkeypatch):
    """As on a machine on which the dynamic loader finds no NCCL by its bare name."""
    monkeypatch.setattr(library, "FILES", {"cuda": ("libnccl_not_of_this_machine.so.2",), "rocm": ("librccl_none.so",)})


def place(site, folder="nvidia/nccl/lib", kind="cuda"):
    return site / folder / library.FILES[kind][0]


@pytest.mark.parametrize(
    ("code", "version"),
    [(2804, (2, 8, 4)), (20900, (2, 9, 0)), (21803, (2, 18, 3)), (22703, (2, 27, 3)), (23203, (2, 32, 3))],
)
def test_the_version_is_read_as_nccl_counts_it(tmp_path, build, no_system_library, code, version):
    build(place(tmp_path), code)

    found = find("cuda", [str(tmp_path)])

    assert Nccl(str(place(tmp_path)), version, ()) == found
    assert ".".join(map(str, version)) == found.dotted


def test_symbols_that_are_not_there_are_named(tmp_path, build, no_system_library):
    build(place(tmp_path), 22703, without=("ncclCommInitRankConfig", "ncclSend"))

    assert ("ncclCommInitRankConfig", "ncclSend") == find("cuda", [str(tmp_path)]).missing


def test_the_wheel_comes_before_what_torch_carries_and_the_path_decides_first(tmp_path, build, no_system_library):
    one, two = tmp_path / "one", tmp_path / "two"
    build(place(one, "torch/lib"), 21800)
    build(place(two), 22700)

    assert (2, 18, 0) == find("cuda", [str(one), str(two)]).version
    build(place(one), 22600)
    assert (2, 26, 0) == find("cuda", [str(one), str(two)]).version


def test_for_amd_devices_rccl_is_looked_for(tmp_path, build, no_system_library):
    build(place(tmp_path, "torch/lib", "rocm"), 22105)

    assert (2, 21, 5) == find("rocm", [str(tmp_path)]).version
    assert NotFound() == find("cuda", [str(tmp_path)])


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library"])
def test_a_file_that_is_no_library_is_told_and_the_next_is_used(tmp_path, build, no_system_library, content):
    one, two = tmp_path / "one", tmp_path / "two"
    place(one).parent.mkdir(parents=True)
    place(one).write_bytes(content)

    assert str(place(one))[:60] in find("cuda", [str(one)]).broken
    build(place(two), 22700)
    assert (2, 27, 0) == find("cuda", [str(one), str(two)]).version


def test_a_library_that_cannot_tell_its_version_does_not_count(tmp_path, build, no_system_library):
    build(place(tmp_path), 22700, status=3)

    assert "ncclGetVersion returned 3" in find("cuda", [str(tmp_path)]).broken


def test_the_dynamic_loader_is_asked_last(tmp_path, build):
    build(tmp_path / "libnccl.so.2", 29900)
    code = "from tensorway_nccl.library import find; print(find('cuda', []).dotted)"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert "2.99.0" == done.stdout.strip()


def test_an_entry_of_the_path_that_is_no_folder_is_passed_over(tmp_path, no_system_library):
    (tmp_path / "nvidia").touch()

    assert NotFound() == find("cuda", [str(tmp_path), "/proc/1/root", ""])


def test_nothing_anywhere_is_not_found(no_system_library):
    assert NotFound() == find("cuda", [])


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="NCCL may be installed here")
def test_the_session_without_the_library_has_none():
    assert NotFound() == find("cuda")


def test_the_real_library_loads_without_a_device_and_has_what_we_call():
    promised = os.environ.get("TENSORWAY_TEST_LIBRARY")
    installed = [Path(entry, "nvidia/nccl/lib/libnccl.so.2") for entry in sys.path]
    installed = [path for path in installed if path.is_file()]
    if not installed and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and no wheel of NCCL is installed: pip install nvidia-nccl-cu12")
    if not installed or promised == "without":
        pytest.skip("needs NCCL itself: pip install --no-deps nvidia-nccl-cu12")

    found = find("cuda")

    assert str(installed[0]) == found.path
    assert () == found.missing
    assert library.OLDEST <= found.version[:2]
    dists = [dist for name in ("nvidia-nccl-cu12", "nvidia-nccl-cu13") for dist in distributions(name=name)]
    assert found.dotted in {dist.version for dist in dists}
