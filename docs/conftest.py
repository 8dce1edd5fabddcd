"""Runs what the pages show: every Python block, every console block, every TOML and JSON block, every named file.

The Python blocks of a page share one namespace, its console blocks one shell (folder, variables, last exit status) that
starts in a copy of the checkout. `tensorway` there is the one of the interpreter that runs the tests, until the page
activates an environment of its own.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import shutil
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
_spec = importlib.util.spec_from_file_location("following", Path(__file__).with_name("following.py"))
following = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(following)
#: Seconds for one command; below pytest's own limit, so that the message tells which command it was.
DEADLINE = 280
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
    return following.run_block(example.namespace["_shell"], example.parsed)


class PageShell(following.Shell):
    """A shell that starts in a copy of the checkout, and compares JSON with the schemas that are documented."""

    def __init__(self, folder):
        super().__init__(folder, ROOT, DEADLINE)

    def told(self, command, output):
        if re.search(r"^tensorway .*--json", command):
            valid(json.loads(output[output.index("{\n") :]))


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
    yield PageShell(folder)
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
    excludes=["_build/*", "examples/*", following.WITH_VLLM],
    fixtures=["_shell", "_fresh_host"],
    setup=lambda namespace: namespace.update(__name__="__main__"),
).pytest()
