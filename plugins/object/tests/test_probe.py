"""The environments of an operator: the library missing, present, broken; seen through the host."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tensorway.testing import elsewhere


@pytest.fixture
def fake(tmp_path):
    def write(text):
        (tmp_path / "fake" / "obstore").mkdir(parents=True)
        (tmp_path / "fake" / "obstore" / "__init__.py").write_text(text)
        return tmp_path / "fake"

    return write


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="obstore may be installed here")
def test_the_session_without_the_library_has_none(probed):
    assert importlib.util.find_spec("obstore") is None
    assert "obstore is not installed" == probed()["reason"]


def test_present_it_is_usable_and_no_store_is_asked(probed, library):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"obstore {library.__version__}" == answer["reason"]


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("obstore"))

    assert ("unusable", "obstore is not installed") == (answer["code"], answer["reason"])
    assert 'pip install "tensorway[object]"' == answer["remedy"]


def test_constructing_without_the_library_says_what_to_install(hide):
    code = """
import json
from tensorway.errors import BackendUnavailable
from tensorway.offload import TierContext
from tensorway_object.offers import construct
from tensorway_object.options import ObjectOptions
try:
    construct(ObjectOptions(url="s3://bucket"), TierContext("e0", bytes(16), (4096,)))
except BackendUnavailable as error:
    print(json.dumps(error.to_do))
"""
    assert 'pip install "tensorway[object]"' == elsewhere.fresh_python(code, path=[hide("obstore")])


def test_broken_at_import_it_is_a_record(probed, fake):
    answer = probed(fake("raise OSError('no such thing')"))

    assert "obstore is installed but does not load (OSError: no such thing)" == answer["reason"]


def test_one_without_what_is_used_is_told_from_none(probed, fake):
    assert "does not load" in probed(fake("__version__ = '0.1.0'"))["reason"]
