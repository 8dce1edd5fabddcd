"""Tables and lists of the reference pages say what the code says."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
from importlib import resources
from pathlib import Path

import attrs
import pytest

from tensorway import cli, settings
from tensorway.cli import exits
from tensorway.testing import OfferSuite

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    pytest.skip("the docs are tested on Python 3.11 and newer", allow_module_level=True)

ROOT = Path(__file__).parents[2]
#: Dists of a movement: what they offer has names of its own, and those that move have a page.
#: The dist of an engine offers nothing of its own, and its page is not one of a backend.
MOVEMENTS = {
    "eplb": ["onesided"],
    "kv": ["handover", "shared-store", "several"],
    "offload": ["foresight", "peer"],
    "tools": [],
    "vllm": [],
}
FOLDERS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
#: By the name of their page, which is that of the backend.
BACKENDS = {page: folder for name, folder in FOLDERS.items() for page in MOVEMENTS.get(name, [name])}
#: A page with examples, and the package whose commands print them.
SCHEMAS = {
    "demo.md": "tensorway_tools.demo",
    "reference/cli.md": "tensorway.cli",
    "rebalance-planning.md": "tensorway_eplb.command",
    "offload-replay.md": "tensorway_offload.command",
    "vllm.md": "tensorway_vllm",
    "benchmarks.md": "tensorway_tools.bench",
    "operations.md": "tensorway_tools.top",
}


def commands(parser, words=("tensorway",)):
    """Every command that can be run, as words, with its parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield " ".join(words), parser
    for group in groups:
        for name, below in group.choices.items():
            yield from commands(below, (*words, name))


COMMANDS = dict(commands(cli._parser()))


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_exit_codes_are_those_of_the_code(page):
    shown = {int(code): meaning for code, meaning in page("reference/cli.md").rows(2, "Exit codes")}
    assert exits.MEANING == shown


def test_the_variables_are_those_of_the_code(page):
    rows = page("reference/environment.md").rows(0, "")
    shown = {row[0].strip("`"): row[1] for row in rows if row[0].startswith("`TENSORWAY_")}
    assert settings.VARIABLES == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_section_with_its_usage_and_each_of_its_options(command, page):
    section = page("reference/cli.md").sections(2)[command]
    usage = re.search(rf"^    {command}( .*)?$", section, re.MULTILINE)[0]
    for action in COMMANDS[command]._actions:
        for option in action.option_strings:
            if option in ("-h", "--help"):
                continue
            argument = f" {action.metavar or action.dest.upper()}" if action.nargs != 0 else ""
            assert f"{option}{argument}" in usage, option
            if option not in ("--json", "--debug"):  # described once, for all commands
                assert re.search(rf"^`{option}{argument}`\n: ", section, re.MULTILINE), option
        if not action.option_strings:
            assert (action.metavar or action.dest.upper()) in usage


def test_no_section_describes_a_command_or_an_option_that_does_not_exist(page):
    sections = page("reference/cli.md").sections(2)
    assert set(COMMANDS) == {title for title in sections if title.startswith("tensorway")}
    for command, parser in COMMANDS.items():
        known = {option for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", sections[command].split("```")[0])) <= known, command


@pytest.mark.parametrize("where", SCHEMAS)
def test_every_schema_has_an_example_that_is_run(where, page):
    sections = page(where).sections(3)
    schemas = json.loads((resources.files(SCHEMAS[where]) / "schemas.json").read_text("utf-8"))["$defs"]
    names = [name for name in schemas if name.startswith("tensorway.")]
    assert names and set(names) == {title for title in sections if title.startswith("tensorway.")}
    for name in names:
        (block,) = re.findall(r"^```console\n(.*?)^```$", sections[name], re.DOTALL | re.MULTILINE)
        assert re.match(r"\$ tensorway .* --json\n", block) and f'"schema": "{name}"' in block


#: The pages of single backends.
PAGES_OF_BACKENDS = sorted({path.stem for path in (ROOT / "docs/backends").glob("*.md")} - {"index", "compatibility"})


def test_every_plugin_has_a_page_and_every_page_a_plugin():
    core = tomllib.loads((ROOT / "core/pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    expected = set(BACKENDS) | set(core["tensorway.transport"]) | set(core["tensorway.rendezvous"])
    assert expected == set(PAGES_OF_BACKENDS)


#: What a reader looks for on the page of any backend, beside its first lines, which say what it gives.
PARTS = ["What it needs", "How it fails", "How fast", "How it is tested", "Options"]


@pytest.mark.parametrize("name", PAGES_OF_BACKENDS)
def test_every_page_of_a_backend_has_the_same_parts(name, page):
    found = page(f"backends/{name}.md")
    sections = found.sections(2)
    assert len(found.text.split("\n## ")[0].splitlines()) > 3, "what it gives"
    assert PARTS == sorted(set(PARTS) & set(sections), key=PARTS.index)
    assert [] == [part for part in PARTS if len(sections[part].strip()) < 40]
    assert [] == [part for part in PARTS if found.text.count(f"\n## {part}\n") != 1]
    assert [*sections].index("What it needs") < [*sections].index("How it fails") < [*sections].index("How fast")


@pytest.mark.parametrize("folder", FOLDERS)
def test_whatever_a_dist_offers_is_on_a_page(folder, page):
    """Of its own, or on that of its hook, as policies are."""
    groups = project(FOLDERS[folder]).get("entry-points", {})
    for group, entries in groups.items():
        kind = group.removeprefix("tensorway.")
        hook = ROOT / "docs" / "hooks" / f"{kind}.md"
        for name in entries if hook.is_file() else ():
            own = ROOT / "docs" / "backends" / f"{name}.md"
            assert own.is_file() or f"`{name}`" in hook.read_text("utf-8"), f"{kind} {name}"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_page_of_a_backend_says_how_to_get_it_and_lists_its_options(name, page):
    text = page(f"backends/{name}.md").text
    assert f"# {name}\n" == text[: len(name) + 3]
    table = project(BACKENDS[name])
    assert f"`{table['name']}`" in text
    for requirements in table.get("optional-dependencies", {}).values():
        for requirement in requirements:
            assert f"`{requirement}`" in text, "the requirement of its extra"
    for group, entries in table["entry-points"].items():
        if group not in {
            "tensorway.api",
            "tensorway.command",
            "tensorway.demo",
            "tensorway.offload_command",
            "tensorway.bench",
        }:
            if name not in entries:  # a movement's dist has several pages, and policies are on the page of their hook
                continue
            assert f"../hooks/{group.removeprefix('tensorway.')}.md" in text
            module, _, function = entries[name].partition(":")
            try:
                hook = getattr(importlib.import_module(module), function)
            except ModuleNotFoundError:
                pytest.skip(f"tensorway-{name} is not installed")
            options = [field.name for field in attrs.fields(hook(ctx=None).options)]
            assert [f"`{option}`" for option in options] == [
                row[0] for row in page(f"backends/{name}.md").rows(2, "Options")
            ]


#: Packages whose `__all__` is a promise to whoever imports from them.
PUBLIC = ["tensorway", *(f"tensorway.{room}" for room in ("eplb", "kv", "offload", "plugins", "rendezvous", "testing"))]
PUBLIC += ["tensorway.transport", "tensorway.rendezvous.environment", "tensorway_kv.reference", "tensorway_ray"]
#: Found in sources, and no promise: parts that a package divides itself into.
INSIDE = {"tensorway.plugins.host", "tensorway.testing.netlab", "tensorway_eplb.plan", "tensorway_vllm.handover"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name, page):
    """As an object of its own, or among the members of a module that is shown with all of them, or in words."""
    text = page("reference/api.md").text
    blocks = re.findall(r"^\.\. auto(\w+):: ([\w.]+)(?:\(\))?\n((?:   :.*\n)*)", text, re.MULTILINE)
    shown = {path.rpartition(".")[2] for kind, path, _ in blocks if kind != "module"}
    module = importlib.import_module(name)
    if any(path == name and ":no-members:" not in options for kind, path, options in blocks if kind == "module"):
        here = [value for value in vars(module).values() if getattr(value, "__module__", "") == name]
        shown |= {value.__name__ for value in here if value.__doc__}
    shown |= set(re.findall(r"`(\w+)`", text))
    assert set() == set(module.__all__) - shown - {"__version__"}


def test_every_package_with_public_names_is_known_here():
    found = set()
    for path in [*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        if re.search(r"^__all__", path.read_text("utf-8"), re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(parts[parts.index("src") + 1 :]).removesuffix(".__init__"))
    assert found == {*PUBLIC, *INSIDE}


def test_every_extra_that_a_page_names_exists_and_every_backend_has_one():
    extras = set(project(ROOT / "core")["optional-dependencies"])
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {extra for path in pages for extra in re.findall(r"tensorway\[([\w,-]+)\]", path.read_text("utf-8"))}
    assert {part for extra in named for part in extra.split(",")} <= extras
    assert set(FOLDERS) <= extras


def test_the_releases_of_vllm_are_those_of_the_code(page):
    versions = pytest.importorskip("tensorway_vllm.versions", reason="tensorway-vllm is not installed")
    rows = [row[:2] for row in page("vllm.md").rows(2, "Versions")]
    assert [[name, release.tried] for name, release in versions.RELEASES.items()] == rows
    said = {name: text for name, _, text in page("vllm.md").rows(2, "Versions")}
    for name, release in versions.RELEASES.items():
        assert (said[name] == "nothing") == (set(versions.FEATURES) == release.features)


def test_the_tutorial_lists_what_the_suite_checks(page):
    tests = [name for name in dir(OfferSuite) if name.startswith("test_")]
    assert sorted(tests) == sorted(row[0].strip("`") for row in page("authoring.md").rows(2, "What the suite checks"))


def test_the_readme_s_demo_is_what_getting_started_runs(page):
    (demo,) = re.findall(
        r"^```sh\n(.* tensorway demo|.*/tensorway demo)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert f"$ {demo}\n" in page("getting-started.md").text


def pattern(node):
    """What a string of the source can look like, as a regular expression; None if too little of it is fixed."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    fixed = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    if sum(len(text) for text in fixed if text) < 8:
        return None
    return "".join(".+" if text is None else re.escape(text) for text in fixed)


def reasons(folder):
    """Every reason that the sources of a plugin give, for a yes and for a no."""
    for file in folder.glob("src/*/*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr="failed" | "passed") | ast.Name(id="Absent"), args=[value, *_]):
                    yield value
                case ast.Assign(targets=[ast.Name(id="reason" | "what")], value=value):
                    yield value
                case ast.keyword(arg="reason", value=value):
                    yield value


@pytest.mark.parametrize("name", BACKENDS)
def test_a_page_of_a_backend_shows_every_reason_that_its_sources_give_and_no_other(name, page):
    shown = [row[0].strip("`") for row in page(f"backends/{name}.md").rows(2, "How it fails")]
    folders = [BACKENDS[name], *([BACKENDS["nixl"]] if name == "rixl" else [])]
    own, known = ([p for p in map(pattern, reasons(folder)) if p] for folder in (folders[0], folders[-1]))
    text = "".join(page(f"backends/{one}.md").text for one, folder in BACKENDS.items() if folder == BACKENDS[name])
    assert own or known
    assert [] == [p for p in own if not re.search(p, text)], "reasons that the page does not show"
    assert [] == [reason for reason in shown if not any(re.search(p, reason) for p in {*own, *known})]
