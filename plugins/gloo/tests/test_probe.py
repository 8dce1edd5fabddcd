"""The environments of an operator: torch missing, present, without gloo, broken, aborting; seen through the host."""

from __future__ import annotations

import importlib.util
import os

import pytest

WARNING = "eplb_communicator gloo (tensorway-gloo 0.1.0) is not available: "


def assert_one_line(answer):
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


@pytest.fixture
def torch_version():
    """The version of the torch that is installed; a session that was promised one fails without it."""
    promised, found = os.environ.get("TENSORWAY_TEST_LIBRARY"), importlib.util.find_spec("torch")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and torch is not installed")
    if found is None or promised == "without":
        pytest.skip("needs torch: pip install torch -c constraints.txt")
    from tensorway.platforms import torch_build

    return torch_build().version


@pytest.fixture
def fake_torch(tmp_path):
    def write(init, distributed=""):
        (tmp_path / "fake" / "torch" / "distributed").mkdir(parents=True)
        (tmp_path / "fake" / "torch" / "__init__.py").write_text(init)
        (tmp_path / "fake" / "torch" / "distributed" / "__init__.py").write_text(distributed)
        return tmp_path / "fake"

    return write


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="torch may be installed here")
def test_the_session_without_the_library_has_none():
    assert importlib.util.find_spec("torch") is None


def test_present_it_is_proven_by_a_reduction(probed, torch_version):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"gloo of torch {torch_version} reduced a tensor in a group of one rank" == answer["reason"]
    assert {"torch": torch_version} == answer["facts"]


def test_the_probe_leaves_the_default_group_of_its_process_alone(torch_version):
    import subprocess
    import sys

    code = "from tensorway_gloo.probe import probe; import torch.distributed as d; probe(); print(d.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)

    assert "False" == done.stdout.strip()


def test_an_interface_that_is_not_there_is_a_record(probed, torch_version):
    answer = probed(GLOO_SOCKET_IFNAME="nowhere0")

    assert "unusable" == answer["code"]
    assert answer["reason"].startswith(f"torch {torch_version} has gloo, and gloo cannot form a group here (RuntimeErr")
    assert answer["reason"].endswith("Unable to find address for: nowhere0)")
    assert "Set GLOO_SOCKET_IFNAME to an interface that is up." == answer["remedy"]
    assert_one_line(answer)


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("torch"))

    assert ("unusable", "torch is not installed") == (answer["code"], answer["reason"])
    assert 'pip install "tensorway[gloo]"' == answer["remedy"]
    assert_one_line(answer)


def test_a_torch_without_gloo_is_told_from_no_torch(probed, fake_torch):
    lacks = "is_available = lambda: True\nis_gloo_available = lambda: False\n"

    answer = probed(fake_torch("__version__ = '9.9'", lacks))

    assert ("unusable", "torch 9.9 was built without gloo") == (answer["code"], answer["reason"])
    assert_one_line(answer)


def test_broken_at_import_it_is_a_record(probed, fake_torch):
    answer = probed(fake_torch("raise OSError('libcudart.so.12: cannot open shared object file')"))

    assert "unusable" == answer["code"]
    assert (
        "torch is installed but does not load (OSError: libcudart.so.12: cannot open shared object file)"
        == (answer["reason"])
    )
    assert_one_line(answer)


def test_a_sum_that_is_wrong_is_not_believed(probed, fake_torch):
    wrong = """
is_available = is_gloo_available = lambda: True
HashStore = object
class ProcessGroupGloo:
    def __init__(self, *_): pass
    def allreduce(self, tensors): return self
    def wait(self, timeout): pass
"""
    answer = probed(fake_torch("__version__ = '9.9'\ntensor = lambda values: [0.0, 0.0]", wrong))

    assert ("unusable", "torch 9.9: gloo summed [1, 2] to [0.0, 0.0]") == (answer["code"], answer["reason"])


def test_a_library_that_kills_its_process_kills_only_the_probes(probed, fake_torch):
    answer = probed(fake_torch("import os, signal; os.kill(os.getpid(), signal.SIGILL)"))

    assert "probe-aborted" == answer["code"]
    assert "its library killed the probe's process with SIGILL (an instruction that this CPU lacks)" == answer["reason"]
    assert_one_line(answer)
