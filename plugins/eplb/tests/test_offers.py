"""The policies are offered as every backend is, and constructed by the host."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tensorway
from tensorway.errors import OptionsInvalid
from tensorway.testing import OfferSuite


class TestDeepseek(OfferSuite):
    kind = "placement_policy"
    name = "deepseek"


class TestIncremental(OfferSuite):
    kind = "placement_policy"
    name = "incremental"


def test_auto_takes_incremental_and_options_are_checked():
    assert "Incremental" == type(tensorway.create("placement_policy")).__name__
    assert "Incremental" == type(tensorway.create("placement_policy", needs=["budget"])).__name__
    policy = tensorway.create("placement_policy", "deepseek", {"num_groups": 4, "relabel": True})
    assert (4, True) == (policy.options.num_groups, policy.options.relabel)
    policy.close()
    policy.close()
    for name, options in (("deepseek", {"mode": "best"}), ("deepseek", {"num_groups": 0}), ("incremental", {"tol": 1})):
        with pytest.raises(OptionsInvalid):
            tensorway.create("placement_policy", name, options)


def test_choosing_a_policy_imports_no_numpy():
    code = "import sys, tensorway; print(tensorway.decide('placement_policy').winner.name, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "incremental False" == done.stdout.strip()
