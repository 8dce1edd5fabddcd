"""The environments of an operator: Mooncake missing, present, broken, aborting; each seen through the host."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WARNING = "transport mooncake (tensorway-mooncake 0.1.0) is not available: "

#: A `ctypes` that does not find some libraries, as on a machine that has only the others.
WITHOUT = """
import ctypes
class Without(ctypes.CDLL):
    def __init__(self, name, *arguments, **more):
        if name in {lacking}:
            raise OSError(name + ": cannot open shared object file: No such file or directory")
        if name not in {there}:
            super().__init__(name, *arguments, **more)
ctypes.CDLL = Without
raise ImportError({lacking}[0] + ": cannot open shared object file: No such file or directory")
"""
SYSTEM = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
#: The shape of Mooncake, with engines whose reads end as `{status}` and bring nothing.
ENGINE = """
class TransferNotify: pass
class TransferOpcode: Read = Write = None
class TransferEngine:
    def initialize(self, *words): return {code}
    def get_rpc_port(self): return 15000
    def register_memory(self, address, nbytes): return 0
    def batch_transfer_async_read(self, *lists): return 7
    def transfer_check_status(self, handle): return {status}
"""


def assert_one_line(answer):
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="Mooncake may be installed here")
def test_the_session_without_the_library_has_none(probed):
    assert importlib.util.find_spec("mooncake") is None
    assert "Mooncake cannot be loaded: mooncake is not installed" == probed()["reason"]


def test_present_it_is_proven_by_a_transfer(probed, real_mooncake):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"Mooncake {real_mooncake} read the memory of a second engine over TCP" == answer["reason"]
    assert {"version": real_mooncake, "lane": "tcp"} == answer["facts"]


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("mooncake"))

    assert "unusable" == answer["code"]
    assert "Mooncake cannot be loaded: mooncake is not installed" == answer["reason"]
    assert 'pip install "tensorway[mooncake]"' == answer["remedy"]
    assert_one_line(answer)


@pytest.mark.parametrize("lacking", [["libibverbs.so.1"], ["libnuma.so.1", "libcurl.so.4"], list(SYSTEM)], ids=len)
def test_without_what_it_needs_of_the_system_it_says_which_packages_bring_it(probed, fake_mooncake, lacking):
    there = [name for name in SYSTEM if name not in lacking]
    answer = probed(fake_mooncake(WITHOUT.format(lacking=lacking, there=there)))

    assert "unusable" == answer["code"]
    assert f"what it needs of the system is not: {', '.join(lacking)}" in answer["reason"]
    assert f"apt-get install {' '.join(SYSTEM[name] for name in lacking)} (Debian" in answer["remedy"]
    assert_one_line(answer)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf: apt-get install binutils")
def test_what_it_needs_of_the_system_is_what_it_links_against_and_no_wheel_brings(real_mooncake):
    import mooncake

    folder = Path(mooncake.__path__[0])
    told = subprocess.run(["readelf", "-d", folder / "engine.so"], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", told))
    brought = {path.name for path in folder.parent.glob("*mooncake*/*.so*")}
    everywhere = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
    of_libc = {name for name in needed if re.match(r"lib(c|m|dl|pthread|rt)\.so", name)}
    assert set(SYSTEM) == needed - brought - everywhere - of_libc


@pytest.mark.parametrize("variable", ["MC_LOG_DIR", "MC_USE_TENT", "MC_LEGACY_RPC_PORT_BINDING"])
def test_variables_with_which_it_is_another_mooncake_are_refused_before_it_loads(probed, fake_mooncake, variable):
    answer = probed(fake_mooncake("import os; os.abort()"), **{variable: "1"})

    assert "unusable" == answer["code"]
    assert f"Mooncake cannot be loaded: {variable} is set, " in answer["reason"]
    assert f"Unset {variable}." == answer["remedy"]
    assert_one_line(answer)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("raise OSError('libcuda.so.1: cannot open shared object file')", "OSError: libcuda.so.1: cannot open"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("TransferEngine = TransferNotify = None", "TransferOpcode"),
    ],
)
def test_broken_at_import_it_is_a_record(probed, fake_mooncake, engine, says):
    answer = probed(fake_mooncake(engine))

    assert "unusable" == answer["code"]
    assert "mooncake is installed but does not load (" in answer["reason"]
    assert says in answer["reason"]
    assert_one_line(answer)


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        (-1, 1, "Mooncake cannot create an engine (code -1)."),
        (0, -1, "the read failed, or did not end within 5 s"),
        (0, 1, "the bytes that arrived differ from those that were sent"),
    ],
)
def test_loading_but_moving_nothing_it_is_unusable(probed, fake_mooncake, code, status, says):
    answer = probed(fake_mooncake(ENGINE.format(code=code, status=status)))

    assert "unusable" == answer["code"]
    assert f"loads but cannot read over TCP ({says})" in answer["reason"]
    assert "MC_LOG_LEVEL=INFO" in answer["remedy"]
    assert_one_line(answer)


@pytest.mark.parametrize(
    ("engine", "signal"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
    ],
)
def test_a_library_that_kills_its_process_kills_only_the_probes(probed, fake_mooncake, engine, signal):
    answer = probed(fake_mooncake(engine))

    assert "probe-aborted" == answer["code"]
    assert f"its library killed the probe's process with {signal} " in answer["reason"]
    assert_one_line(answer)
