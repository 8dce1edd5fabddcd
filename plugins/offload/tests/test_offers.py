"""The policies are offered as every backend is, and constructed by the host."""

from __future__ import annotations

import time

import pytest

import tensorway
from tensorway.errors import OptionsInvalid
from tensorway.offload import PolicyContext
from tensorway.testing import OfferSuite


class TestForesight(OfferSuite):
    kind = "eviction_policy"
    name = "foresight"


class TestLru(OfferSuite):
    kind = "eviction_policy"
    name = "lru"


class TestTinyLfu(OfferSuite):
    kind = "eviction_policy"
    name = "tinylfu"


def test_auto_takes_foresight_and_options_are_checked():
    context = PolicyContext(10, time.monotonic)
    assert "Foresight" == type(tensorway.create("eviction_policy", context=context)).__name__
    for name, options in (("lru", {"x": 1}), ("tinylfu", {"window": 1.0}), ("foresight", {"caution": 0})):
        with pytest.raises(OptionsInvalid):
            tensorway.create("eviction_policy", name, options, context)
