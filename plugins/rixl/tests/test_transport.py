"""The kit's suite over real NIXL under AMD's names: of today, and of the generation that ROCm forked."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SUITE = """
from __future__ import annotations

from tensorway.testing import TransportSuite


class TestRixl(TransportSuite):
    name = "rixl"


def test_it_can_be_contained():
    import tensorway
    from tensorway.memory import shared
    from tensorway.transport import BlockTable

    options = {"contained": True}
    here, there = (tensorway.create("transport", "rixl", options) for _ in range(2))
    with here, there:
        mine, theirs = shared(8192), shared(8192)
        theirs[:] = bytes(range(256)) * 32
        there.register(theirs)
        local = BlockTable.over(here.register(mine).regions[0], 4096)
        peer = here.connect(there.describe())
        here.read(here.prepare(peer, local, BlockTable.over(peer.regions[0], 4096)), [0, 1], [0, 1]).wait()
        assert theirs == mine


def test_the_library_is_the_one_that_the_test_is_about():
    import os

    from tensorway_rixl.library import LIBRARY

    assert os.environ["EXPECTED"] == LIBRARY.result().module
"""


def passes_its_suite(folder, name, tmp_path):
    """Run the suite in a process of its own: two builds of NIXL in one are one too many."""
    (tmp_path / "test_rixl.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # or it takes the configuration of whatever lies above
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("UCX_", "NIXL_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:timeout", "test_rixl.py"]
    environment = variables | {"PYTHONPATH": str(folder), "EXPECTED": name}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    assert int(passed) > 30


@pytest.mark.timeout(300)
def test_the_suite_passes_over_todays_nixl_as_nixl_rocm(real_nixl, posing, tmp_path):
    passes_its_suite(posing(*real_nixl, "nixl_rocm"), "nixl_rocm", tmp_path)


@pytest.mark.long  # every agent of it takes seconds; one real transfer of it is in test_probe.py
@pytest.mark.timeout(300)
def test_the_suite_passes_over_the_nixl_that_rocm_forked_as_rixl(older_nixl, posing, tmp_path):
    passes_its_suite(posing(*older_nixl, "rixl"), "rixl", tmp_path)


def test_without_a_library_an_endpoint_says_where_it_comes_from(fresh_python):
    code = """
import json
from tensorway.errors import BackendUnavailable
from tensorway_nixl.options import NixlOptions
from tensorway_rixl.offers import construct
try:
    construct(NixlOptions(), None)
except BackendUnavailable as error:
    print(json.dumps(str(error)))
"""
    text = fresh_python(code)

    assert "A rixl endpoint was to be opened." in text
    assert "Install AMD's build of nixl_rocm" in text
