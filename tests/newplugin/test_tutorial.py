"""The tutorial, followed by a script to the letter, from an empty folder to a report: in a fresh environment.

The core is a wheel of the folder TENSORWAY_TEST_WHEELHOUSE, or the checkout's; the page says `./core` for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]


def _core():
    """What stands for `./core`."""
    wheelhouse = os.environ.get("TENSORWAY_TEST_WHEELHOUSE")
    if not wheelhouse:
        return ROOT / "core"
    (wheel,) = Path(wheelhouse).glob("tensorway-*.whl")
    return wheel.resolve()


def _clean():
    return {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "PYTHON", "PYTEST_"))}


TUTORIAL = ROOT / "docs" / "authoring.md"


def test_the_tutorial_leads_from_an_empty_folder_to_a_conformance_report_in_ten_minutes(tmp_path):
    command = [sys.executable, TUTORIAL.with_name("following.py"), TUTORIAL, "--folder", tmp_path]
    # All that the page has before this heading is needed for that; what comes after it, the session `docs` runs.
    command += ["--until", "What the suite checks", "--instead", f"./core={_core()}"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False, env=_clean())
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 600
    report = json.loads((tmp_path / "tensorway-acme" / "conformance.json").read_text("utf-8"))
    assert ("transport", "acme", "tensorway-acme") == (report["kind"], report["name"], report["dist"])
    assert ["OfferSuite", "TransportSuite"] == report["suites"]
    assert (0, 0) == (report["totals"]["failed"], report["exit_code"])
    assert report["totals"]["passed"] == len(report["tests"]) > 30


def test_a_page_that_says_something_else_than_what_is_printed_is_not_followed_further(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo here\nthere\n$ touch further\n```\n", "utf-8")
    (tmp_path / "work").mkdir()
    command = [sys.executable, TUTORIAL.with_name("following.py"), page, "--folder", tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=_clean())
    assert done.returncode == 1
    assert "-there\n+here" in done.stdout
    assert not list((tmp_path / "work").rglob("further"))
