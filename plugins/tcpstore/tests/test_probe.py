"""The environments of an operator: torch missing, present, without its store, broken; seen through the host."""

from __future__ import annotations

import importlib.util
import os

import pytest

WARNING = "rendezvous tcpstore (tensorway-tcpstore 0.1.0) is not available: "


@pytest.fixture
def fake(tmp_path):
    def write(init, distributed=""):
        (tmp_path / "fake" / "torch" / "distributed").mkdir(parents=True)
        (tmp_path / "fake" / "torch" / "__init__.py").write_text(init)
        (tmp_path / "fake" / "torch" / "distributed" / "__init__.py").write_text(distributed)
        return tmp_path / "fake"

    return write


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="torch may be installed here")
def test_the_session_without_the_library_has_none(probed):
    assert importlib.util.find_spec("torch") is None
    assert "torch is not installed" == probed()["reason"]


def test_present_it_is_usable_and_no_port_is_opened(probed, torch_version):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"the TCPStore of torch {torch_version}" == answer["reason"]


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("torch"))

    assert ("unusable", "torch is not installed") == (answer["code"], answer["reason"])
    assert 'pip install "tensorway[tcpstore]"' == answer["remedy"]
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


def test_a_torch_without_distributed_is_told_from_no_torch(probed, fake):
    answer = probed(fake("__version__ = '9.9'", "is_available = lambda: False"))

    assert "torch 9.9 was built without torch.distributed" == answer["reason"]


def test_a_store_that_cannot_list_its_keys_will_not_do(probed, fake):
    answer = probed(fake("__version__ = '2.4'", "is_available = lambda: True\nclass TCPStore: pass"))

    assert "the TCPStore of torch 2.4 cannot list its keys" == answer["reason"]


def test_broken_at_import_it_is_a_record(probed, fake):
    answer = probed(fake("raise OSError('libcudart.so.12: cannot open shared object file')"))

    what = "torch is installed but does not load (OSError: libcudart.so.12: cannot open shared object file)"
    assert what == answer["reason"]
