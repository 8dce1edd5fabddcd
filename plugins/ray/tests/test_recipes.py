"""What docs/ray.md shows is what a real cluster does: its programs are read from the page and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "ray.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the pages are in the checkout, and this is not one")


def programs():
    """Caption -> program."""
    fences = re.findall(r"^```\{code-block\} python\n:caption: (\S+)\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    return dict(fences)


def run(cluster, folder, name):
    program = folder / name
    program.write_text(programs()[name], "utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TENSORWAY_"))}
    environment["RAY_ADDRESS"] = cluster.address
    done = subprocess.run(
        [sys.executable, program], env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith(("(", "\x1b"))]


def test_every_program_of_the_page_is_run_here():
    assert {"engines.py", "tensors.py"} == set(programs())


def test_engines_on_two_nodes_find_each_other_and_read(cluster, tmp_path):
    first, second = run(cluster, tmp_path, "engines.py")
    found = [re.fullmatch(r"engine (\d) on (127\.0\.0\.\d) read (\d) over \w+", line) for line in (first, second)]
    assert [("0", "1"), ("1", "0")] == [(match[1], match[3]) for match in found]
    assert found[0][2] != found[1][2]


def test_tensors_go_from_actor_to_actor(cluster, tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    assert [f"the sum is {sum(range(1 << 20))}"] == run(cluster, tmp_path, "tensors.py")
