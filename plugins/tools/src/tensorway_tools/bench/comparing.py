"""Compares two files of results row by row: by how much a ratio has changed, and whether that is more than noise.

Of the package `bench` the command imports this; it may import `results`. docs/benchmarks.md has the method in words:
what the noise of a row is comes from its own samples, within processes and from one process to the next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, Literal

import attrs
import msgspec

from tensorway_tools.bench.results import Results, RowResult, Sample

#: `slower`, `faster`: more than the noise explains; `same`: not; `unknown`: too few samples to know their noise;
#: `other`: measured beside something else, or under conditions that are not comparable.
Verdict = Literal["slower", "faster", "same", "unknown", "other"]
#: A change counts if it is so many times the noise of the two medians.
SURE: Final = 3.0
#: And if it is more than this factor: clocks and loops have a grain of their own.
LEAST: Final = 1.02
#: Rounds of a row below which its spread says nothing.
FEWEST: Final = 5
#: A median of normal samples varies so much more than their mean, and their deviation is so many times its median.
_OF_MEDIAN: Final = 1.2533
_OF_DEVIATION: Final = 1.4826
#: The range of so many normal samples, in standard deviations: for medians of a few processes.
_RANGES: Final = (0.0, 0.0, 1.128, 1.693, 2.059, 2.326, 2.534, 2.704, 2.847, 2.970, 3.078)


@attrs.frozen
class Change:
    """One row that both files have."""

    benchmark: str
    row: str
    before: RowResult
    now: RowResult
    #: By how much the median ratio is larger now: 1.1 is a tenth slower; infinite where it was next to nothing.
    factor: float
    #: Factors up to this are noise.
    noise: float
    verdict: Verdict


@attrs.frozen
class Comparison:
    """Two files."""

    changes: list[Change]
    #: Why ratios of the two cannot be compared; empty if they can.
    differs: list[str]
    #: What else differs, and may be the cause of a change.
    versions: list[str]
    #: Rows that only one of them has.
    only_before: list[str]
    only_now: list[str]

    @property
    def slower(self) -> list[Change]:
        """What got worse, more than noise explains."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: Results, now: Results) -> Comparison:
    """All rows of both; a row is the same if benchmark and name are."""
    rows = [{(b.name, row.name): row for b in each.benchmarks for row in b.rows} for each in (before, now)]
    differs = _differences("machine", before.machine, now.machine) + _differences(
        "options", before.options, now.options
    )
    changes = [_change(*key, rows[0][key], rows[1][key], comparable=not differs) for key in rows[0] if key in rows[1]]
    names = sorted({*before.versions, *now.versions})
    pairs = [(name, before.versions.get(name, "none"), now.versions.get(name, "none")) for name in names]
    return Comparison(
        sorted(changes, key=lambda change: -abs(math.log(change.factor)) if change.factor > 0 else -math.inf),
        differs,
        [f"{name}: {one}, and {other} now" for name, one, other in pairs if one != other],
        [": ".join(key) for key in rows[0] if key not in rows[1]],
        [": ".join(key) for key in rows[1] if key not in rows[0]],
    )


def _differences(what: str, one: msgspec.Struct, other: msgspec.Struct) -> list[str]:
    pairs = zip(msgspec.structs.asdict(one).items(), msgspec.structs.asdict(other).values(), strict=True)
    return [f"{what}, {name}: {mine}, and {its} now" for (name, mine), its in pairs if mine != its]


def _change(benchmark: str, name: str, before: RowResult, now: RowResult, *, comparable: bool) -> Change:
    medians = [statistics.median(row.ratios) for row in (before, now)]
    factor = medians[1] / medians[0] if medians[0] > 0 else math.inf
    # Bounded: beyond it a float has no room for the factor, and no change is more than that.
    noise = math.exp(min(SURE * math.hypot(_error(before.samples), _error(now.samples)), 700.0))
    verdict: Verdict = "same"
    if not comparable or (before.to, before.clock) != (now.to, now.clock):
        verdict = "other"
    elif min(len(before.samples), len(now.samples)) < FEWEST or not 0 < factor < math.inf:
        verdict = "unknown"
    elif factor > max(noise, LEAST):
        verdict = "slower"
    elif factor < 1 / max(noise, LEAST):
        verdict = "faster"
    return Change(benchmark, name, before, now, factor, noise, verdict)


def _error(samples: Sequence[Sample]) -> float:
    """The standard error of the median of ratios, as a logarithm.

    Rounds of one process share what the process was dealt: pages, cores, neighbors. So processes are looked at one by
    one, and what their medians differ by counts as well as what rounds of one of them do; the larger is taken.
    """
    by_process: dict[int, list[float]] = {}
    for sample in samples:
        if sample.ratio > 0:
            by_process.setdefault(sample.process, []).append(math.log(sample.ratio))
    if not by_process:
        return math.inf
    middles = [statistics.median(rows) for rows in by_process.values()]
    deviations = [abs(row - middle) for rows, middle in zip(by_process.values(), middles, strict=True) for row in rows]
    within = _OF_MEDIAN * _OF_DEVIATION * statistics.median(deviations) / math.sqrt(len(deviations))
    spread = _RANGES[min(len(middles), len(_RANGES) - 1)]
    between = (max(middles) - min(middles)) / spread / math.sqrt(len(middles)) if spread else 0.0
    return max(within, between)
