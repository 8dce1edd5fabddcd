"""A core and plugins of unequal versions: what pip refuses, what the host refuses, and that everything else starts.

There is no other release yet, so wheels of this one are made into wheels of others. `nox -s skew` does the same with
real ones, of the newest tag or of the commit that is named there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "TENSORWAY_TEST_WHEELHOUSE" not in os.environ:
    pytest.skip("needs built wheels: run `nox -s wheels`", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)

HOUSE = Path(os.environ["TENSORWAY_TEST_WHEELHOUSE"])
_spec = importlib.util.spec_from_file_location("skew", Path(__file__).with_name("skew.py"))
skew = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(skew)

LRU = ("eviction_policy", "lru")


class Mixed:
    """An environment whose tensorway dists can be exchanged for others, whatever their metadata says."""

    def __init__(self, folder):
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        (core,), (plugin,) = HOUSE.glob("tensorway-*.whl"), HOUSE.glob("tensorway_offload-*.whl")
        self.wheels = {"core": core, "plugin": plugin}
        assert 0 == self.pip("install", core, plugin).returncode

    def pip(self, *arguments):
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)

    def other(self, which, version, **apis):
        """A wheel of another version."""
        folder = self.folder / f"{which}-{version}-{'-'.join(map(str, apis.values()))}"
        folder.mkdir(exist_ok=True)
        return skew.another(self.wheels[which], folder, version, **apis)

    def doctor(self, *wheels):
        """What the host says of `lru` where these are installed, whatever pip would say."""
        done = self.pip("install", "--no-deps", "--force-reinstall", *wheels)
        assert 0 == done.returncode, done.stderr
        return skew.ask(self.python)[LRU]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return Mixed(tmp_path_factory.mktemp("skew"))


@pytest.mark.parametrize(("core", "plugin"), [("0.2.0", "0.1.0"), ("0.1.0", "0.2.0"), ("0.3.0", "0.1.0")])
def test_pip_refuses_versions_that_were_not_tested_together(mixed, core, plugin):
    done = mixed.pip("install", "--dry-run", mixed.other("core", core), mixed.other("plugin", plugin))
    assert done.returncode != 0
    minor = int(plugin.split(".")[1])
    assert f"tensorway-offload {plugin} depends on tensorway<0.{minor + 1} and >={plugin}" in done.stdout + done.stderr


def test_pip_takes_another_patch_of_the_same_minor(mixed):
    done = mixed.pip("install", "--dry-run", mixed.other("core", "0.1.7"), mixed.other("plugin", "0.1.0"))
    assert 0 == done.returncode, done.stderr


@pytest.mark.parametrize(("core", "plugin"), [("0.2.0", "0.1.0"), ("0.1.0", "0.2.0"), ("0.3.0", "0.1.0")])
def test_who_forces_them_together_has_a_host_that_starts_while_the_api_is_one(mixed, core, plugin):
    row = mixed.doctor(mixed.other("core", core), mixed.other("plugin", plugin))
    assert ("usable", "", plugin) == (row["state"], row["code"], row["version"])
    command = [str(mixed.python), "-m", "tensorway", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"tensorway {core}\n" == done.stdout
    done = mixed.pip("check")
    assert f"tensorway-offload {plugin} has requirement" in done.stdout


@pytest.mark.parametrize(
    ("core", "plugin", "reason", "remedy"),
    [
        ({"api": 2}, {}, "it was written for plugin API 1, and this core speaks 2", "Upgrade tensorway-offload."),
        ({}, {"api": 2}, "it was written for plugin API 2, and this core speaks 1", "Upgrade tensorway."),
        (
            {"api": 3, "oldest_api": 2},
            {},
            "it was written for plugin API 1, and this core speaks 2 to 3",
            "Upgrade tensorway-offload.",
        ),
    ],
)
def test_another_api_is_refused_in_one_line_before_any_code_of_it_runs(mixed, core, plugin, reason, remedy):
    row = mixed.doctor(mixed.other("core", "0.2.0", **core), mixed.other("plugin", "0.1.0", **plugin))
    assert ("declared", "api-mismatch", reason, remedy) == (row["state"], row["code"], row["reason"], row["remedy"])


def test_a_core_that_still_speaks_the_old_api_takes_an_old_plugin(mixed):
    row = mixed.doctor(mixed.other("core", "0.3.0", api=2, oldest_api=1), mixed.other("plugin", "0.1.0"))
    assert ("usable", "") == (row["state"], row["code"])
