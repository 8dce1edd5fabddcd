"""The environments of an operator: Ray missing, present, old, broken; seen through the host."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tensorway.testing import elsewhere

WARNING = "rendezvous ray (tensorway-ray 0.1.0) is not available: "
REMEDY = 'pip install "tensorway[ray]"'


@pytest.fixture
def fake(tmp_path):
    def write(text):
        (tmp_path / "fake" / "ray").mkdir(parents=True)
        (tmp_path / "fake" / "ray" / "__init__.py").write_text(text)
        return tmp_path / "fake"

    return write


@pytest.mark.skipif(os.environ.get("TENSORWAY_TEST_LIBRARY") != "without", reason="ray may be installed here")
def test_the_session_without_the_library_has_none(probed):
    assert importlib.util.find_spec("ray") is None
    assert "ray is not installed" == probed()["reason"]


def test_present_it_is_usable_and_no_cluster_is_entered(probed, ray):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert f"ray {ray.__version__}" == answer["reason"]


def test_missing_it_says_what_to_install(probed, hide):
    answer = probed(hide("ray"))

    assert ("unusable", "ray is not installed", REMEDY) == (answer["code"], answer["reason"], answer["remedy"])
    assert [["WARNING", WARNING + answer["reason"]]] == answer["lines"]


CONSTRUCT = """
import json
from tensorway.errors import BackendUnavailable
from tensorway_ray.offers import construct
from tensorway_ray.options import RayOptions
try:
    construct(RayOptions(), None)
except BackendUnavailable as error:
    print(json.dumps([error.true, error.to_do]))
"""


def test_constructing_without_ray_says_what_to_install(hide):
    assert REMEDY == elsewhere.fresh_python(CONSTRUCT, path=[hide("ray")])[1]


def test_constructing_outside_a_cluster_says_how_to_enter_one(ray):
    true, to_do = elsewhere.fresh_python(CONSTRUCT, RAY_ADDRESS=None)

    assert "This process is in no Ray cluster." == true
    assert "ray.init" in to_do


def test_an_old_one_is_told_from_none(probed, fake):
    answer = probed(fake("__version__ = '2.55.1'"))

    assert ("unusable", "ray 2.55.1 is older than 2.56") == (answer["code"], answer["reason"])


CREATE = """
import json, tensorway
from tensorway.errors import BackendUnavailable
try:
    tensorway.create("rendezvous", "ray")
except BackendUnavailable as error:
    print(json.dumps([error.asked, error.true, error.to_do]))
"""


def test_to_ask_for_an_old_one_is_refused_in_three_lines(fake):
    asked, true, to_do = elsewhere.fresh_python(CREATE, path=[fake("__version__ = '2.55.1'")])

    assert "rendezvous" in asked
    assert "ray 2.55.1 is older than 2.56" in true
    assert REMEDY in to_do


def test_broken_at_import_it_is_a_record(probed, fake):
    answer = probed(fake("raise OSError('no such thing')"))

    assert "ray is installed but does not load (OSError: no such thing)" == answer["reason"]
