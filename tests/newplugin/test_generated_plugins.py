"""What `tensorway new-plugin` writes installs, is discovered and passes its own tests at once, for every kind.

One environment for the whole file: core, and what two kinds stand on, from wheels (of the folder
TENSORWAY_TEST_WHEELHOUSE, or built from the checkout), one generated dist per kind, each dist's own tests in a process
of their own. And the other way round: where an author breaks something, the tests that came with the dist say so. And
the examples of the docs, which are what somebody has made of a generated one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from tensorway.types import KINDS

# Making the environment counts for the first test that asks for it.
pytestmark = pytest.mark.timeout(600)

CHECKOUT = Path(__file__).parents[2]
_GENERATE = """
import json, sys, pathlib
from tensorway.cli import new_plugin
into = pathlib.Path(sys.argv[1])
for kind in sys.argv[2:]:
    new_plugin.run("acme-" + kind.replace("_", "-"), kind, into)
"""


def backend_of(kind):
    return f"acme-{kind.replace('_', '-')}"


def dist_of(kind):
    return f"tensorway-{backend_of(kind)}"


def package_of(kind):
    return f"tensorway_acme_{kind}"


@attrs.frozen
class Lab:
    """An environment with core and one generated dist per kind."""

    python: Path
    dists: Path

    @property
    def site(self):
        return Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())

    def run(self, *arguments, cwd=None, env=None, check=True):
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, check=False, cwd=cwd, env=_clean(env or {})
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments):
        self.run("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *arguments)

    def own_tests(self, kind, *which, overlay=None):
        """Run (some of) the tests of one generated dist; an overlay folder is imported before anything installed."""
        env = {"PYTHONPATH": str(overlay)} if overlay else {}
        command = ["-m", "pytest", "-p", "no:cacheprovider", *which]
        return self.run(*command, cwd=self.dists / dist_of(kind), env=env, check=False)


def _clean(extra):
    # Neither the settings of whoever runs this nor paths that would let the checkout stand in for what is installed.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "PYTHON", "PYTEST_"))}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def _ours(dist="tensorway"):
    """What pip installs as a dist of ours."""
    wheelhouse = os.environ.get("TENSORWAY_TEST_WHEELHOUSE")
    if not wheelhouse:
        return CHECKOUT / ("core" if dist == "tensorway" else f"plugins/{dist.removeprefix('tensorway-')}")
    wheels = sorted(Path(wheelhouse).glob(f"{dist.replace('-', '_')}-*.whl"))
    assert len(wheels) == 1, f"one wheel of {dist} is wanted in {wheelhouse}: {wheels}"
    return wheels[0].resolve()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("newplugin")
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True, env=_clean({}))
    made = Lab(root / "venv" / "bin" / "python", root / "dists")
    # Movements of ours that a backend is written for: whoever plans for one, or has its manager, needs its dist.
    movements = [_ours("tensorway-eplb"), _ours("tensorway-offload")]
    made.pip(f"{_ours()}[testing]", *movements, "pytest-timeout>=2.3", "hatchling>=1.27")
    made.run("-c", _GENERATE, made.dists, *KINDS)
    # Without isolation and dependencies: both are there, and ten build environments would take minutes.
    made.pip("--no-build-isolation", "--no-deps", *(made.dists / dist_of(kind) for kind in KINDS))
    return made


#: What the suites of a kind do not ask of a backend that declares no more than the generated one.
SKIPS = {
    "eplb_communicator": {
        "nobody has to serve",
        "needs the capability regroup",
        "it has no channel for messages, and the rendezvous is used",
    },
    "kv_connector": {
        "hashes are of blocks, and these are of unequal ones",
        "it issues no tickets",
        "needs the capability layerwise",
        "needs the capabilities layerwise and push",
        "needs the capability bidirectional",
    },
    "offload_tier": {
        "its options do not say how much is too much",
        "its options leave room for fewer",
        "it keeps nothing in files",
        "needs the capability persistent",
        "needs the capabilities shared and writable",
    },
    "offloading": {"no tier can be put below it"},
    "placement_policy": {"needs the capability budget"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_plugin_passes_its_own_tests(lab, kind):
    done = lab.own_tests(kind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert SKIPS.get(kind, set()) == set(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE))
    assert "warning" not in done.stdout


#: Kinds for which the kit has a suite: what is generated subclasses it.
SUITES = {
    "transport": ["TransportSuite"],
    "eplb_communicator": ["SessionSuite"],
    "placement_policy": ["PlacementPolicySuite"],
    "kv_connector": ["ConnectorSuite"],
    "offloading": ["OffloadingManagerSuite", "OffloadingWorkerSuite"],
    "offload_tier": ["TierSuite"],
    "eviction_policy": ["EvictionPolicySuite"],
    "rendezvous": ["RendezvousSuite"],
}


@pytest.mark.parametrize("kind", SUITES)
def test_a_generated_plugin_subclasses_the_suites_of_its_kind(lab, kind):
    tests = "".join(path.read_text("utf-8") for path in (lab.dists / dist_of(kind) / "tests").glob("*.py"))
    assert {"OfferSuite", *SUITES[kind]} == set(re.findall(r"^class \w+\((\w+)\):$", tests, re.MULTILINE))


def test_pip_finds_nothing_missing(lab):
    lab.run("-m", "pip", "check")


def test_every_generated_plugin_is_listed(lab):
    answer = json.loads(lab.run("-m", "tensorway", "plugins", "list", "--json").stdout)
    assert answer["schema"] == "tensorway.plugins/1"
    listed = {(row["kind"], row["name"], row["dist"]) for row in answer["plugins"]}
    assert set() == {(kind, backend_of(kind), dist_of(kind)) for kind in KINDS} - listed
    assert answer["complaints"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_plugin_is_chosen_by_name(lab, kind):
    answer = json.loads(lab.run("-m", "tensorway", "why", kind, backend_of(kind), "--json").stdout)
    assert backend_of(kind) in json.dumps(answer)


@pytest.mark.parametrize("kind", ["placement_policy", "offload_tier"])  # of a transport the tutorial does it
def test_the_command_line_checks_what_is_generated(lab, tmp_path, kind):
    command = ["-m", "tensorway", "check", backend_of(kind), "--badge", "badge.json", "--badge", "badge.svg", "--json"]
    report = json.loads(lab.run(*command, cwd=tmp_path).stdout)
    assert json.loads((tmp_path / "conformance.json").read_text("utf-8")) == report
    assert (0, []) == (report["totals"]["failed"], report["left_out"])
    assert ["OfferSuite", *SUITES[kind]] == report["suites"]
    assert f"{report['totals']['passed']} passed" in json.loads((tmp_path / "badge.json").read_text("utf-8"))["message"]
    assert f"{report['totals']['passed']} passed" in (tmp_path / "badge.svg").read_text("utf-8")


def test_the_command_line_measures_a_generated_transport(lab):
    name = backend_of("transport")
    (row,) = json.loads(lab.run("-m", "tensorway", "probe", "--transport", name, "--json").stdout)["transports"]
    assert ("tcp", True, "") == (row["lane"], row["verified"], row["error"])
    assert "cross-memory attach or shared memory was not taken" in row["slow"]


_RIVAL = """
import tensorway
from tensorway.plugins import register
from tensorway.types import Offer, ProbeResult
def probe(): return ProbeResult.passed("always")
register(Offer("rival", "observer", "rival", probe, factory=print, priority=1, probe_in="host"))
print(tensorway.decide("observer").winner.name)
"""


def test_auto_prefers_whatever_does_something(lab):
    assert lab.run("-c", _RIVAL).stdout.strip() == "rival"


def test_the_command_line_writes_the_same(lab, tmp_path):
    answer = json.loads(
        lab.run(
            "-m", "tensorway", "new-plugin", "acme-transport", "--kind", "transport", "--dir", tmp_path, "--json"
        ).stdout
    )
    made, there = Path(answer["directory"]), lab.dists / dist_of("transport")
    assert "pyproject.toml" in answer["files"]
    assert [path for path in answer["files"] if (made / path).read_bytes() != (there / path).read_bytes()] == []


#: The tests that start no second process; the suite of transports takes twenty seconds.
QUICK = ("tests/test_offer.py", "tests/test_backend.py")


@attrs.frozen
class Break:
    """What an author may get wrong: a change of one file, and what the dist's own tests say to it."""

    file: str
    old: str
    new: str
    #: A test that fails.
    test: str
    #: What the output says about it.
    says: str
    #: Which of its tests are run.
    which: tuple[str, ...] = QUICK


BREAKS = {
    "the argument of the hook has another name": Break(
        "offers.py",
        "(ctx: HookContext)",
        "(foo: HookContext)",
        "test_the_offer_describes_itself",
        "the contract is transport(ctx: ",
    ),
    "the hook is for another name": Break(
        "offers.py",
        'name="acme-transport"',
        'name="acme"',
        "test_the_host_constructs_it",
        "an offer for transport 'acme'",
    ),
    "the module raises": Break(
        "offers.py",
        "from typing import",
        "raise RuntimeError('no luck today')\nfrom typing import",
        "test_importing_the_plugin_loads_no_native_library",
        "no luck today",
    ),
    "the module imports the library": Break(
        "offers.py",
        "from typing import",
        "import numpy\nfrom typing import",
        "test_importing_the_plugin_loads_no_native_library",
        "numpy",
    ),
    "the probe answers None": Break(
        "probe.py",
        "    if sys.platform",
        "    return None\n    if sys.platform",
        "test_the_probe_answers_within_its_deadline",
        "the probe returned NoneType, not a ProbeResult",
    ),
    "the probe raises": Break(
        "probe.py",
        "    if sys.platform",
        "    import no_such_library\n    if sys.platform",
        "test_the_probe_answers_within_its_deadline",
        "its probe raised ModuleNotFoundError",
    ),
    # After the look for the library, as a native one would: the test of the missing library runs in pytest's process.
    "the probe kills its process": Break(
        "probe.py",
        "    return ProbeResult.passed",
        "    __import__('os').abort()\n    return ProbeResult.passed",
        "test_the_probe_answers_within_its_deadline",
        "SIGABRT",
    ),
    "an option has no default": Break(
        "options.py",
        "    name: str",
        "    address: str\n    name: str",
        "test_options_have_defaults_and_refuse_what_they_do_not_know",
        "an option without a default makes `auto` impossible",
    ),
    "the factory raises": Break(
        "backend.py",
        "        self._server = wire.Server",
        "        raise OSError('the port is taken')\n        self._server = wire.Server",
        "test_the_host_constructs_it",
        "the port is taken",
    ),
    "closing does not close": Break(
        "backend.py",
        "        self._server.close()",
        "        pass",
        "test_who_is_not_there_any_more_is_a_typed_error",
        "DID NOT RAISE",
    ),
    "the bytes go to other places": Break(
        "backend.py",
        "for piece in mine if there",
        "for piece in reversed(mine) if there",
        "test_a_read_brings_every_byte_to_its_place",
        "AssertionError",
        ("tests/test_transport.py", "-k", "test_a_read"),
    ),
    "a capability is declared that is not there": Break(
        "backend.py",
        "max_in_flight=1, synchronous=True",
        "max_notification=1 << 21",
        "test_notifications_keep_their_order_and_their_bytes",
        "PeerLost|DeadlineExceeded|assert sent ==",  # the others where the machine is busy
        ("tests/test_transport.py", "-k", "test_notifications"),
    ),
    "the metadata does not say which API": Break(
        "../dist-info/entry_points.txt",
        "[tensorway.api]",
        "[somebody.else]",
        "test_metadata_declares_it_for_an_api_that_this_core_speaks",
        "api-mismatch",
    ),
    "the metadata refers to what is not there": Break(
        "../dist-info/entry_points.txt",
        ".offers:transport",
        ".offers:transports",
        "test_the_offer_describes_itself",
        "metadata-stale",
    ),
}


@pytest.fixture
def overlay(lab, tmp_path):
    """A copy of the installed transport, to be found before it: breaking it breaks nothing for other tests."""
    package = package_of("transport")
    shutil.copytree(lab.site / package, tmp_path / package)
    (info,) = lab.site.glob(f"{package}-*.dist-info")
    shutil.copytree(info, tmp_path / info.name)
    (tmp_path / "dist-info").symlink_to(info.name)
    return tmp_path


def test_the_copy_that_is_broken_below_is_whole(lab, overlay):
    done = lab.own_tests("transport", *QUICK, overlay=overlay)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("what", BREAKS)
def test_its_own_tests_fail_when(lab, overlay, what):
    broken = BREAKS[what]
    path = overlay / package_of("transport") / broken.file
    text = path.read_text("utf-8")
    assert text.count(broken.old) == 1
    path.write_text(text.replace(broken.old, broken.new), "utf-8")
    done = lab.own_tests("transport", *broken.which, overlay=overlay)
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert any(said in output for said in broken.says.split("|")), output
    failed = {
        line.split(" - ")[0].rsplit("::", 1)[-1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))
    }
    assert broken.test in failed


def test_its_own_tests_fail_when_a_test_of_the_suite_is_replaced(lab, tmp_path):
    shutil.copytree(lab.dists / dist_of("transport"), tmp_path / "dist")
    with (tmp_path / "dist" / "tests" / "test_offer.py").open("a", encoding="utf-8") as file:
        file.write("\n    def test_the_offer_describes_itself(self):\n        pass\n")
    done = lab.run("-m", "pytest", "-p", "no:cacheprovider", *QUICK, cwd=tmp_path / "dist", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "replaced without a reason: test_the_offer_describes_itself" in done.stdout


EXAMPLES = sorted((CHECKOUT / "docs" / "examples").glob("*/pyproject.toml"))


def test_there_are_two_examples():
    assert ["tensorway-procmem", "tensorway-sqlite"] == [path.parent.name for path in EXAMPLES]


@pytest.mark.parametrize("project", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_passes_its_own_tests_from_its_wheel(lab, tmp_path, project):
    folder = tmp_path / project.parent.name
    shutil.copytree(project.parent, folder)
    lab.run("-m", "hatchling", "build", "-t", "wheel", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    lab.pip("--no-deps", wheel)
    shutil.rmtree(folder / "src")  # what is tested is the wheel
    done = lab.run("-m", "pytest", "-p", "no:cacheprovider", cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE)
    assert set(skipped) <= {"its options leave room for fewer"}


@pytest.mark.parametrize("project", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_uses_what_the_pages_of_the_api_name(project):
    pages = "".join(path.read_text("utf-8") for path in (CHECKOUT / "docs").rglob("*.md"))
    source = "".join(path.read_text("utf-8") for path in project.parent.rglob("src/**/*.py"))
    for module, names in re.findall(r"^from (tensorway[\w.]*) import (.+)$", source, re.MULTILINE):
        for name in names.strip("()").split(", "):
            own = module.startswith(project.parent.name.replace("-", "_"))
            told = own or name in getattr(importlib.import_module(module), "__all__", ()) or f"`{name}`" in pages
            told = told or f".{name}\n" in pages or f"automodule:: {module}\n" in pages
            assert told, f"{module}: {name} is on no page, and in no `__all__`"
