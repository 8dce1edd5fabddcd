"""Every hook has a page and a test: datasette's two meta-tests, and what an offer holds."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import attrs
import pytest

from tensorway.hookspecs import HOOKS
from tensorway.types import HookContext, Offer

ROOT = Path(__file__).parents[2]

hooks = pytest.mark.parametrize("name", HOOKS)


def signature(name):
    """The literal line that a reader copies."""
    # Annotations are strings in the source, and signatures quote them.
    return f"{name}{inspect.signature(HOOKS[name])}".replace("'", "")


def test_the_signature_is_the_one_that_people_write():
    assert "transport(ctx: HookContext) -> Offer" == signature("transport")


@hooks
def test_a_hook_has_a_page_with_its_heading_and_its_literal_signature(name, page):
    lines = page(f"hooks/{name}.md").text.splitlines()
    assert f"# {name}" == lines[0]
    assert f"    {signature(name)}" in lines, "the signature, as a block of its own"


@hooks
def test_a_page_names_the_entry_point_group_and_says_what_is_constructed(name, page):
    text = page(f"hooks/{name}.md").text
    assert f"Entry-point group: `tensorway.{name}`." in text
    assert "**Constructs** " in text
    assert "**Context**" in text
    assert f"def {name}(ctx: HookContext) -> Offer:" in text, "an example that implements the hook"


def test_the_overview_lists_every_hook_and_nothing_else(page):
    listed = [row[0] for row in page("hooks/index.md").rows(0, "") if row[0].endswith(".md)")]
    assert [f"[`{name}`]({name}.md)" for name in HOOKS] == listed
    assert {f"{name}.md" for name in HOOKS} | {"index.md"} == {path.name for path in (ROOT / "docs/hooks").iterdir()}


@hooks
def test_a_hook_has_a_test_of_its_own(name):
    functions = {
        node.name
        for path in (ROOT / "core" / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert f"test_hook_{name}" in functions


@pytest.mark.parametrize("cls", [Offer, HookContext])
def test_every_field_is_in_the_table_of_its_class(cls, page):
    rows = page("hooks/index.md").rows(2, cls.__name__)
    assert [f"`{field.name}`" for field in attrs.fields(cls)] == [row[0] for row in rows]


def test_the_table_of_offer_has_the_defaults(page):
    shown = {row[0].strip("`"): row[1].strip("`") for row in page("hooks/index.md").rows(2, "Offer")}
    words = {"name": "required", "kind": "required", "summary": "required", "probe": "required"}
    words |= {"options": "NoOptions", "devices": '{"cpu"}', "capabilities": "empty", "probe_in": '"child"'}
    assert words | {"factory": "None", "priority": "50"} == shown
    offer = Offer("x", "transport", "s", probe=print)
    assert (None, {"cpu"}, set(), 50, "child") == (
        offer.factory,
        offer.devices,
        offer.capabilities,
        offer.priority,
        offer.probe_in,
    )
