"""Links between pages lead somewhere, and no page names the machine that it was written on."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
#: Without what is built of them, and the examples, which are dists with pages of their own.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "examples"} & {*path.parts})
PAGES += sorted(path for path in ROOT.glob("*.md"))
#: Hosts that a page may link to, each with what it is there for.
HOSTS = {
    "json-schema.org": "the standard that schemas.json follows",
    "github.com": "issues of the libraries that we work around",
    "no-color.org": "the convention that the command line follows",
    "pytorch.org": "in output: where to get another build of torch",
    "www.apache.org": "the license",
    "127.0.0.1": "in examples: this host",
    **dict.fromkeys(("prefill-0", "prefill-1", "decode-0", "decode-1"), "in examples: engines"),
}
LINK = re.compile(r"(?<!\!)\[[^\]\n]*\]\(([^)\s]+)\)")
URL = re.compile(r"https?://[^\s)>`'\"]+")
# In pieces, so that no search for them finds this file.
PLACES = re.compile(
    r"(?<![\w.$}~-])/(?:" + "|".join(["wor" + "k", "ro" + "ot", "t" + "mp", "ho" + "me", "Use" + "rs"]) + r")/"
)

pages = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What can stand after `#`: headings as MyST and GitHub spell them, and targets `(name)=`."""
    text = prose(path)
    titles = re.findall(r"^#{1,4} (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.strip().lower().replace("`", "")).replace(" ", "-") for title in titles]
    return set(slugs) | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pages
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    broken = []
    for link in LINK.findall(prose(path)):
        target, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        file = (path.parent / unquote(target)).resolve() if target else path
        if not file.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{link}: no such heading")
    assert [] == broken


@pages
def test_only_known_hosts_are_linked_to(path):
    assert {urlsplit(url).hostname for url in URL.findall(path.read_text("utf-8"))} <= set(HOSTS)


@pages
def test_no_page_names_a_place_of_somebody_s_machine(path):
    assert [] == [match[0] for match in PLACES.finditer(path.read_text("utf-8"))]


def test_the_searches_find_what_they_look_for():
    assert ["a.md#b"] == LINK.findall("see [this](a.md#b) and ![an image](c.png)")
    assert PLACES.search("in '/" + "tmp/x'")
    assert not PLACES.search("/srv/venv/lib and ~/" + "tmp/x")
    assert "how-a-backend-is-chosen" in anchors(ROOT / "docs/hooks/index.md")


def test_every_page_can_be_reached_from_the_front_page():
    toctrees = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    seen, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for tree in toctrees.findall(path.read_text("utf-8")):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            waiting += [path.parent / f"{entry}.md" for entry in entries]
    assert {path for path in PAGES if path.is_relative_to(ROOT / "docs")} == seen
