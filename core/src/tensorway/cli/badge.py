"""A badge for a README, made of a conformance report: what was checked, with which kit, and what came of it.

Room `cli`. Pure: a report in, a text out. `.svg` is a picture, `.json` what shields.io takes for an endpoint. It says
no more than the report does: a skip is counted apart, and where only the offer was checked it says that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any, Final

#: By the exit code of the check, and whether suites were left out.
_GOOD, _PART, _BAD = "#1f7a3a", "#8a6100", "#b3261e"
#: Pixels of one letter at 11 px, and around a text.
_LETTER, _MARGIN = 6.6, 12
#: What a badge can be, by the end of its file's name.
KINDS: Final = (".svg", ".json")
_SVG: Final = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" width="$width" height="20" role="img" aria-label="$label: $message">
<title>$title</title>
<rect width="$width" height="20" rx="3" fill="#444"/>
<path d="M$left 0h${right}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3H${left}z" fill="$color"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="6" y="14" textLength="$label_width">$label</text>
<text x="$message_x" y="14" textLength="$message_width">$message</text>
</g>
</svg>
""")


def badge(report: Mapping[str, Any], kind: str) -> str:
    """The badge of one of `KINDS`."""
    label, message = f"tensorway {report['kind']}", _message(report)
    failed = report["exit_code"] != 0
    color = _BAD if failed else _PART if report["left_out"] else _GOOD
    if kind == ".json":
        fields = {"schemaVersion": 1, "label": label, "message": message, "color": color, "isError": failed}
        return json.dumps(fields, indent=2) + "\n"
    widths = round(len(label) * _LETTER), round(len(message) * _LETTER)
    left = widths[0] + _MARGIN
    words = {"label": label, "message": message, "title": _title(report), "color": color}
    numbers = {"left": left, "right": widths[1] + _MARGIN - 3, "width": left + widths[1] + _MARGIN}
    numbers |= {"label_width": widths[0], "message_width": widths[1], "message_x": left + 6}
    return _SVG.substitute({**{name: escape(text) for name, text in words.items()}, **numbers})


def _message(report: Mapping[str, Any]) -> str:
    totals = report["totals"]
    counted = [f"{totals[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if totals[outcome]]
    only = "offer only, " if report["left_out"] else ""
    return f"{only}{', '.join(counted) or 'nothing passed'}, kit {report['tensorway']}"


def _title(report: Mapping[str, Any]) -> str:
    """What a badge has no room for, and a pointer that rests on it shows."""
    capabilities = ", ".join(report["capabilities"]) or "none beyond the minimum"
    return (
        f"{report['kind']} {report['name']} from {report['dist']} {report['version']}, {report['date'][:10]}; "
        f"capabilities: {capabilities}"
    )
