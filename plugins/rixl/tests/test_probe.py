"""The environments of an operator: missing, the impostor, real NIXL under AMD's names, broken, aborting."""

from __future__ import annotations

import importlib.util
from importlib.metadata import distributions

import pytest

from tensorway.platforms import report

WARNING = "transport rixl (tensorway-rixl 0.1.0) is not available: "
INSTALL = "install AMD's build of nixl_rocm (it is not on the public index)."
NO_DEVICE = "" if report("rocm").usable else "; no ROCm device, so host memory only"


def assert_one_line(answer):
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


def test_no_session_has_the_impostor_installed():
    assert [] == [dist.version for dist in distributions(name="rixl")]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("nixl_rocm", "rixl")), reason="AMD's build is installed here"
)
def test_missing_it_says_so_and_what_the_platform_lacks(probed):
    answer = probed()

    rocm = report("rocm")
    why_not = "" if rocm.usable else f"; and {rocm.reason}"
    reason = f"NIXL for ROCm cannot be loaded: nixl_rocm is not installed; rixl is not installed{why_not}"
    assert ("unusable", reason[:200]) == (answer["code"], answer["reason"])
    assert INSTALL.lower() == answer["remedy"].lower()
    assert_one_line(answer)


def test_the_impostor_is_named_and_not_imported(probed, impostor):
    version = next(iter(distributions(name="rixl", path=[str(impostor)]))).version

    answer = probed(impostor)

    what = "an unrelated client of a web service (it has rixl_client and no rixl._api)"
    assert f"NIXL for ROCm cannot be loaded: the installed rixl {version} is {what}" == answer["reason"]
    assert f"pip uninstall rixl, then {INSTALL}" == answer["remedy"]
    assert "unusable" == answer["code"]
    assert_one_line(answer)


@pytest.mark.parametrize("name", ["nixl_rocm", "rixl"])
def test_a_real_nixl_under_amds_name_is_proven_by_a_transfer(probed, real_nixl, posing, name):
    answer = probed(posing(*real_nixl, name))

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert name == answer["facts"]["package"]
    ucx = answer["facts"]["ucx"]
    assert f"NIXL for ROCm ({name}) read its own memory through UCX {ucx}{NO_DEVICE}" == answer["reason"]


def test_nixl_of_the_generation_that_rocm_forked_works_as_rixl(probed, older_nixl, posing):
    answer = probed(posing(*older_nixl, "rixl"))

    assert (None, "usable") == (answer["code"], answer["state"]), answer["reason"]
    assert {"package": "rixl", "version": None, "ucx": "1.21.0"} == answer["facts"]


@pytest.mark.parametrize("name", ["nixl_rocm", "rixl"])
def test_a_library_that_kills_its_process_kills_only_the_probes(probed, folder_with, name):
    dies = {f"{name}/__init__.py": "import os, signal; os.kill(os.getpid(), signal.SIGILL)", f"{name}/_api.py": ""}

    answer = probed(folder_with(dies))

    assert "probe-aborted" == answer["code"]
    assert "its library killed the probe's process with SIGILL (an instruction that this CPU lacks)" == answer["reason"]
    assert_one_line(answer)


def test_broken_it_says_what_the_loader_said(probed, folder_with):
    broken = {"nixl_rocm/__init__.py": "raise OSError('libamdhip64.so.6: cannot open shared object file')"}

    answer = probed(folder_with(broken))

    assert "unusable" == answer["code"]
    assert (
        "NIXL for ROCm cannot be loaded: nixl_rocm is installed but does not load (OSError: libamdhip64"
        in (answer["reason"])
    )
    assert_one_line(answer)
