"""The report in a real browser: light and dark, as wide as a desk's window and as narrow as a telephone.

Pictures are left in the folder that TENSORWAY_TEST_PICTURES names, for who wants to look.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from browser import Browser

from tensorway.testing.servers import program
from tensorway_tools.demo.report import page_of
from tensorway_tools.demo.seen import Seen, row

#: What a page is measured with: everything that can be seen of it.
LOOK = """(() => {
  const shown = (node) => { const box = node.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const parse = (text) => { const m = text.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
  const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 :
      ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const under = (node) => { for (let at = node; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor); if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  const worst = { ratio: 99, text: '' }; let texts = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest('svg title, svg desc')) continue;
    const style = getComputedStyle(node), ink = parse(node.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink.slice(0, 3)), light(under(node).slice(0, 3))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); texts += 1;
    if (ratio < worst.ratio) { worst.ratio = ratio; worst.text = walk.currentNode.data.trim(); }
  }
  const over = [...document.body.querySelectorAll('*')].filter((node) => shown(node) && node.closest('svg') === null &&
    (node.getBoundingClientRect().right > innerWidth + 0.5 || node.getBoundingClientRect().left < -0.5)
  ).map((node) => node.outerHTML.slice(0, 80));
  const plots = [...document.querySelectorAll('svg')].filter(shown).map((svg) => {
    const area = svg.querySelector('rect.area').getBoundingClientRect(), all = svg.getBoundingClientRect();
    const outside = [...svg.querySelectorAll('circle')].filter((dot) => { const b = dot.getBoundingClientRect();
      const x = b.x + b.width / 2, y = b.y + b.height / 2;
      return x < area.left - 0.5 || x > area.right + 0.5 || y < area.top - 0.5 || y > area.bottom + 0.5; }).length;
    const boxes = [...svg.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
    const cut = boxes.filter(([, b]) => b.left < all.left - 1 || b.right > all.right + 1 ||
      b.top < all.top - 1 || b.bottom > all.bottom + 1).map(([text]) => text);
    const clash = boxes.flatMap(([one, a], at) => boxes.slice(at + 1).filter(([, b]) => a.left < b.right - 1 &&
      b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3).map(([two]) => [one, two]));
    const said = svg.getAttribute('aria-labelledby').split(' ').map((id) => document.getElementById(id).textContent);
    const lines = [...svg.querySelectorAll('polyline, circle')].map((n) => parse(getComputedStyle(n)
      [n.tagName === 'circle' ? 'fill' : 'stroke'])).map((c) => light(c.slice(0, 3)));
    const paper = light(under(svg.parentElement).slice(0, 3));
    const faint = Math.min(...lines.map((l) => (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05)));
    return { width: all.width, height: all.height, area: area.width * area.height,
      dots: svg.querySelectorAll('circle').length, outside, cut, clash, said, faint,
      size: Math.min(...boxes.map(([, b]) => b.height)) };
  });
  return { worst, texts, over, scroll: document.documentElement.scrollWidth, width: innerWidth, plots,
    paper: light(under(document.body).slice(0, 3)), tables: document.querySelectorAll('figure table').length };
})()"""
VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A real one; it ends with the tests of this module."""
    found = program("chromium", "apt-get install chromium", required="TENSORWAY_TEST_LIBRARY" in os.environ)
    made = Browser(found, tmp_path_factory.mktemp("browser") / "profile")
    yield made
    made.close()


@pytest.fixture
def look(browser):
    """A function that shows a file, and says what is to be seen."""

    def shown(path, scheme, width):
        browser.requests.clear()
        browser.complaints.clear()
        browser.open(path.as_uri(), scheme, width)
        if folder := os.environ.get("TENSORWAY_TEST_PICTURES"):
            browser.screenshot(Path(folder) / f"{path.stem}-{scheme}-{width}.png")
        return browser.evaluate(LOOK)

    return shown


def good(seen, scheme, width):
    """What must hold for any page."""
    assert width == seen["width"] == seen["scroll"]
    assert [] == seen["over"]
    assert 4.5 <= seen["worst"]["ratio"], seen["worst"]
    assert (scheme == "dark") == (seen["paper"] < 0.1)
    for plot in seen["plots"]:
        assert plot["width"] > 300 and plot["height"] > 200 and plot["area"] > 30_000 and plot["dots"]
        assert (0, [], []) == (plot["outside"], plot["cut"], plot["clash"]), plot["said"]
        assert all(plot["said"]) and plot["size"] > 10 and plot["faint"] >= 3


@pytest.mark.parametrize(("scheme", "width"), VIEWS)
def test_the_report_looks_right(look, browser, shown, scheme, width):
    data, path = shown
    seen = look(path, scheme, width)
    good(seen, scheme, width)
    charts = [chart for movement in data["movements"] for chart in movement["charts"]]
    assert len(charts) == len(seen["plots"]) == seen["tables"] and seen["texts"] > 50
    for chart, plot in zip(charts, seen["plots"], strict=True):
        assert sum(len(series["values"]) for series in chart["series"]) == plot["dots"]
        assert chart["title"] == plot["said"][0]
    assert ([path.as_uri()], []) == (browser.requests, browser.complaints)


@pytest.mark.parametrize(("scheme", "width"), VIEWS)
def test_a_report_of_failures_and_long_words_looks_right(look, tmp_path, scheme, width):
    from tensorway.cli.charts import Chart, Series
    from tensorway.cli.demonstration import Ratio, Shown
    from tensorway.errors import PeerLost

    lines = [Series(f"over a-transport-{at} of a long name", (0.5 + at / 50, 0.5 + at / 60)) for at in range(8)]
    charts = (
        Chart("Lines that end beside each other", "size", tuple(lines), up="seconds", places=("1 KiB", "1,024 MiB")),
        Chart("Five powers of ten", "size", (Series("one", (1e-5, 1.0, 3e4)),), up="seconds", log=True),
        Chart("One value", "size", (Series("one", (0.0,)),), joined=False),
    )
    shown = Shown("a" * 60, 2, 1 << 40, False, ("0.00001 x", "b" * 60), "c" * 300, (Ratio("d", "e", 1.0, 2.0),), charts)
    error = PeerLost("A rebalance was to be shown.", f"Process {'9' * 90} ended <b>badly</b>.", "Run it again.")
    seen = [Seen("rebalance", "local", "acme 1.0", error=error), Seen("handover", "local", "acme 1.0", shown)]
    path = tmp_path / "failures.html"
    path.write_text(page_of(fields([row(each) for each in seen]), seen), "utf-8")
    found = look(path, scheme, width)
    good(found, scheme, width)
    assert 3 == len(found["plots"]) and "<b>badly" not in path.read_text("utf-8")


def fields(rows):
    """What a page is made of, beside its movements."""
    machine = {"system": "Linux", "devices": "2 x <Some>", "cores": 2, "memory": 1 << 34, "python": "3.11"}
    return {
        "movements": rows, "machine": machine, "command": "tensorway demo --report " + "f" * 120, "date": "today",
        "chosen": {"transport": "local"}, "dists": {"g" * 90: "1.0"}, "seconds": 1.0, "tensorway": "0.1.0",
    }  # fmt: skip


def test_the_look_finds_what_is_wrong(look, tmp_path):
    """What is measured is measured: a page with every fault has every fault."""
    path = tmp_path / "faults.html"
    path.write_text(
        '<!doctype html><body style="margin:0"><p style="color:#aaa">faint</p><div style="width:2000px">wide</div>'
        '<svg viewBox="0 0 100 50" width="400" height="200" aria-labelledby="t"><title id="t"></title>'
        '<rect class="area" x="0" y="0" width="50" height="20" fill="none"/><circle cx="80" cy="40" r="1" fill="#eee"/>'
        '<text x="95" y="20">cut off</text><text x="0" y="20">one</text><text x="3" y="20">two</text></svg>'
    )
    seen = look(path, "light", 390)
    (plot,) = seen["plots"]
    assert seen["scroll"] > 390 and len(seen["over"]) == 1 and seen["worst"]["text"] == "faint"
    assert (1, ["cut off"], [["one", "two"]], [""]) == (plot["outside"], plot["cut"], plot["clash"], plot["said"])
    assert plot["faint"] < 1.5 and json.dumps(seen)
