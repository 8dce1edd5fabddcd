"""The contracts of offloading are below everything that keeps them: each module can be imported first, and alone."""

from __future__ import annotations

import pkgutil

import pytest

import tensorway.offload
from tensorway.testing.elsewhere import fresh_python

MODULES = [
    "tensorway.offload",
    *(f"tensorway.offload.{each.name}" for each in pkgutil.iter_modules(tensorway.offload.__path__)),
]

_IMPORT = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported_alone_and_brings_no_plugin(module):
    loaded = fresh_python(_IMPORT, module)
    assert module in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not {name for name in tops if name.startswith("tensorway_")} | tops & {
        "numpy",
        "torch",
        "hypothesis",
        "pytest",
    }
    assert "tensorway.testing" not in loaded


def test_all_modules_are_found():
    assert {"base", "tier", "policy", "vocabulary"} <= {name.rpartition(".")[2] for name in MODULES}


@pytest.mark.parametrize("module", ["offload_managers", "offload_policies", "offload_tiers", "offload_workers"])
def test_a_suite_needs_hypothesis_only_where_it_plays_the_model(module):
    assert "hypothesis" not in fresh_python(_IMPORT, f"tensorway.testing.{module}")
