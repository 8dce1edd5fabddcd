"""Pages of HTML for people: one file that needs nothing else, with charts drawn as SVG and every number in a table.

Room `cli`, for commands of dists; may import `charts`. A page needs no script and no network, follows the reader's
light or dark, and fits a telephone: each chart is drawn twice, and the style shows the one that is as wide as the
reader's window.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from tensorway.cli.charts import Chart, Series

#: Colors of lines and of their names: 4.5 to 1 and more on their paper, and apart for who cannot tell red from green.
_LIGHT: Final = ("#1d5fb0", "#b4500b", "#1a7a54", "#a5377f", "#6b6b12", "#6a4fc6", "#b92c42", "#0f7083")
_DARK: Final = ("#74acf2", "#f2a552", "#54c494", "#e487c2", "#c4c45c", "#ae9cf7", "#f58594", "#62c6d9")
_PAPERS: Final = {
    "light": ("--ink: #1c1e21; --soft: #5b6269; --paper: #fff; --card: #f6f7f8; --faint: #d9dce0", _LIGHT),
    "dark": ("--ink: #e6e8ea; --soft: #a4abb3; --paper: #15171a; --card: #1d2024; --faint: #363b41", _DARK),
}
_STYLE: Final = """
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 760px;
       margin: 2.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.8rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; } p { margin: .3rem 0; } .soft { color: var(--soft); }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .soft { fill: var(--soft); } .grid { stroke: var(--faint); } .line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 6 4; stroke-width: 1.5; } .dotted { stroke-dasharray: 2 3; stroke-width: 1.5; }
.narrow, .legend { display: none; }
.legend span { display: inline-block; margin-right: 1.2em; } .legend i { display: inline-block; width: 1.1em;
       border-top: 3px solid; margin-right: .4em; vertical-align: middle; }
.legend .dashed i { border-top-style: dashed; } .legend .dotted i { border-top-style: dotted; }
@media (max-width: 640px) { body { margin: 1.5rem auto; } .wide { display: none; }
       .narrow, .legend { display: block; } }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--faint); font-weight: normal; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; } details > div { overflow-x: auto; }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of these parts of HTML; only the title is text, and escaped here."""
    lines = {name: " ".join(f"--c{at}: {color};" for at, color in enumerate(row)) for name, (_, row) in _PAPERS.items()}
    light, dark = (f":root {{ color-scheme: light dark; {ink}; {lines[name]} }}" for name, (ink, _) in _PAPERS.items())
    classes = "".join(
        f".c{at} {{ color: var(--{name}); stroke: var(--{name}); }} "
        f"svg text.c{at}, circle.c{at} {{ fill: var(--{name}); stroke: none; }} "
        for at, name in enumerate([*(f"c{at}" for at in range(len(_LIGHT))), "soft"])
    )
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }}\n{classes}{_STYLE}{style}</style></head>",
            f"<body><h1>{html.escape(title)}</h1>",
            *parts,
            "</body></html>\n",
        ]
    )


def charted(title: str, charts: Sequence[Chart]) -> str:
    """A page of charts alone."""
    return page(title, [figure(chart, number) for number, chart in enumerate(charts)])


def figure(chart: Chart, number: int) -> str:
    """A chart for both widths, and its numbers; `number` is another one for each chart of a page."""
    legend = "".join(
        f'<span class="{name}"><i></i>{html.escape(series.name)}</span>' for series, name in _colored(chart)
    )
    wide, narrow = _Picture(chart, 720, 300, labels=True), _Picture(chart, 344, 250, labels=False)
    return (
        f'<h3>{html.escape(chart.title)}</h3><figure><div class="legend">{legend}</div>'
        f"{wide.drawn(f'chart-{number}-wide')}{narrow.drawn(f'chart-{number}-narrow')}{table(chart)}</figure>"
    )


def table(chart: Chart) -> str:
    """All numbers of a chart; open where they are few."""
    head = "".join(f"<th>{html.escape(series.name)}</th>" for series in chart.series)
    rows = [f"<tr><th>{html.escape(chart.along)}</th>{head}</tr>"]
    most = max(len(series.values) for series in chart.series)
    for at in range(most):
        cells = (number(series.values[at]) if at < len(series.values) else "" for series in chart.series)
        rows.append(f"<tr><td>{html.escape(chart.place(at))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    what = f"Numbers: {html.escape(chart.up)}" if chart.up else "Numbers"
    return f"<details><summary>{what}</summary><div><table>{''.join(rows)}</table></div></details>"


def number(value: float) -> str:
    """Four digits that count, without an exponent where people do not expect one."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _colored(chart: Chart) -> list[tuple[Series, str]]:
    """Each series, and the classes that say how it is drawn."""
    colors = itertools.cycle(f"c{at}" for at in range(len(_LIGHT)))
    asides = itertools.cycle(f"c{len(_LIGHT)} {how}" for how in ("dashed", "dotted"))
    return [(series, next(asides if series.aside else colors)) for series in chart.series]


#: Of letters of 12 pixels, about.
_LETTER: Final = 6.9
_LINE: Final = 15.0
_TOP: Final = 28.0
_BOTTOM: Final = 42.0


@attrs.frozen
class _Picture:
    """A chart at one size. `labels`: each line has its name at its end."""

    chart: Chart
    width: float
    height: float
    labels: bool

    @property
    def ticks(self) -> list[float]:
        """Where a line goes across."""
        return (_factors if self.chart.log else _steps)(*self.chart.range)

    @property
    def count(self) -> int:
        """Places from left to right."""
        return max(len(series.values) for series in self.chart.series)

    @property
    def left(self) -> float:
        """Where the axes begin; on the left of it are numbers."""
        return 12 + _LETTER * max(len(number(tick)) for tick in self.ticks)

    @property
    def right(self) -> float:
        """Where they end; on the right of it are names."""
        longest = max(len(series.name) for series in self.chart.series)
        return self.width - (18 + _LETTER * min(longest, 34) if self.labels else 14)

    def x(self, at: float) -> float:
        """Of a place."""
        inset = 10.0  # no point lies on the edge
        share = at / (self.count - 1) if self.count > 1 else 0.5
        return self.left + inset + (self.right - self.left - 2 * inset) * share

    def y(self, value: float) -> float:
        """Of a value."""
        low, high = self.chart.range
        if self.chart.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return _TOP + (self.height - _TOP - _BOTTOM) * (high - value) / (high - low)

    def drawn(self, name: str) -> str:
        """The SVG; `name` is one of a kind on its page."""
        chart, text = self.chart, html.escape
        kind = "wide" if self.labels else "narrow"
        parts = [
            f'<svg class="{kind}" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{text(chart.title)}</title>'
            f'<desc id="{name}-d">{text(_told(chart))}</desc>',
            f'<rect class="area" x="{self.left:.1f}" y="{_TOP:g}" width="{self.right - self.left:.1f}" '
            f'height="{self.height - _TOP - _BOTTOM:g}" fill="none"/>',
            *self._axes(),
        ]
        ends, radius = [], 3 if chart.joined else 5
        for series, color in _colored(chart):
            points = [(self.x(at), self.y(value)) for at, value in enumerate(series.values)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            if chart.joined:
                parts.append(f'<polyline class="line {color}" points="{line}"/>')
            for at, (x, y) in enumerate(points):
                said = text(f"{series.name}, {chart.along} {chart.place(at)}: {number(series.values[at])}")
                parts.append(
                    f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{said}</title></circle>'
                )
            ends.append((points[-1][1], series.name, color))
        return "".join([*parts, *(self._names(ends) if self.labels else []), "</svg>"])

    def _axes(self) -> Iterable[str]:
        chart = self.chart
        for value in self.ticks:
            y = self.y(value)
            yield f'<line class="grid" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield _text(self.left - 6, y + 4, number(value), "end")
        if chart.up:
            yield _text(0, 13, f"{chart.up}{' (log scale)' if chart.log else ''}", "start")
        widest = max(len(chart.place(at)) for at in range(self.count)) * _LETTER + 8
        step = max(1, math.ceil(self.count * widest / (self.right - self.left)))
        for at in range(0, self.count, step):
            half = len(chart.place(at)) * _LETTER / 2  # a long one at the end would be cut off
            middle = min(max(self.x(at), half), self.width - half)
            yield _text(middle, self.height - _BOTTOM + 17, chart.place(at), "middle")
        yield _text((self.left + self.right) / 2, self.height - 6, chart.along, "middle")

    def _names(self, ends: Iterable[tuple[float, str, str]]) -> Iterable[str]:
        """Names at the ends of their lines, each at least a line of text below the one above."""
        rows, at = sorted(ends), -math.inf
        placed = []
        for y, name, color in rows:
            at = max(y, at + _LINE)
            placed.append((at, name, color))
        over = max(0.0, placed[-1][0] - (self.height - _BOTTOM))
        for y, name, color in placed:
            yield f'<text class="{color}" x="{self.right + 8:.1f}" y="{y - over + 4:.1f}">{html.escape(name)}</text>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _told(chart: Chart) -> str:
    """What one would see, in words."""
    lines = [
        f"{series.name}: {number(series.values[0])} at {chart.place(0)}, "
        f"{number(series.values[-1])} at {chart.place(len(series.values) - 1)}."
        for series in chart.series
    ]
    return " ".join([f"{chart.up or 'Values'} by {chart.along}.", *lines, "The table below has every number."])


def _steps(low: float, high: float) -> list[float]:
    """Round numbers between the two, some five of them."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * by for by in (1, 2, 5, 10) if (high - low) / (size * by) <= 6)
    return [at * step for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _factors(low: float, high: float) -> list[float]:
    """Round numbers between the two whose factors are alike; powers of ten where those are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6)] if found else [low, high]
