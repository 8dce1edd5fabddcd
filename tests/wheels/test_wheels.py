"""The built wheels: what is in them, and what pip makes of them and of every extra in a fresh environment."""

from __future__ import annotations

import configparser
import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if "TENSORWAY_TEST_WHEELHOUSE" not in os.environ:
    pytest.skip("needs built wheels: run `nox -s wheels`", allow_module_level=True)

# pip resolves, and torch is large.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
HOUSE = Path(os.environ["TENSORWAY_TEST_WHEELHOUSE"])
CONSTRAINTS = ROOT / "constraints.txt"
FOLDERS = [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
PROJECTS = {
    table["name"]: (folder, table)
    for folder in FOLDERS
    for table in [tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]]
}
EXTRAS = sorted(PROJECTS["tensorway"][1]["optional-dependencies"])
VERSION = PROJECTS["tensorway"][1]["version"]

dists = pytest.mark.parametrize("dist", PROJECTS)


def wheel(dist):
    (path,) = HOUSE.glob(f"{dist.replace('-', '_')}-*.whl")
    return path


def read(dist, name):
    """One file of the wheel's `.dist-info`."""
    with zipfile.ZipFile(wheel(dist)) as archive:
        return archive.read(f"{dist.replace('-', '_')}-{VERSION}.dist-info/{name}").decode()


def files(dist):
    with zipfile.ZipFile(wheel(dist)) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


class Environment:
    """A fresh environment that knows the wheelhouse, and no checkout."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)

    def run(self, program, *arguments):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TENSORWAY_", "PYTHON"))}
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def pip(self, *arguments):
        return self.run("python", "-m", "pip", *arguments)

    def install(self, *arguments):
        # Constrained always: another torch means gigabytes of CUDA.
        return self.pip("install", "--find-links", HOUSE, "-c", CONSTRAINTS, *arguments)

    def installed(self):
        listed = json.loads(self.pip("list", "--format=json"))
        return {canonicalize_name(entry["name"]): entry["version"] for entry in listed}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    def make(name, *requirements):
        environment = Environment(tmp_path_factory.mktemp(name))
        environment.install(*requirements)
        return environment

    return make


@pytest.fixture(scope="module")
def core(fresh):
    return fresh("core", wheel("tensorway"))


@pytest.fixture(scope="module")
def with_nixl(fresh):
    """The one environment that holds a torch."""
    return fresh("nixl", f"{wheel('tensorway')}[nixl]")


def test_there_is_one_wheel_for_each_dist_and_no_other():
    assert {wheel(dist).name for dist in PROJECTS} == {path.name for path in HOUSE.glob("*.whl")}


@dists
def test_a_wheel_holds_all_of_its_package_and_nothing_else(dist):
    package = dist.replace("-", "_")
    tree = PROJECTS[dist][0] / "src"
    sources = {str(path.relative_to(tree)) for path in (tree / package).rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    assert f"{package}/py.typed" in sources
    assert sources == {name for name in files(dist) if not name.startswith(f"{package}-{VERSION}.dist-info/")}


@dists
def test_a_wheel_brings_its_license(dist):
    assert (ROOT / "LICENSE").read_text(encoding="utf-8") == read(dist, "licenses/LICENSE")


@dists
def test_the_metadata_says_what_the_project_file_says(dist):
    table = PROJECTS[dist][1]
    metadata = email.message_from_string(read(dist, "METADATA"))
    extras = table.get("optional-dependencies", {})
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert (dist, VERSION) == (metadata["Name"], metadata["Version"])
    assert set(extras) == set(metadata.get_all("Provides-Extra", []))
    assert metadata.get_payload().strip(), "no README"
    wanted = [Requirement(text).name for texts in [table["dependencies"], *extras.values()] for text in texts]
    assert sorted(wanted) == sorted(r.name for r in required)
    # What an extra brings must carry the extra's marker, or everybody gets it.
    always = [r.name for r in required if "extra" not in str(r.marker)]
    assert sorted(Requirement(text).name for text in table["dependencies"]) == sorted(always)


@dists
def test_the_entry_points_are_those_of_the_project_file(dist):
    table = PROJECTS[dist][1]
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str
    parser.read_string(read(dist, "entry_points.txt"))
    declared = dict(table["entry-points"])
    if "scripts" in table:
        declared["console_scripts"] = table["scripts"]
    assert declared == {group: dict(parser[group]) for group in parser.sections()}


def test_the_core_alone_imports_and_says_its_version(core):
    assert [VERSION] == core.run("python", "-c", "import tensorway; print(tensorway.__version__)").split()
    assert VERSION in core.run("tensorway", "--version").split()


def test_the_core_alone_is_small(core):
    assert not {"torch", "numpy"} & set(core.installed())
    small = {"tensorway", "attrs", "pluggy", "msgspec", "pyzmq", "importlib-metadata", "zipp", "pip", "setuptools"}
    strangers = set(core.installed()) - small
    # importlib-metadata's own dependencies change from release to release; nobody else's are expected.
    shown = core.pip("show", *sorted(strangers)) if strangers else ""
    assert set(re.findall(r"^Required-by: (.*)$", shown, re.MULTILINE)) <= {"importlib-metadata", "importlib_metadata"}


def test_the_nixl_extra_brings_the_plugin_and_a_library_that_imports(with_nixl):
    installed = with_nixl.installed()
    assert {"tensorway-nixl", "nixl", "nixl-cu12", "torch"} <= set(installed)
    constrained = Requirement(re.search(r"^torch==.*$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)[0])
    assert constrained.specifier.contains(installed["torch"])
    with_nixl.run("python", "-c", "import nixl_cu12")


def test_the_nixl_extra_makes_the_backend_known(with_nixl):
    listed = with_nixl.run("tensorway", "plugins", "list", "--json")
    assert '"nixl"' in json.dumps(json.loads(listed))


def test_the_rixl_extra_never_brings_the_rixl_of_the_public_index(fresh):
    environment = fresh("rixl", f"{wheel('tensorway')}[rixl]")
    assert "tensorway-rixl" in environment.installed()
    assert not {"rixl", "rixl-client"} & set(environment.installed())


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(core, extra, tmp_path):
    report = tmp_path / "report.json"
    core.install("--quiet", "--dry-run", "--ignore-installed", "--report", report, f"{wheel('tensorway')}[{extra}]")
    found = {canonicalize_name(entry["metadata"]["name"]) for entry in json.loads(report.read_text())["install"]}
    wanted = {Requirement(text).name for text in PROJECTS["tensorway"][1]["optional-dependencies"][extra]}
    assert wanted | {"tensorway"} <= found
    assert not {"rixl", "rixl-client"} & found
