"""`tensorway top`: what the processes of this host that move state are doing now, and what of it is wrong.

Of the dist nothing else imports this package; it may import the core. It looks twice and shows what happened between
the two. Nothing here changes what it looks at.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any, Final

import attrs

from tensorway import settings
from tensorway.cli import exits
from tensorway.cli.arguments import seconds
from tensorway.cli.ending import told_to_end
from tensorway.cli.output import Output
from tensorway.exports import VARIABLE
from tensorway_tools.top import looking
from tensorway_tools.top.looking import Look
from tensorway_tools.top.tables import TABLES, Column, Row, Table, rows

#: Between two looks, and for all to answer.
_INTERVAL: Final = seconds(3600, least=0.05)

#: What a terminal is sent before each picture: to the upper left corner; after it: nothing below.
_HOME: Final = "\x1b[H"
_END_OF_LINE: Final = "\x1b[K"
_REST: Final = "\x1b[J"
_UNITS: Final = ("", "k", "M", "G", "T")
_NAME_WIDTH: Final = 24


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `top` in, exit code out."""
    given = _parser().parse_args(arguments)
    folder = given.folder or (settings.get(VARIABLE) or "").strip()
    for url in given.url:
        looking.target(url)  # what is wrong with it is said now
    once = given.once or out.as_json
    before: dict[str, Look] = {}
    # By a handler and not by KeyboardInterrupt, which Python loses where it comes in the midst of a thread's start.
    with told_to_end() as ended:
        while True:
            seen = _look(folder, given)
            if before or not seen:
                picture = Picture(folder, before, seen)
                _show(picture, out, redraw=not once and out.stream.isatty())
                if not once and not out.stream.isatty():
                    out.line()
                if once:
                    return exits.OK if not picture.there or picture.answering else exits.UNAVAILABLE
            before = {look.source: look for look in seen}
            if ended.wait(given.interval):
                return exits.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tensorway top", description="Show what the processes of this host move now, what hurts first."
    )
    parser.add_argument("--once", action="store_true", help="look twice, show it, and end; --json does so, too")
    parser.add_argument("--interval", type=_INTERVAL, default=1.0, metavar="SECONDS", help="between two looks (1)")
    parser.add_argument("--deadline", type=_INTERVAL, default=1.0, metavar="SECONDS", help="for all to answer (1)")
    parser.add_argument("--folder", default="", metavar="FOLDER", help=f"where their sockets are ({VARIABLE})")
    parser.add_argument(
        "--pid", type=int, action="append", default=[], help="only this process; several times for more"
    )
    parser.add_argument("--url", action="append", default=[], help="a Prometheus endpoint; several times for more")
    return parser


def _look(folder: str, given: argparse.Namespace) -> list[Look]:
    paths = looking.sockets(folder, given.pid) if folder else []
    return looking.look(paths, given.url, given.deadline)


@attrs.frozen
class Picture:
    """What two looks say."""

    folder: str
    before: dict[str, Look]
    seen: list[Look]

    @property
    def answering(self) -> list[Look]:
        """Those that answered."""
        return [look for look in self.seen if look.state == "answers"]

    @property
    def there(self) -> list[Look]:
        """Those that are there, whatever they say: who is gone has only left its socket. The silent ones first."""
        order = {"silent": 0, "refused": 1, "answers": 2}
        return sorted((look for look in self.seen if look.state != "gone" or look.source.startswith("http")),
                      key=lambda look: (order.get(look.state, 1), look.pid))  # fmt: skip

    def tables(self) -> list[tuple[Table, list[Row]]]:
        """All that have a row."""
        made = [(table, rows(table, self.before, self.answering)) for table in TABLES]
        return [(table, found) for table, found in made if found]

    def fields(self) -> dict[str, Any]:
        """All of it, as JSON."""
        tables: dict[str, Any] = {table.name: [] for table in TABLES}
        for table, found in self.tables():
            tables[table.name] = [
                {"source": row.source, "pid": row.pid, **dict(zip(table.labels, row.labels, strict=True)),
                 **row.values, "hurts": list(row.hurts)}
                for row in found
            ]  # fmt: skip
        processes = [
            {"source": look.source, "pid": look.pid, "command": look.command, "state": look.state, "why": look.why,
             "seconds": _between(self.before.get(look.source), look), "failing": _failing(look)}
            for look in self.there
        ]  # fmt: skip
        return {"folder": self.folder, "left_over": len(self.seen) - len(self.there), "processes": processes, **tables}


def _between(before: Look | None, now: Look) -> float | None:
    """Seconds from one look to the other; None where there were not both."""
    return round(now.at - before.at, 3) if before is not None and before.at and now.at else None


def _failing(look: Look) -> list[str]:
    """Sources of a process that raise when they are asked."""
    down = [dict(labels) for (name, labels), up in look.values.items() if name == "source_up" and not up]
    return [labels.get("source", "?") for labels in down]


def _show(picture: Picture, out: Output, *, redraw: bool) -> None:
    out.json("tensorway.top/1", picture.fields())
    if out.as_json:
        return
    lines = _lines(picture, out)
    if not redraw:
        for line in lines:
            out.line(line)
        return
    width, height = shutil.get_terminal_size()
    kept = lines[: max(1, height - 1)]
    shown = "\n".join(_fitted(line, width) + _END_OF_LINE for line in kept)
    out.stream.write(f"{_HOME}{shown}\n{_REST}")
    out.stream.flush()


def _fitted(line: str, width: int) -> str:
    """As much as fits; a line with color is short enough, or loses it."""
    plain = line.replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
    return line if len(plain) <= width else plain[:width]


def _lines(picture: Picture, out: Output) -> list[str]:
    if not picture.there:
        where = f"No process has a socket in {picture.folder}." if picture.folder else f"{VARIABLE} is not set here."
        how = "Set it to the same folder where processes start and here, or give --folder or --url:"
        return [where, how, f"  export {VARIABLE}=$XDG_RUNTIME_DIR/tensorway"]
    there, answering = picture.there, picture.answering
    left = len(picture.seen) - len(there)
    past = f", {left} sockets of processes that are gone" if left else ""
    lines = [f"{len(answering)} of {len(there)} processes answer{past}", ""]
    lines.append(out.paint(f"{'PID':>8}  {'STATE':<8}  PROCESS", "strong"))
    for look in there:
        why = f": {look.why}" if look.why else ""
        failing = f"; these raise when they are asked: {', '.join(_failing(look))}" if _failing(look) else ""
        text = f"{look.pid or '-':>8}  {look.state:<8}  {look.command or look.source}{why}{failing}"
        lines.append(out.paint(text, "bad") if look.why or failing else text)
    for table, found in picture.tables():
        lines += ["", *_table(table, found, out)]
    return lines


def _table(table: Table, found: list[Row], out: Output) -> list[str]:
    """The head, and a line for each row; columns in which nothing is are left out."""
    columns = [column for column in table.columns if any(row.values[column.field] for row in found) or not column.hurts]
    names = [_names(row) for row in found]
    width = max(len(table.title), *map(len, names))
    heads = [_head(column) for column in columns]
    lines = [out.paint(f"{'PID':>8}  {table.title:<{width}}" + "".join(f"  {head:>9}" for head in heads), "strong")]
    for row, name in zip(found, names, strict=True):
        text = f"{row.pid or '-':>8}  {name:<{width}}"
        for column, head in zip(columns, heads, strict=True):
            cell = f"  {_cell(row.values[column.field], column):>{max(9, len(head))}}"
            text += out.paint(cell, "bad") if column.key in row.hurts else cell
        lines.append(text)
    return lines


def _names(row: Row) -> str:
    """Its labels; the end of a name says more than its beginning."""
    parts = [part if len(part) <= _NAME_WIDTH else f"..{part[-_NAME_WIDTH + 2 :]}" for part in row.labels if part]
    return " ".join(parts) or "-"


def _head(column: Column) -> str:
    unit = "B" if column.form == "bytes" else ""
    name = column.key.removesuffix("_bytes").removesuffix("bytes")
    return f"{name} {unit}/s".strip() if column.mode == "rate" else column.key


def _cell(value: float | None, column: Column) -> str:
    if value is None:
        return "-"
    if column.form == "seconds":
        return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{0 if value == int(value) or value >= 100 else 1}f}{_UNITS[power]}"
