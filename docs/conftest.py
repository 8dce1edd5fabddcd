"""Runs what the pages show: every Python block, every console block, every TOML and JSON block, every named file.

The Python blocks of a page share one namespace, its console blocks one shell (folder, variables, last exit status) that
starts in a copy of the checkout. `tensorway` there is the one of the interpreter that runs the tests, until the page
activates an environment of its own.
"""

from __future__ import annotations

import difflib
import doctest
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import tomllib
import yaml
from sybil import Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract import AbstractCodeBlockParser, DocTestStringParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.parsers.myst.lexers import DirectiveLexer

from tensorway import _logging, cli, platforms, plugins

ROOT = Path(__file__).resolve().parents[1]
#: What a reader has after cloning, as far as the pages use it.
CHECKOUT = ("core", "plugins", "constraints.txt", "pyproject.toml", "LICENSE")
#: Seconds for one command; below pytest's own limit, so that the message tells which command it was.
DEADLINE = 100
#: The pages show what tensorway says where no library is installed.
LIBRARIES = ("torch", "mooncake", "nixl_cu12", "nixl_cu13", "nixl_rocm", "redis", "rixl")
#: And where there is no accelerator. Nobody can take one out, so where there is one, console blocks are skipped.
ACCELERATORS = ("cuda", "rocm", "xpu")
#: Of the core's commands, and of those that dists bring.
SCHEMAS = {
    name: schema
    for package in (
        "tensorway_eplb.command",
        "tensorway_offload.command",
        "tensorway_tools.bench",
        "tensorway_tools.demo",
        "tensorway_tools.top",
        "tensorway_vllm",
        "tensorway.cli",
    )
    for name, schema in json.loads((resources.files(package) / "schemas.json").read_text("utf-8"))["$defs"].items()
}

# The shell's own words around each command: where it starts, and what it leaves behind for the next.
WRAPPER = """\
(exit {status})
{command}
__status=$?
pwd > "{state}/folder"
env -0 > "{state}/environment"
exit $__status
"""


class Shell:
    """What a reader's terminal remembers between two commands."""

    def __init__(self, folder):
        self.state = folder / "state"
        self.state.mkdir()
        self.folder = folder / "tensorway"
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        self.folder.mkdir()
        for name in CHECKOUT:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, self.folder / name, **({"ignore": left_out} if source.is_dir() else {}))
        foreign = ("TENSORWAY_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "COLUMNS", "COV_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment |= {"TERM": "dumb", "LC_ALL": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.status = 0

    def run(self, command):
        """Run one command as bash would at a prompt; returns what it printed, both streams together."""
        script = WRAPPER.format(status=self.status, command=command, state=self.state)
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return f"{output}\n(killed: no end after {DEADLINE} s)"
        self.status = process.returncode
        self.folder = Path((self.state / "folder").read_text().rstrip("\n"))
        pairs = (self.state / "environment").read_text().split("\0")
        self.environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return output


def commands(source):
    """The commands of a console block, each with what the page says that it prints.

    `$ ` starts a command, `> ` continues it, everything else is output.
    """
    found = []
    for line in source.splitlines():
        if line.startswith("$ "):
            found.append([line[2:], []])
        elif line.startswith("> ") and found and not found[-1][1]:
            found[-1][0] += f"\n{line[2:]}"
        elif found:
            found[-1][1].append(line)
        else:
            raise ValueError(f"a console block starts with a command, not with {line!r}")
    return [(command, "\n".join(lines)) for command, lines in found]


def matches(expected, actual):
    """Whether output is as shown: `...` within a line stands for anything there, on a line of its own for any lines."""
    pattern = ""
    for line in expected.splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("..."))) + r"[ \t]*\n"
    return re.fullmatch(pattern, actual if actual.endswith("\n") or not actual else f"{actual}\n") is not None


def problem(command, expected, actual):
    """The text of a failure: what is shown, what was printed, and where they differ."""
    lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "on the page", "printed", lineterm="")
    return "\n".join(["Printed:", actual, "", f"$ {command}", *lines])


def valid(document):
    """Check one JSON answer of the command line against its schema."""
    jsonschema.validate(
        document,
        SCHEMAS[document["schema"]] | {"$defs": SCHEMAS},
        cls=jsonschema.Draft202012Validator,
    )


def run_console(example):
    """Run the commands of a block; a status other than 0 must be shown by `echo $?` right after."""
    if present := [kind for kind in ACCELERATORS if platforms.report(kind).evidence]:
        pytest.skip(f"the pages show a machine without an accelerator, and here is something of {present[0]}")
    shell = example.namespace["_shell"]
    shown = commands(example.parsed)
    for number, (command, expected) in enumerate(shown):
        actual = shell.run(command)
        if not matches(expected, actual):
            return problem(command, expected, actual)
        following = shown[number + 1][0] if number + 1 < len(shown) else ""
        if shell.status != 0 and following != "echo $?":
            return f"$ {command}\nended with {shell.status}, and the page does not say so\n{actual}"
        if re.search(r"^tensorway .*--json", command):
            valid(json.loads(actual[actual.index("{\n") :]))
    return None


def parse_toml(example):
    """A TOML block is TOML."""
    tomllib.loads(example.parsed)


def parse_json(example):
    """A JSON block is JSON, and valid if it is an answer of the command line."""
    document = json.loads(example.parsed)
    if str(document.get("schema", "")).startswith("tensorway."):
        valid(document)


def parse_yaml(example):
    """A YAML block is YAML, and the command line takes every `command` of ours in it."""
    for node in _mappings(yaml.safe_load(example.parsed)):
        program, *arguments = node.get("command", [""])
        if program == "tensorway":
            cli._parser().parse_args(arguments)


def _mappings(node):
    if isinstance(node, dict):
        yield node
    for below in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _mappings(below)


def told(evaluator):
    """The same evaluator with exceptions as text: Sybil 10 cannot show one that was raised from another."""

    def evaluate(example):
        try:
            return evaluator(example)
        except Exception as error:
            return "".join(traceback.format_exception(error))

    return evaluate


class FenceParser(AbstractCodeBlockParser):
    """A fence of one language. Sybil's own parser would take the files below as well."""

    def __init__(self, language, evaluator):
        mapping = {"language": "arguments", "source": "source"}
        super().__init__([FencedCodeBlockLexer(r"\w+", mapping)], language, told(evaluator))


class PythonParser:
    """A Python fence, which is a session if it starts with a prompt."""

    def __init__(self):
        self.fences = FenceParser("python", PythonEvaluator())
        self.session = DocTestStringParser(DocTestEvaluator(doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE))

    def __call__(self, document):
        for fence in self.fences(document):
            if fence.parsed.startswith(">>>"):
                for line in self.session(fence.parsed, document.path):
                    line.adjust(fence, fence.parsed)
                    yield line
            else:
                yield fence


class FileParser(AbstractCodeBlockParser):
    """A block with a caption is a file of that name: it is written into the shell's folder, over what is there."""

    def __init__(self):
        super().__init__([DirectiveLexer("code-block")], language="code-block", language_lexeme_name="directive")

    def evaluate(self, example):
        options = example.region.lexemes["options"]
        path = example.namespace["_shell"].folder / options["caption"]
        if not path.parent.is_dir():
            return f"{options['caption']}: there is no such folder"
        text = str(example.parsed)
        if path.suffix == ".py":
            compile(text, str(path), "exec")
        path.write_text(text, "utf-8")
        return None


@pytest.fixture(scope="module", name="_shell")
def shell_of_the_page(tmp_path_factory):
    """A terminal for one page."""
    if present := [name for name in LIBRARIES if find_spec(name)]:
        pytest.fail(f"the pages are tested without libraries, and {present[0]} is installed")
    folder = tmp_path_factory.mktemp("page")
    yield Shell(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", name="_fresh_host")
def host_of_the_page():
    """A plugin host for one page, which finds what is installed."""
    before, plugins._host = plugins._host, None
    _logging.forget()
    yield
    plugins._host = before


pytest_collect_file = Sybil(
    parsers=[
        PythonParser(),
        FenceParser("console", run_console),
        FenceParser("toml", parse_toml),
        FenceParser("json", parse_json),
        FenceParser("yaml", parse_yaml),
        FileParser(),
    ],
    patterns=["*.md"],
    excludes=["_build/*"],
    fixtures=["_shell", "_fresh_host"],
    setup=lambda namespace: namespace.update(__name__="__main__"),
).pytest()
