"""Charts of files of results: for each benchmark one, rows from left to right, a point for each file.

Of the package `bench` the command imports this; it may import `results` and the core's charts.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorway.cli.charts import Chart, Series
from tensorway.errors import OptionsInvalid
from tensorway_tools.bench.results import Results, RowResult


def charts(names: Sequence[str], files: Sequence[Results]) -> list[Chart]:
    """Ratios, in the order of the first file; of rows that all files have, since a chart has no holes."""
    by_file = [{(bench.name, row.name): row for bench in each.benchmarks for row in bench.rows} for each in files]
    shared: dict[tuple[str, str], dict[str, list[RowResult]]] = {}
    for benchmark, name in by_file[0]:
        rows = [rows[benchmark, name] for rows in by_file if (benchmark, name) in rows]
        if len(rows) == len(files) and len({row.to for row in rows}) == 1:
            shared.setdefault((benchmark, rows[0].to), {})[name] = rows
    if not shared:
        raise OptionsInvalid(
            "Results were to be drawn.", "The files have no row in common.", "Give files that were measured alike."
        )
    labels = [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]
    return [
        Chart(
            f"{benchmark}: times {to}",
            "what was measured",
            tuple(Series(label, tuple(rows[at].median for rows in found.values())) for at, label in enumerate(labels)),
            tuple(found),
            up="median ratio; less is better",
            joined=False,
        )
        for (benchmark, to), found in shared.items()
    ]
