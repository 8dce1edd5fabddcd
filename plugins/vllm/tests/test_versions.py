"""The table of vLLM's releases; needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

import tensorway_vllm
from tensorway_vllm.versions import FEATURES, RELEASES, judged, release, span


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.29.3", "older"),
        ("0.30.0", "supported"),
        ("0.32.0", "supported"),
        ("0.32.1+cpu", "supported"),
        ("0.32.0rc1", "supported"),
        ("0.33.0", "newer"),
        ("1.0", "newer"),
        ("0.9.2", "older"),
        ("0.1.dev1+g0123", "unknown"),  # as a build without tags is called
        ("0.0.0", "unknown"),
        ("dev", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_version_is_judged_by_its_release(version, expected):
    assert judged(version) == expected


def test_the_table_is_in_order_and_each_release_was_tried_with_a_version_of_it():
    numbers = [tuple(map(int, name.split("."))) for name in RELEASES]
    assert numbers == sorted(set(numbers)) and span() == f"{next(iter(RELEASES))} to {[*RELEASES][-1]}"
    assert all(release(each.tried) == name for name, each in RELEASES.items())


def test_each_feature_is_known_of_some_release_and_has_its_adapter():
    assert set().union(*(each.features for each in RELEASES.values())) == set(FEATURES)
    package = Path(tensorway_vllm.__file__).parent
    for each in FEATURES.values():
        assert (package / each.adapter.replace(".", "/")).with_suffix(".py").is_file()
