"""Pictures of a plan or a replay: one page of HTML that needs nothing else, or a PNG where matplotlib is installed.

Room `cli`, for commands of dists; imports matplotlib when a PNG is asked for. The page follows the reader's light or
dark, shows values where the pointer is, and has every number in a table.
"""

from __future__ import annotations

import html
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import attrs

from tensorway.errors import BackendUnavailable, OptionsInvalid


@attrs.frozen
class Series:
    """One line of a chart: its values at 0, 1, 2, ..."""

    name: str
    values: tuple[float, ...]


@attrs.frozen
class Chart:
    """One picture."""

    title: str
    #: What is counted from left to right.
    along: str
    series: tuple[Series, ...]
    #: What the values of a series are at, if not 0, 1, 2, ...
    places: tuple[str, ...] = ()

    def place(self, at: int) -> str:
        """What one of the values is at, for people."""
        return self.places[at] if self.places else str(at)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value, apart by a little at least."""
        values = [value for series in self.series for value in series.values]
        low, high = min(values), max(values)
        margin = max((high - low) * 0.05, 0.005)
        return low - margin, high + margin


def drawable(path: Path) -> None:
    """Raise now what `draw` would raise after all the work."""
    asked = f"A picture was asked for as {path}."
    if path.suffix.lower() not in (".html", ".png"):
        raise OptionsInvalid(asked, f"Its name ends with {path.suffix!r}.", "Name it .html or .png.")
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        to_do = "pip install matplotlib, or ask for .html, which needs nothing."
        raise BackendUnavailable(asked, "A PNG needs matplotlib, which is not installed.", to_do)


def draw(path: Path, title: str, charts: list[Chart]) -> None:
    """Write the charts as what the name of the file says."""
    drawable(path)
    try:
        if path.suffix.lower() == ".png":
            _png(path, title, charts)
        else:
            path.write_text(page(title, charts), "utf-8")
    except OSError as error:
        raise OptionsInvalid(
            f"A picture was asked for as {path}.",
            f"The system does not write it: {error.strerror}.",
            "Name a file in a folder that can be written to.",
        ) from error


def _png(path: Path, title: str, charts: list[Chart]) -> None:
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
            axis.plot(range(len(series.values)), series.values, marker="o", markersize=3, label=series.name)
        axis.set_title(chart.title, fontsize=10)
        axis.set_xlabel(chart.along)
        if chart.places:
            axis.set_xticks(range(len(chart.places)), chart.places)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


_WIDTH: Final = 720
_HEIGHT: Final = 260
_LEFT: Final = 56
_BOTTOM: Final = 36
_TOP: Final = 12

#: Colors that stay apart on white and on black, and for who cannot tell red from green.
_COLORS: Final = ("#3b7dd8", "#e08a1e", "#2a9d6f", "#c44e9b", "#8a8a2b", "#7a62d3", "#d1495b", "#3aa6b9")
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #d9dce0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --faint: #3a3e44; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 760px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
.grid { stroke: var(--faint); } .legend span { margin-right: 1.2em; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); }
summary { cursor: pointer; } details > div { overflow-x: auto; }
"""


def page(title: str, charts: list[Chart]) -> str:
    """The charts as one page of HTML."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    for chart in charts:
        legend = "".join(
            f'<span><i style="background:{_color(number)}"></i>{html.escape(series.name)}</span>'
            for number, series in enumerate(chart.series)
        )
        parts.append(f'<h2>{html.escape(chart.title)}</h2><div class="legend">{legend}</div>')
        parts += [_svg(chart), _table(chart)]
    return "\n".join([*parts, "</body></html>\n"])


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _svg(chart: Chart) -> str:
    low, high = chart.range
    longest = max(len(series.values) for series in chart.series)

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * (at / (longest - 1) if longest > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    def named(at: int) -> str:
        return html.escape(chart.place(at))

    label = html.escape(chart.title, quote=True)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    step = max(1, math.ceil(longest / 12))
    for at in range(0, longest, step):
        parts.append(f'<text x="{x(at):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{named(at)}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(chart.along)}</text>'
    )
    for number, series in enumerate(chart.series):
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in enumerate(series.values))
        parts.append(f'<polyline fill="none" stroke="{_color(number)}" stroke-width="2" points="{points}"/>')
        for at, value in enumerate(series.values):
            text = f"<title>{html.escape(f'{series.name}, {chart.along} {chart.place(at)}: {value:.4f}')}</title>"
            parts.append(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{_color(number)}">{text}</circle>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, some five of them."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * by for by in (1, 2, 5, 10) if (high - low) / (size * by) <= 6)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _table(chart: Chart) -> str:
    head = "".join(f"<th>{html.escape(series.name)}</th>" for series in chart.series)
    rows = [f"<tr><th>{html.escape(chart.along)}</th>{head}</tr>"]
    for at in range(max(len(series.values) for series in chart.series)):
        cells = "".join(f"<td>{series.values[at]:.4f}</td>" for series in chart.series)
        rows.append(f"<tr><td>{html.escape(chart.place(at))}</td>{cells}</tr>")
    return f"<details><summary>Numbers</summary><div><table>{''.join(rows)}</table></div></details>"
