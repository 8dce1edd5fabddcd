"""What became of each movement: what was shown, or the error that says why nothing was; and both as plain data.

May import the core's command line. `run` makes them, and the report draws what `rows` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs

from tensorway.cli import exits
from tensorway.cli.charts import Chart, Series
from tensorway.cli.demonstration import Shown
from tensorway.errors import BackendNotFound, TensorwayError, Unsupported

#: Entry-point name -> what the movement is called.
NAMES: Final = {"rebalance": "rebalance", "handover": "hand over", "offload": "offload"}


@attrs.frozen
class Seen:
    """One movement over one transport."""

    movement: str
    #: The transport that it was to be shown over; empty where there is none to choose.
    transport: str
    #: What brings it.
    dist: str = ""
    shown: Shown | None = None
    error: TensorwayError | None = None
    #: Whether that is no failure: nothing brings it here, or it cannot do this.
    excused: bool = False

    @property
    def state(self) -> str:
        """In one word."""
        if self.shown is not None:
            return "right" if self.shown.right else "wrong"
        if not self.excused:
            return "failed"
        return "unsupported" if isinstance(self.error, Unsupported) else "missing"


def code_of(seen: Sequence[Seen]) -> int:
    """The exit code: of what is wrong, else of what failed first, else of whether anything was shown."""
    if any(each.state == "wrong" for each in seen):
        return exits.BROKEN
    failed = [each.error for each in seen if each.state == "failed" and each.error is not None]
    if failed:
        return exits.code_for(failed[0])
    if any(each.state == "right" for each in seen):
        return exits.OK
    missing = [each.error for each in seen if each.error is not None]
    return exits.code_for(missing[0]) if missing else exits.code_for(BackendNotFound("", "", ""))


def row(seen: Seen) -> dict[str, Any]:
    """As `--json` says it."""
    shown, error = seen.shown, seen.error
    return {
        "movement": seen.movement,
        "state": seen.state,
        "dist": seen.dist,
        "over": shown.over if shown else seen.transport,
        "processes": shown.processes if shown else 0,
        "bytes": shown.nbytes if shown else 0,
        "headline": {"value": shown.headline[0], "what": shown.headline[1]} if shown else None,
        "text": shown.text if shown else "",
        "ratios": [
            {"what": ratio.what, "beside": ratio.beside, "ratio": _digits(ratio.value, 3)} for ratio in shown.ratios
        ]
        if shown
        else [],
        "charts": [_chart_row(chart) for chart in shown.charts] if shown else [],
        "error": None
        if error is None
        else {"error": type(error).__name__, "asked": error.asked, "true": error.true, "to_do": error.to_do},
    }


def charts_of(seen: Sequence[Seen]) -> list[Chart]:
    """The charts of one movement over several transports: lines of one title are in one picture."""
    found: dict[str, Chart] = {}
    for each in seen:
        for chart in each.shown.charts if each.shown else ():
            before = found.setdefault(chart.title, chart)
            names = {series.name for series in before.series}
            more = tuple(series for series in chart.series if series.name not in names)
            found[chart.title] = attrs.evolve(before, series=before.series + more)
    return [_rounded(chart) for chart in found.values()]


def _rounded(chart: Chart) -> Chart:
    """With the values that `--json` has."""
    lines = (attrs.evolve(series, values=tuple(map(_digits, series.values))) for series in chart.series)
    return attrs.evolve(chart, series=tuple(lines))


def _chart_row(chart: Chart) -> dict[str, Any]:
    def series_row(series: Series) -> dict[str, Any]:
        return {"name": series.name, "aside": series.aside, "values": list(series.values)}

    chart = _rounded(chart)
    places = [chart.place(at) for at in range(max(len(series.values) for series in chart.series))]
    lines = [series_row(series) for series in chart.series]
    return {"title": chart.title, "along": chart.along, "up": chart.up, "places": places, "series": lines}


def _digits(value: float, count: int = 4) -> float:
    """So many digits that count: more of them would be of this one run."""
    return float(f"{value:.{count}g}")
