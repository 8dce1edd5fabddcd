"""Fixtures of the tests that compare pages with code: a folder of dists that never saw pip, and pages by section."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import attrs
import pytest

from tensorway import _logging
from tensorway.plugins import scan
from tensorway.plugins.host import Host
from tensorway.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"

#: A plugin module that works; tests replace parts of it.
GOOD = """
import attrs
from tensorway import Offer, ProbeResult

@attrs.frozen
class Options:
    deadline: float = 30.0

class Backend:
    def __init__(self, options, context): pass
    def close(self): pass

def probe():
    return ProbeResult.passed("it works")

def transport(ctx):
    return Offer("acme", "transport", "A test.", probe=probe, factory=Backend, options=Options)
"""


@attrs.define
class Site:
    """A site folder under construction; the catalogue calls it /srv/venv/lib."""

    path: Path

    def dist(
        self, name="acme", entries="[tensorway.transport]\nacme = acme:transport", api="1", version="1.0", where=""
    ):
        """Write the metadata of a dist; returns its folder."""
        info = self.path.with_name(where or self.path.name) / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n", "utf-8")
        declared = f"[tensorway.api]\n{api} = {name}\n" if api else ""
        (info / "entry_points.txt").write_text(f"{declared}{entries}\n", "utf-8")
        return info

    def module(self, source=GOOD, name="acme"):
        """Write a module."""
        (self.path / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")

    def scan(self):
        """What discovery finds here."""
        folders = [str(folder) for folder in sorted(self.path.parent.iterdir())]
        return scan.scan(lambda: scan._metadata().distributions(path=folders))

    def host(self, **settings):
        """A host that sees this folder."""
        return Host(self.scan(), Settings(**settings))

    def harmless(self, text):
        """Text with the place that the page names instead of this test's own."""
        return text.replace(str(self.path.parent), "/srv/venv")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site folder; what it holds can be imported in this process."""
    folder = tmp_path / "venv" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder))
    _logging.forget()
    yield Site(folder)
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
    _logging.forget()


@attrs.frozen
class Page:
    """One page by its headings."""

    path: Path

    @property
    def text(self):
        """The whole page."""
        return self.path.read_text("utf-8")

    def sections(self, level):
        """Heading -> text up to the next heading of the same level or above, outside of fences."""
        found, title, fenced = {}, None, False
        for line in self.text.splitlines():
            fenced ^= line.startswith("```")
            heading = None if fenced else re.match(r"(#+) (.+)", line)
            if heading and len(heading[1]) <= level:
                title = heading[2].strip("`") if len(heading[1]) == level else None
                found.setdefault(title, "")
            elif title is not None:
                found[title] += f"{line}\n"
        found.pop(None, None)
        return found

    def rows(self, heading_level, heading):
        """The rows of the table under a heading (or on the whole page, for level 0), without its head."""
        text = self.sections(heading_level)[heading] if heading_level else self.text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.fixture
def page():
    """A page by its name below docs/."""
    return lambda name: Page(DOCS / name)
