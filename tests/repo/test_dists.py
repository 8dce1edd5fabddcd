"""What must hold across the dists: one version, one naming rule, honest metadata."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core"
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
DISTS = {"tensorway": CORE} | {f"tensorway-{name}": folder for name, folder in PLUGINS.items()}
#: Extras of the core that are no backend.
OTHER_EXTRAS = {"testing"}
#: Dists of a movement: what they offer has names of its own.
MOVEMENTS = {"eplb", "kv", "offload"}
#: Groups of an engine, which asks for names of its own.
ENGINES = {"vllm.general_plugins"}
#: Groups whose names are words of a command, movements, or what is measured.
WORDS = {"tensorway.bench", "tensorway.command", "tensorway.demo", "tensorway.offload_command"}
#: What the mathematics of a dist needs: small, and on every index.
MATHEMATICS = {
    "cpu": {"numpy"},
    "eplb": {"numpy", "xxhash"},
    "fs": {"xxhash"},
    "kv": {"numpy"},
    "object": {"xxhash"},
    "offload": {"xxhash"},
}


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constant(path, name):
    """The literal that a module assigns to `name`, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} assigns no {name}")


def requirement_strings(table):
    """Every string of a pyproject table that pip would take for a requirement, with the place where it stands."""
    project_table = table.get("project", {})
    yield from (("build-system", text) for text in table.get("build-system", {}).get("requires", []))
    yield from (("dependencies", text) for text in project_table.get("dependencies", []))
    for extra, texts in project_table.get("optional-dependencies", {}).items():
        yield from ((f"extra {extra}", text) for text in texts)
    for group, texts in table.get("dependency-groups", {}).items():
        yield from ((f"group {group}", text) for text in texts if isinstance(text, str))


VERSION = project(CORE)["version"]
dists = pytest.mark.parametrize("dist", DISTS)
plugins = pytest.mark.parametrize("name", PLUGINS)


@dists
def test_every_dist_has_the_version_of_the_core(dist):
    assert VERSION == project(DISTS[dist])["version"]


def test_the_core_says_its_own_version():
    assert VERSION == constant(CORE / "src" / "tensorway" / "__init__.py", "__version__")


@plugins
def test_a_plugin_asks_for_the_minor_version_of_the_core_that_it_is_released_with(name):
    major, minor, _ = VERSION.split(".")
    asked = [r for r in map(Requirement, project(PLUGINS[name])["dependencies"]) if r.name == "tensorway"]
    assert [f"<{major}.{int(minor) + 1},>={major}.{minor}.0"] == [str(r.specifier) for r in asked]


def test_every_plugin_folder_has_an_extra_and_every_extra_a_plugin_folder():
    assert set(PLUGINS) == set(project(CORE)["optional-dependencies"]) - OTHER_EXTRAS


@plugins
def test_an_extra_pins_its_plugin_to_the_same_version(name):
    pinned = [Requirement(text) for text in project(CORE)["optional-dependencies"][name]]
    assert [(f"tensorway-{name}", f"=={VERSION}")] == [(r.name, str(r.specifier)) for r in pinned]
    offered = project(PLUGINS[name]).get("optional-dependencies", {})
    assert pinned[0].extras <= set(offered), f"tensorway-{name} has no extra {sorted(pinned[0].extras - set(offered))}"
    left_out = f"tensorway[{name}] leaves out the library that tensorway-{name} offers"
    assert not set(offered) - {"plot"} or pinned[0].extras, left_out


def test_no_extra_asks_for_all_backends():
    everywhere = {dist: set(project(folder).get("optional-dependencies", {})) for dist, folder in DISTS.items()}
    assert [] == [dist for dist, extras in everywhere.items() if extras & {"all", "full", "everything"}]


@plugins
def test_folder_and_entry_point_and_dist_and_import_share_one_name(name):
    table = project(PLUGINS[name])
    assert f"tensorway-{name}" == table["name"]
    assert [f"tensorway_{name}"] == [path.name for path in (PLUGINS[name] / "src").iterdir() if path.is_dir()]
    hooks = {group: entries for group, entries in table["entry-points"].items() if group != "tensorway.api"}
    assert hooks, "offers nothing"
    for group, entries in hooks.items():
        assert group.startswith("tensorway.") or group in ENGINES
        assert name in MOVEMENTS or group in ENGINES or group in WORDS or [name] == list(entries), group
        assert all(value.startswith(f"tensorway_{name}.") for value in entries.values()), group


@dists
def test_every_dist_says_which_plugin_api_it_was_written_for(dist):
    api = constant(CORE / "src" / "tensorway" / "hookspecs.py", "API")
    package = dist.replace("-", "_")
    assert {str(api): package} == project(DISTS[dist])["entry-points"]["tensorway.api"]


@dists
def test_every_dist_brings_readme_license_and_types(dist):
    folder = DISTS[dist]
    assert (folder / "README.md").read_text(encoding="utf-8").strip()
    assert (ROOT / "LICENSE").read_bytes() == (folder / "LICENSE").read_bytes()
    assert (folder / "src" / dist.replace("-", "_") / "py.typed").is_file()
    table = project(folder)
    assert ("README.md", ["LICENSE"]) == (table["readme"], table["license-files"])
    assert project(CORE)["requires-python"] == table["requires-python"]


def test_the_core_depends_on_five_small_packages_and_nothing_else():
    requirements = {r.name: r for r in map(Requirement, project(CORE)["dependencies"])}
    assert {"attrs", "pluggy", "msgspec", "pyzmq", "importlib-metadata"} == set(requirements)
    assert 'python_version < "3.12"' == str(requirements["importlib-metadata"].marker)
    assert {"importlib-metadata"} == {name for name, r in requirements.items() if r.marker}


@plugins
def test_a_plugin_installs_without_its_library(name):
    requirements = {r.name: r for r in map(Requirement, project(PLUGINS[name])["dependencies"])}
    assert set(requirements) - {"attrs", "msgspec"} - MATHEMATICS.get(name, set()) <= set(DISTS)
    # Dists of ours are released together, and internals that one plugin takes from another are no API.
    shared = {other: str(r.specifier) for other, r in requirements.items() if other in DISTS and other != "tensorway"}
    assert dict.fromkeys(shared, f"=={VERSION}") == shared


def test_nobody_requires_the_rixl_of_the_public_index():
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "*pyproject.toml*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert {"pyproject.toml", "core/pyproject.toml"} <= set(listed)
    found = []
    for file in filter(lambda file: (ROOT / file).is_file(), listed):
        text = (ROOT / file).read_text(encoding="utf-8")
        try:
            strings = list(requirement_strings(tomllib.loads(text)))
        except tomllib.TOMLDecodeError:  # a template; any quoted word may become a requirement
            strings = [("template", quoted) for quoted in re.findall(r'"([^"\n]*)"', text)]
        for place, string in strings:
            try:
                name = canonicalize_name(Requirement(string).name)
            except InvalidRequirement:
                continue
            if name in {"rixl", "rixl-client"}:
                found.append(f"{file}: {place}: {string}")
    assert [] == found


def test_every_release_of_vllm_in_the_table_has_a_session():
    table = (PLUGINS["vllm"] / "src" / "tensorway_vllm" / "versions.py").read_text(encoding="utf-8")
    tried = re.findall(r'Release\("([\d.]+)"', table)
    assert tried and sorted(tried) == sorted(constant(ROOT / "noxfile.py", "VLLM"))
