"""What is drawn of a plan, a replay or a demonstration, and the files it goes to: a page of HTML, or a PNG.

Room `cli`, for commands of dists. A page needs nothing else, see `pages`; a PNG needs matplotlib, which is imported
when one is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import attrs

from tensorway.cli import reports
from tensorway.errors import BackendUnavailable, OptionsInvalid


@attrs.frozen
class Series:
    """One line of a chart: its values at 0, 1, 2, ..."""

    name: str
    values: tuple[float, ...]
    #: Whether it is there to compare with: drawn gray and dashed.
    aside: bool = False


@attrs.frozen
class Chart:
    """One picture."""

    title: str
    #: What is counted from left to right.
    along: str
    series: tuple[Series, ...]
    #: What the values of a series are at, if not 0, 1, 2, ...
    places: tuple[str, ...] = ()
    #: What the values are, with their unit.
    up: str = ""
    #: From where to where values go at least: a share is drawn from 0 on.
    span: tuple[float, float] | None = None
    #: Whether equal steps are equal factors. All values are above zero then.
    log: bool = False
    #: Whether a line joins the values: not where places are no steps of anything, as ranks are not.
    joined: bool = True

    def place(self, at: int) -> str:
        """What one of the values is at, for people."""
        return self.places[at] if self.places else str(at)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value, apart by a little at least."""
        values = [value for series in self.series for value in series.values]
        low, high = min(values), max(values)
        if self.log:
            return low / 1.25, high * 1.25
        if self.span is not None:
            return min(low, self.span[0]), max(high, self.span[1])
        margin = max((high - low) * 0.05, 0.005)
        return low - margin, high + margin


def drawable(path: Path, option: str = "--plot") -> None:
    """Raise now what `draw` would raise after all the work."""
    asked = f"A picture was asked for as {path}."
    if path.suffix.lower() not in (".html", ".png"):
        raise OptionsInvalid(asked, f"Its name ends with {path.suffix!r}.", "Name it .html or .png.")
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        to_do = "pip install matplotlib, or ask for .html, which needs nothing."
        raise BackendUnavailable(asked, "A PNG needs matplotlib, which is not installed.", to_do)
    reports.writable(path, option)


def draw(path: Path, title: str, charts: list[Chart], option: str = "--plot") -> None:
    """Write the charts as what the name of the file says."""
    drawable(path, option)
    if path.suffix.lower() == ".png":
        reports.write(path, _png(title, charts), option)
    else:
        from tensorway.cli.pages import charted

        reports.write(path, charted(title, charts).encode(), option)


def _png(title: str, charts: list[Chart]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Without pyplot: no display, no state of the process.
    figure = Figure(figsize=(9, 3.2 * len(charts)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes: Any = figure.subplots(len(charts), squeeze=False)
    for (axis,), chart in zip(axes, charts, strict=True):
        for series in chart.series:
            style = {"color": "0.5"} if series.aside else {}
            style["linestyle"] = ("--" if series.aside else "-") if chart.joined else ""
            axis.plot(range(len(series.values)), series.values, marker="o", markersize=3, label=series.name, **style)
        axis.set_title(chart.title, fontsize=10)
        axis.set_xlabel(chart.along)
        axis.set_ylabel(chart.up)
        axis.set_yscale("log" if chart.log else "linear")
        axis.set_ylim(*chart.range)
        if chart.places:
            axis.set_xticks(range(len(chart.places)), chart.places)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
