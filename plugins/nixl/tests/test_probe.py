"""The environments of an operator: NIXL missing, present, broken, aborting; each seen through the host."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

WARNING = "transport nixl (tensorway-nixl 0.1.0) is not available: "


def assert_one_line(answer):
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="NIXL may be installed here")
def test_the_session_without_the_library_has_none():
    assert [] == [name for name in ("nixl", "nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name)]


def test_present_it_is_proven_by_a_transfer(probed, real_nixl):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert real_nixl == answer["facts"]["package"]
    version, ucx = answer["facts"]["version"], answer["facts"]["ucx"]
    assert f"NIXL {version} ({real_nixl}) read its own memory through UCX {ucx}" == answer["reason"]
    assert importlib.metadata.version(real_nixl) == version
    assert "1" == ucx.partition(".")[0]


def test_present_but_refused_by_ucx_it_says_what_ucx_could_not_do(probed, real_nixl):
    answer = probed(UCX_TLS="cma,self")

    assert "unusable" == answer["code"]
    assert "loads but cannot create its UCX backend (nixlBackendError: NIXL_ERR_BACKEND)" in answer["reason"]
    assert "UCX_TLS" in answer["remedy"]
    assert_one_line(answer)


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("nixl_cu12", "nixl_cu13"))

    assert "unusable" == answer["code"]
    assert "NIXL cannot be loaded: nixl_cu13 is not installed; nixl_cu12 is not installed" == answer["reason"]
    assert 'pip install "tensorway[nixl]"' == answer["remedy"]
    assert_one_line(answer)


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_broken_on_disk_the_real_library_is_a_record(probed, real_nixl, hide, tmp_path, damage):
    folder = tmp_path / "copy"
    origin = importlib.util.find_spec(real_nixl).submodule_search_locations[0]
    libraries = f".{real_nixl}.mesonpy.libs"
    shutil.copytree(origin, folder / real_nixl)
    shutil.copytree(Path(origin).parent / libraries, folder / libraries, ignore=_plugins)
    victim = folder / libraries / "libnixl.so"
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(b"\x7fELF")
    others = {"nixl_cu12", "nixl_cu13"} - {real_nixl}

    answer = probed(folder, hide(*others))

    assert "unusable" == answer["code"]
    # The reason is cut at 200 characters, and the folder of this test has a long name.
    assert f"NIXL cannot be loaded: {real_nixl} is installed but does not load (ImportError: " in answer["reason"]
    assert "libnixl" in answer["reason"]
    assert f"pip install --force-reinstall --no-deps {real_nixl.replace('_', '-')}" == answer["remedy"]
    assert_one_line(answer)


def _plugins(_folder, names):
    return {"plugins"} & set(names)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("raise OSError('libucp.so.0: cannot open shared object file')", "OSError: libucp.so.0: cannot open"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise RuntimeError('Permission denied [/home/me/.nixl.cfg]')", "RuntimeError: Permission denied"),
    ],
)
def test_broken_at_import_it_is_a_record(probed, fake_nixl, init, says):
    answer = probed(fake_nixl(init))

    assert "unusable" == answer["code"]
    assert f"nixl_cu13 is installed but does not load ({says}" in answer["reason"]
    assert_one_line(answer)


@pytest.mark.parametrize(
    ("init", "signal"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
    ],
)
def test_a_library_that_kills_its_process_kills_only_the_probes(probed, fake_nixl, init, signal):
    answer = probed(fake_nixl(init))

    assert "probe-aborted" == answer["code"]
    assert f"its library killed the probe's process with {signal} " in answer["reason"]
    assert "loadable" == answer["state"]
    assert_one_line(answer)
