"""The report: one page of HTML of what a run has shown, with every figure beside what it is a ratio to.

May import the core's pages, and this package. It says what `--json` says, and draws it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tensorway.cli.pages import figure, page
from tensorway_tools.demo.seen import NAMES, Seen, charts_of

_STYLE: Final = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--card); border-radius: 8px; padding: .9rem 1rem; } .card h2 { margin: 0; font-size: .95rem;
        font-weight: 600; } .card p { margin: 0; font-size: .875rem; }
.card .big { font-size: 1.6rem; font-weight: 600; line-height: 1.3; white-space: nowrap; margin-top: .2rem; }
.good { color: var(--c2); } .bad { color: var(--c6); font-weight: 600; }
ul { margin: .5rem 0; padding-left: 1.2rem; } dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1.2rem;
        font-size: .875rem; margin: .6rem 0; } dt { color: var(--soft); } dd { margin: 0; }
code { font: .875em/1.5 ui-monospace, monospace; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""
_STATES: Final = {
    "right": "every byte is right",
    "wrong": "not every byte is right",
    "failed": "failed",
    "missing": "not installed, or nothing to move over",
    "unsupported": "this transport cannot",
}


def page_of(fields: dict[str, Any], seen: Sequence[Seen]) -> str:
    """The page; `fields` is what `--json` says, and `seen` what it was made of."""
    rows: list[dict[str, Any]] = fields["movements"]
    right = sum(row["state"] == "right" for row in rows)
    lede = (
        "Rebalance, hand over, offload: three movements of the state of LLM inference, between real processes of one "
        f"machine. {'All' if right == len(rows) else f'{right} of'} {len(rows)} were shown with every byte right."
    )
    parts = [f'<p class="soft">{html.escape(lede)}</p>', '<div class="cards">', *map(_card, rows), "</div>"]
    number = 0
    for name in dict.fromkeys(row["movement"] for row in rows):
        own = [row for row in rows if row["movement"] == name]
        parts += [f"<h2>{_title(name)}</h2>", *_said(own)]
        for chart in charts_of([each for each in seen if each.movement == name]):
            parts.append(figure(chart, number))
            number += 1
    return page("Tensorway demo", [*parts, *_made(fields)], _STYLE)


def _card(row: dict[str, Any]) -> str:
    """The one figure of a movement, and whether it is to be believed."""
    lines = [f"<h2>{_title(row['movement'])}</h2>"]
    if row["headline"]:
        value, what = row["headline"]["value"], row["headline"]["what"]
        moved = f"{row['bytes'] / (1 << 20):.1f} MiB between {row['processes']} processes"
        if row["processes"] == 1:
            moved = f"{row['bytes'] / (1 << 20):.1f} MiB in one process"
        what = f"the time of {what}" if value.endswith(" x") else what
        lines.append(f'<p class="big">{_typeset(value)}</p><p>{html.escape(what)}</p>')
        lines.append(f'<p class="soft">{html.escape(row["over"])}, {moved}</p>')
    style = "good" if row["state"] == "right" else "bad"
    lines.append(f'<p class="{style}">{_STATES[row["state"]]}</p>')
    return f'<section class="card">{"".join(lines)}</section>'


def _said(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What a movement has shown, its ratios first; or the three lines of why it has not."""
    for row in rows:
        if row["error"]:
            lines = "<br>".join(html.escape(row["error"][line]) for line in ("asked", "true", "to_do"))
            yield f'<p class="bad">{html.escape(row["error"]["error"])}</p><p>{lines}</p>'
    ratios = "".join(
        f"<li>{html.escape(ratio['what'] + by)}: <b>{ratio['ratio']:g} &times;</b> the time of "
        f"{html.escape(ratio['beside'])}</li>"
        for row in rows
        for by in [f", over {row['over']}" if len(rows) > 1 else ""]
        for ratio in row["ratios"]
    )
    texts = dict.fromkeys(row["text"] for row in rows if row["text"])
    yield "".join(f"<p>{_typeset(text)}</p>" for text in texts)
    yield f"<ul>{ratios}</ul>" if ratios else ""


def _made(fields: dict[str, Any]) -> Iterable[str]:
    """On what, with what, when."""
    machine = fields["machine"]
    rows = {
        "command": f"<code>{html.escape(fields['command'])}</code>",
        "date": html.escape(fields["date"]),
        "machine": html.escape(
            f"{machine['devices']}; {machine['cores']} cores for this process, {machine['memory'] / (1 << 30):.1f} GiB"
        ),
        "system": html.escape(f"{machine['system']}, Python {machine['python']}"),
        "chosen by auto": html.escape(", ".join(f"{kind} {name}" for kind, name in fields["chosen"].items())),
        "versions": html.escape(", ".join(f"{dist} {version}" for dist, version in fields["dists"].items())),
        "took": f"{fields['seconds']:g} s",
    }
    yield "<h2>How this was made</h2>"
    yield "<p>Times are medians of this one run, each beside something that was measured in the same minute; on another"
    yield "machine only the ratios mean anything. A rebalance and blocks that are offloaded are compared byte by byte,"
    yield "a hand-over by the tokens that follow, which depend on every byte.</p>"
    yield f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in rows.items())}</dl>"


def _title(movement: str) -> str:
    return NAMES[movement].capitalize()


def _typeset(text: str) -> str:
    """What is for a terminal as a page has it."""
    return re.sub(r"(?<=\d) x\b", " &times;", html.escape(text).replace("-&gt;", "&rarr;"))
