"""What the page of the rendezvous says in tables is what the code says."""

from __future__ import annotations

import re

from tensorway.cli.rendezvous import METRICS


def test_the_words_of_the_service_are_those_of_the_code(page):
    rows = page("rendezvous.md").rows(2, "What the service counts")
    shown = {name.strip("`"): (kind, re.findall(r"`(\w+)`", labels), what) for name, kind, labels, what, _ in rows}
    assert {name: (each.kind, [*each.labels], each.help) for name, each in METRICS.items()} == shown
    assert all(row[-1] for row in rows), "when to look closer"
