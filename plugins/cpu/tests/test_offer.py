from __future__ import annotations

import pkgutil
import subprocess
import sys
import uuid

import pytest

import tensorway
import tensorway_cpu
from tensorway.hookspecs import API
from tensorway.offload import OffloadContext
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_cpu.manager import CPUManager
from tensorway_cpu.offers import offloading
from tensorway_cpu.testing.sides import engine_pages
from tensorway_cpu.worker import CPUWorker


class TestOffer(OfferSuite):
    kind = "offloading"
    name = "cpu"
    native_modules = ("torch",)


def test_it_serves_engines_with_and_without_accelerators():
    offer = offloading(HookContext(api=API, core_version="0"))

    assert "host" == offer.probe_in
    assert {"cpu", "cuda", "rocm", "xpu"} == offer.devices


@pytest.mark.parametrize(("role", "wanted"), [("manager", CPUManager), ("worker", CPUWorker)])
def test_the_contexts_role_says_which_side_it_is(role, wanted):
    context = OffloadContext(f"offer-{role}-{uuid.uuid4().hex}", role, engine_pages(1).geometries)

    made = tensorway.create("offloading", "auto", {"capacity_blocks": 4}, context)

    assert isinstance(made, wanted)
    made.close()


#: `bench` is imported by tensorway-tools alone, and takes its words from there.
MODULES = sorted({module.name for module in pkgutil.iter_modules(tensorway_cpu.__path__)} - {"bench"})


@pytest.mark.parametrize("name", MODULES)
def test_each_module_can_be_the_first_that_is_imported(name):
    """No import in a circle, and none of torch."""
    code = f"import sys, tensorway_cpu.{name}; sys.exit('torch' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", code], timeout=60).returncode
