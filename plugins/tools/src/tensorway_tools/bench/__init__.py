"""`tensorway bench`: measures what is installed, beside references of the same minute, and compares such results.

Of the dist nothing else imports this package; it may import the core. What is measured is brought by dists, see
`tensorway_tools.benchmark`.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tensorway.cli import brought, exits, reports
from tensorway.cli.arguments import seconds
from tensorway.cli.ending import ended_in_order
from tensorway.errors import BackendNotFound, TensorwayError
from tensorway.plugins import host
from tensorway_tools.bench import results
from tensorway_tools.bench.results import BenchResult, Results
from tensorway_tools.machine import this_machine

if TYPE_CHECKING:
    from tensorway.cli.output import Output
    from tensorway.plugins.scan import Declaration

#: How long one benchmark may take.
_DEADLINE: Final = seconds(86_400, least=1)


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `bench` in, exit code out."""
    given = _parser().parse_args(arguments)
    match given.action:
        case "list":
            return _list(out)
        case "run":
            return _run(given, out)
        case "compare":
            return _compare(given.before, given.now, out)
        case _:
            return _plot(given.files, given.output, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tensorway bench", description="Measure what is installed, and compare.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text)

    action("list", "Say what can be measured here, and who brings it.")
    run = action("run", "Measure, in processes of their own, and write a file of results.")
    run.add_argument("names", nargs="*", metavar="NAME", help="these only (default: all that are installed)")
    run.add_argument("--short", action="store_true", help="few rounds of little: to see that it works")
    run.add_argument("--processes", type=_count, metavar="N", help="of each benchmark (default: 3, or 1 with --short)")
    run.add_argument("--deadline", type=_DEADLINE, default=900.0, metavar="SECONDS", help="for each benchmark (900)")
    run.add_argument("--output", type=Path, default=Path("bench.json"), metavar="FILE", help="results (bench.json)")
    compare = action("compare", "Say what has changed from one file of results to another, beyond noise.")
    compare.add_argument("before", type=Path, metavar="BEFORE")
    compare.add_argument("now", type=Path, metavar="NOW")
    plot = action("plot", "Draw files of results, side by side.")
    plot.add_argument("files", type=Path, nargs="+", metavar="FILE")
    plot.add_argument("--output", type=Path, default=Path("bench.html"), metavar="PAGE", help=".html, or .png")
    return parser


def _count(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError("from 1 to 100")
    return int(text)


def _installed() -> list[Declaration]:
    """Benchmarks that may be used, by name; of two of one name, which nobody can tell apart, `declared` complains."""
    rows = {row.name: row for row in host().benches if not host().left_out(row)}
    return [rows[name] for name in sorted(rows)]


def _named(names: list[str]) -> list[Declaration]:
    asked = "Benchmarks were to be run."
    if not names:
        if not (rows := _installed()):
            raise BackendNotFound(
                asked, "Nothing that is installed brings one.", 'pip install "tensorway[nixl,offload]"'
            )
        return rows
    known = ", ".join(row.name for row in _installed()) or "none"
    for name in names:
        if all(row.name != name for row in host().benches):
            true = f"Nothing that is installed brings {name!r}. Installed: {known}."
            raise BackendNotFound(asked, true, "See tensorway bench list, or install the dist that brings it.")
    return [brought.declared(host().benches, name, asked, extra=name) for name in dict.fromkeys(names)]


def _summary(row: Declaration) -> tuple[str, str]:
    """What it says of itself; or why it cannot be asked."""
    from tensorway_tools.benchmark import Benchmark

    try:
        found = brought.loaded(row, f"The benchmark {row.name!r} was to be described.")
    except TensorwayError as error:
        return "", error.true
    return (found.summary, "") if isinstance(found, Benchmark) else ("", "It is no Benchmark.")


def _list(out: Output) -> int:
    rows = [(row, *_summary(row)) for row in _installed()]
    fields = [
        {"name": row.name, "dist": row.dist, "version": row.version, "summary": summary, "problem": problem}
        for row, summary, problem in rows
    ]
    out.json("tensorway.bench-list/1", {"benchmarks": fields})
    width = max((len(row.name) for row, _, _ in rows), default=0)
    for row, summary, problem in rows:
        out.line(f"{row.name:<{width}}  {row.dist} {row.version}")
        out.text(problem or summary, indent=width + 2)
    if not rows:
        out.text("Nothing that is installed brings a benchmark.")
    return exits.BROKEN if any(problem for _, _, problem in rows) else exits.OK


@ended_in_order()
def _run(given: argparse.Namespace, out: Output) -> int:
    from tensorway_tools.bench import running

    rows = _named(given.names)
    processes = given.processes or (1 if given.short else 3)
    reports.writable(given.output, "--output")
    load = os.getloadavg()[0]
    found = []
    for row in rows:
        summary, problem = _summary(row)
        if problem:
            found.append(BenchResult(row.name, row.dist, row.version, summary, "failed", problem, 0.0, []))
        else:
            deadline = given.deadline
            found.append(
                running.run(row, summary, short=given.short, processes=processes, deadline=deadline, tell=out.progress)
            )
        _show(found[-1], out)
    answer = Results(
        results.SCHEMA, this_machine(), results.versions(row.dist for row in rows),
        results.Options(given.short, processes), (round(load, 2), round(os.getloadavg()[0], 2)), found,
    )  # fmt: skip
    results.write(given.output, answer)
    fields: dict[str, Any] = msgspec.to_builtins(answer)
    out.json(fields.pop("schema"), fields)
    cores = answer.machine.cores
    out.text(
        f"Results: {given.output}. The load was {answer.load[0]:g}, and {answer.load[1]:g} after, on {cores} cores."
    )
    if any(each.state == "failed" for each in found):
        return exits.BROKEN
    return exits.OK if any(each.state == "measured" for each in found) else exits.UNAVAILABLE


def _show(result: BenchResult, out: Output) -> None:
    """Ratios first."""
    from tensorway_tools.bench import running

    out.line(out.paint(f"{result.name} ({result.dist} {result.version})", "strong"))
    for row in result.rows:
        out.text(running.shown(row), indent=2, hang=2)
    if result.state != "measured":
        how = "not measured here" if result.state == "cannot" else "failed"
        out.text(f"{how}: {result.why}", indent=2, hang=2)
    out.line()


def _compare(before: Path, now: Path, out: Output) -> int:
    from tensorway_tools.bench import comparing

    found = comparing.compare(results.read(before), results.read(now))
    fields = [
        {"benchmark": change.benchmark, "row": change.row, "to": change.now.to, "before": change.before.median,
         "now": change.now.median, "factor": change.factor if math.isfinite(change.factor) else None,
         "noise": change.noise, "verdict": change.verdict}
        for change in found.changes
    ]  # fmt: skip
    code = exits.UNAVAILABLE if found.differs or not found.changes else exits.BROKEN if found.slower else exits.OK
    out.json("tensorway.bench-compare/1", {
        "comparable": not found.differs, "differs": found.differs, "versions": found.versions, "rows": fields,
        "only_before": found.only_before, "only_now": found.only_now, "exit_code": code,
    })  # fmt: skip
    styles = {"slower": "bad", "faster": "good"}
    for change in found.changes:
        text = f"{change.benchmark}: {change.row}"
        ratios = f"{_factor(change.before.median)} -> {_factor(change.now.median)} times {change.now.to}"
        verdict = out.paint(f"{change.verdict:<8}", styles.get(change.verdict, "dim"))
        out.line(f"{verdict} x {_factor(change.factor)} (noise up to x {_factor(change.noise)})  {text}: {ratios}")
    for what, lines in (
        ("Not comparable", found.differs), ("What else differs", found.versions),
        ("Only before", found.only_before), ("Only now", found.only_now),
    ):  # fmt: skip
        if lines:
            out.text(f"{what}: {'; '.join(lines)}.", hang=2)
    slower = f"{len(found.slower)} slower than noise explains" if found.changes else "No row is in both"
    out.line(f"{slower}, of {len(found.changes)} rows.")
    return code


def _factor(value: float) -> str:
    """For people; a factor of hundreds of digits tells them no more than its power."""
    return "?" if math.isinf(value) else f"{value:.3f}" if value < 1e6 else f"{value:.3g}"


def _plot(files: list[Path], output: Path, out: Output) -> int:
    from tensorway.cli.charts import draw, drawable
    from tensorway_tools.bench.plotting import charts

    drawable(output, "--output")
    read = [results.read(path) for path in files]
    draw(output, "Benchmarks of Tensorway", charts([path.stem for path in files], read), "--output")
    out.json("tensorway.bench-plot/1", {"page": str(output)})
    out.line(f"Drawn in {output}.")
    return exits.OK
