"""How one backend and one decision look to a person; shared by `plugins`, `doctor` and `why`.

Room `cli`.
"""

from __future__ import annotations

from typing import Any, Final

from tensorway.cli.output import Output

#: State of a slot -> the word for it, and its color. A slot that was stopped shows its code instead.
_STATES: Final = {
    "declared": ("declared", "dim"),
    "loadable": ("loads", "dim"),
    "usable": ("usable", "good"),
    "constructed": ("usable", "good"),
}


def show_row(out: Output, row: dict[str, Any]) -> None:
    """One backend: a line, and under it what stopped it and what to do."""
    word, style = (row["code"], "bad") if row["code"] else _STATES[row["state"]]
    if word == "usable" and (offer := row.get("offer")) and not offer["constructs"]:
        word = "probe only"  # it works here, and there is nothing to construct yet
    out.line(f"  {row['name']:<12} {out.paint(f'{word:<16}', style)} {row['dist']} {row['version']}")
    out.text(row["reason"], indent=15)
    out.text(f"-> {row['remedy']}" if row["remedy"] else "", indent=15, hang=3)


def show_probe(out: Output, row: dict[str, Any]) -> None:
    """What the probe of a usable backend found."""
    if row["probe"] and row["probe"]["usable"]:
        out.text(row["probe"]["reason"], indent=15)


def show_winner(out: Output, row: dict[str, Any]) -> None:
    """Who wins."""
    request, winner = row["request"], row["winner"]
    if winner is None:
        out.line(f"{request['kind']}: {out.paint('nothing can be used', 'bad')}")
    else:
        out.line(f"{request['kind']}: {out.paint(winner['name'], 'good')} from {winner['dist']}")
        out.text(winner["reason"], indent=2)


def show_decision(out: Output, row: dict[str, Any]) -> None:
    """Who wins and why the others lose."""
    show_winner(out, row)
    for loser in row["losers"]:
        out.text(f"not {loser['name']} ({loser['dist']}): {loser['reason']}", indent=2, hang=4)
        out.text(f"-> {loser['remedy']}" if loser["remedy"] else "", indent=6, hang=3)


def show_complaints(out: Output, rows: list[dict[str, Any]]) -> None:
    """Metadata that could not be used as it is."""
    if rows:
        out.line(out.paint("metadata", "strong"))
    for row in rows:
        out.text(f"{row['dist']}: {row['reason']}", indent=2)
        out.text(f"-> {row['remedy']}", indent=6, hang=3)
