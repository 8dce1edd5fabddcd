"""What must hold in every module: sizes that a reader can take in, one place that reads the environment, docstrings."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = [ROOT / "core" / "src", *sorted(ROOT.glob("plugins/*/src"))]
#: Files that `tensorway new-plugin` copies: text with placeholders, not modules of ours.
TEMPLATES = ROOT / "core" / "src" / "tensorway" / "cli" / "template"
MODULES = [path for tree in TREES for path in sorted(tree.rglob("*.py")) if TEMPLATES not in path.parents]
SETTINGS = ROOT / "core" / "src" / "tensorway" / "settings.py"

MODULE_LINES = 350
FUNCTION_LINES = 60
FUNCTION_LINES_P90 = 30
#: What each room of the core may have of code, and the ground under them; docs/decisions.md, 19, says why so much.
#: A room that has lost lines gets its new number; one that is to have more needs a decision, not another number.
ROOMS = {
    "testing": 6_820,
    "transport": 2_690,
    "rendezvous": 2_275,
    "cli": 1_876,
    "plugins": 1_260,
    "eplb": 375,
    "offload": 275,
    "kv": 205,
    "ground": 1_545,
}
#: How far below its number a room may be before the number has to follow.
ROOM_SLACK = 60
#: What the host, the contracts and the machinery that all backends share may have together.
CORE_LINES = 5_000
#: What the dist of the core has beside that: what is for people and for authors of plugins, and backends that are
#: embedded, which the core finds as it finds those of others.
BESIDE = [
    *("__main__", "cli", "testing", "plugins.report"),
    *("platforms", "process"),
    *(f"transport.{name}" for name in ("local", "iovec", "shm", "sockets", "ears", "offer")),
    *(f"transport.{name}" for name in ("contained", "life", "mover", "mappings")),
    *(f"rendezvous.{name}" for name in ("direct", "frames", "lines", "service", "records", "reopening", "offer")),
    *(f"rendezvous.{name}" for name in ("hosts", "interfaces", "fabrics", "environment", "variables")),
]

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
#: Functions that start a program with an environment of the caller's making.
STARTERS = {"Popen", "run", "call", "check_call", "check_output", "create_subprocess_exec", "create_subprocess_shell"}

modules = pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def parse(module):
    return ast.parse(module.read_text(encoding="utf-8"), filename=str(module))


def docstring_lines(tree):
    """The numbers of the lines that docstrings stand on (and the `#:` docs of attributes are comments anyway)."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def code_lines(module):
    """How many lines hold code: neither blank, nor comment, nor docstring."""
    text = module.read_text(encoding="utf-8")
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def functions():
    """Each function with the number of its lines, from `def` to its end."""
    for module in MODULES:
        for node in ast.walk(parse(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def environment_uses(module):
    """Where a module reads or writes the environment, or hands one to a program that it starts."""
    for node in ast.walk(parse(module)):
        match node:
            case ast.Attribute(value=ast.Name(id="os" | "posix"), attr=name) if name in ENVIRONMENT:
                yield f"{node.lineno}: os.{name}"
            case ast.ImportFrom(module="os" | "posix", names=names):
                yield from (
                    f"{node.lineno}: from os import {alias.name}" for alias in names if alias.name in ENVIRONMENT
                )
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), keywords=keywords) if name in STARTERS:
                yield from (f"{node.lineno}: {name}(env=...)" for keyword in keywords if keyword.arg == "env")


def test_the_modules_are_found():
    assert ROOT / "core" / "src" / "tensorway" / "__init__.py" in MODULES
    assert [] == [tree for tree in TREES if not any(tree in module.parents for module in MODULES)]


@modules
def test_a_module_is_short_enough_to_read_in_one_go(module):
    assert code_lines(module) <= MODULE_LINES


def test_a_room_of_the_core_grows_only_by_decision():
    core = SETTINGS.parent
    found = dict.fromkeys(ROOMS, 0)
    for module in MODULES:
        if core in module.parents:
            first, *rest = module.relative_to(core).parts
            found[first if rest else "ground"] += code_lines(module)
    assert {} == {room: lines for room, lines in found.items() if not ROOMS[room] - ROOM_SLACK <= lines <= ROOMS[room]}


def dotted(module):
    """The name of a module of the core, below `tensorway`; empty for the package itself."""
    return ".".join(module.relative_to(SETTINGS.parent).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def is_beside(name):
    return any(f"{name}.".startswith(f"{other}.") for other in BESIDE)


def core_imports(module):
    """What a module imports of the core's dist, also late and for types only, with the names that may be modules."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("tensorway.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("tensorway."):
            home = node.module.removeprefix("tensorway").lstrip(".")
            yield home
            yield from (f"{home}.{alias.name}".lstrip(".") for alias in node.names)


def test_the_core_is_small_and_does_not_know_what_is_beside_it():
    modules = {dotted(module): module for module in MODULES if SETTINGS.parent in module.parents}
    packages = {name.rpartition(".")[0] for name in modules}
    assert [] == [name for name in BESIDE if name not in modules.keys() | packages], "listed, and not there"
    core = {name: module for name, module in modules.items() if not is_beside(name)}
    known = {f"{name} imports {found}" for name, module in core.items() for found in core_imports(module)}
    assert set() == {line for line in known if is_beside(line.rpartition(" ")[2])}
    assert sum(map(code_lines, core.values())) <= CORE_LINES


def test_functions_are_small():
    lengths = dict(functions())
    assert {} == {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= FUNCTION_LINES_P90


#: It starts interpreters in an environment that a test chose; it has the copy of ours from `settings`.
ELSEWHERE = SETTINGS.parent / "testing" / "elsewhere.py"


@modules
def test_only_settings_touches_the_environment(module):
    uses = [use for use in environment_uses(module) if module != ELSEWHERE or not use.endswith("run(env=...)")]
    assert module == SETTINGS or [] == uses


def test_the_search_for_environment_uses_finds_them():
    assert list(environment_uses(SETTINGS))


def late_types(module):
    """Where msgspec learns of a type while it is used: two threads that are first at once crash the process."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Call) and any(
            keyword.arg == "type" and "msgspec" in ast.unparse(node.func) for keyword in node.keywords
        ):
            yield f"{node.lineno}: {ast.unparse(node.func)}(type=...)"
        elif isinstance(node, ast.FunctionDef):
            yield from (
                f"{inner.lineno}: {ast.unparse(inner.func)} in {node.name}"
                for inner in ast.walk(node)
                if isinstance(inner, ast.Call) and ast.unparse(inner.func).startswith("msgspec.")
                if ast.unparse(inner.func).endswith(("Decoder", ".convert"))
            )


#: It converts to whatever type an option of a plugin has, one thread at a time.
CONVERTS = ROOT / "core" / "src" / "tensorway" / "plugins" / "options.py"


@modules
def test_what_msgspec_decodes_to_it_knows_since_the_import(module):
    """`decode(data, type=T)` builds what it knows of T at its first use; see docs/architecture.md."""
    assert module == CONVERTS or [] == list(late_types(module))


def test_the_search_for_late_types_finds_them():
    assert list(late_types(CONVERTS))


@modules
def test_a_module_opens_with_what_it_is_for(module):
    text = ast.get_docstring(parse(module))
    assert text, "no docstring"
    opening = " ".join(text.split("\n\n")[0].split())
    assert len(opening.split()) >= 4, opening
    assert opening.endswith((".", ":")), opening
