"""The environments of an operator: the client missing, present, old, broken; seen through the host."""

from __future__ import annotations

import importlib.util
import os

import pytest

WARNING = "rendezvous redis (tensorway-redis 0.1.0) is not available: "


@pytest.fixture
def fake(tmp_path):
    def write(text):
        (tmp_path / "fake" / "redis").mkdir(parents=True)
        (tmp_path / "fake" / "redis" / "__init__.py").write_text(text)
        return tmp_path / "fake"

    return write


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="redis may be installed here")
def test_the_session_without_the_library_has_none(probed):
    assert importlib.util.find_spec("redis") is None
    assert "redis is not installed" == probed()["reason"]


def test_present_it_is_usable_and_no_server_is_asked(probed, client):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"the client redis {client.__version__}" == answer["reason"]


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("redis"))

    assert ("unusable", "redis is not installed") == (answer["code"], answer["reason"])
    assert 'pip install "tensorway[redis]"' == answer["remedy"]
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


def test_constructing_without_the_client_says_what_to_install(hide):
    from tensorway.testing import elsewhere

    code = """
import json
from tensorway.errors import BackendUnavailable
from tensorway_redis.offers import construct
from tensorway_redis.options import RedisOptions
try:
    construct(RedisOptions(secret="a secret of the tests"), None)
except BackendUnavailable as error:
    print(json.dumps(error.to_do))
"""
    assert 'pip install "tensorway[redis]"' == elsewhere.fresh_python(code, path=[hide("redis")])


def test_an_old_one_is_told_from_none(probed, fake):
    answer = probed(fake("__version__ = '4.6.0'"))

    assert ("unusable", "the client redis 4.6.0 is older than 5") == (answer["code"], answer["reason"])


def test_broken_at_import_it_is_a_record(probed, fake):
    answer = probed(fake("raise OSError('no such thing')"))

    assert "redis is installed but does not load (OSError: no such thing)" == answer["reason"]
