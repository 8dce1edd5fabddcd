"""What is counted, under which name and with which labels: one vocabulary for whatever moves state.

Ground; may import attrs and the errors. Whoever counts has a `Counters` of its own and no lock: it belongs to the
thread that counts; others may ask it for its samples meanwhile. A name that is not in the vocabulary is refused where
it is counted, so that no backend invents a second word for the same thing; `exposition` is what Prometheus reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate
from math import isfinite
from operator import add
from typing import Final, Literal

import attrs

from tensorway.errors import OptionsInvalid

#: `counter` only grows, `gauge` is what is true now, `seconds` is a histogram of how long something took.
Kind = Literal["counter", "gauge", "seconds"]
#: Label names and their values, in the order of the metric's labels.
Labels = tuple[tuple[str, str], ...]

#: Upper bounds of the buckets of `seconds`; what took longer is in the last one, which has none.
BUCKETS: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Values of one metric that are told apart: peers come and go, and a table must not grow with them.
MOST_SERIES: Final = 1024
#: The label of a bucket's bound.
_BOUND: Final = "le"
#: The value of every label of what came after so many.
OTHERS: Final = "(others)"


@attrs.frozen
class Metric:
    """A name of the vocabulary."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    #: One sentence, for people.
    help: str


@attrs.frozen
class Sample:
    """One value. Of `seconds` it is the sum, with how many there were, and how many up to each bucket's bound."""

    metric: str
    labels: Labels
    value: float
    count: int = 0
    buckets: tuple[int, ...] = ()

    def labelled(self, **labels: str) -> Sample:
        """The same with other labels: who puts several backends together says which one each value is of."""
        kept = tuple(pair for pair in self.labels if pair[0] not in labels)
        return attrs.evolve(self, labels=(*labels.items(), *kept))


def vocabulary(*metrics: Metric) -> dict[str, Metric]:
    """Metrics by name."""
    return {metric.name: metric for metric in metrics}


@attrs.define
class _Seconds:
    """A histogram that is being filled."""

    total: float = 0.0
    count: int = 0
    within: list[int] = attrs.field(factory=lambda: [0] * len(BUCKETS))


class Counters:
    """Values of the metrics of one vocabulary."""

    def __init__(self, metrics: Mapping[str, Metric], **always: str) -> None:
        """`always`: labels that every value has, such as the backend; metrics do not name them."""
        for name in always:
            owner = next((metric.name for metric in metrics.values() if name in metric.labels), "")
            if owner or name == _BOUND:
                raise OptionsInvalid(
                    f"All values were to have the label {name}.",
                    f"It is that of {owner or 'the buckets'} already.",
                    "Call it something else: a label is there once.",
                )
        self._metrics, self._always = metrics, tuple(always.items())
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._seconds: dict[str, dict[tuple[str, ...], _Seconds]] = {}

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """So many more; fewer only of a gauge."""
        values = self._values.setdefault(name, {})
        self._check_number(name, amount)
        key = self._key(name, ("counter", "gauge"), labels, values)
        values[key] = values.get(key, 0) + amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """What is true now."""
        values = self._values.setdefault(name, {})
        self._check_number(name, value)
        values[self._key(name, ("gauge", "counter"), labels, values)] = value

    def took(self, name: str, seconds: float, /, **labels: str) -> None:
        """Something took so long; no time at all, if two readings of a clock say less than that."""
        rows = self._seconds.setdefault(name, {})
        seconds = max(0.0, seconds)
        row = rows.setdefault(self._key(name, ("seconds",), labels, rows), _Seconds())
        row.total += seconds
        row.count += 1
        place = bisect_left(BUCKETS, seconds)
        if place < len(BUCKETS):
            row.within[place] += 1

    def samples(self) -> list[Sample]:
        """Everything, in the order of the vocabulary."""
        found = []
        for name, metric in self._metrics.items():
            # Lists, because the thread that counts may meet a new peer meanwhile.
            for key, value in list(self._values.get(name, {}).items()):
                found.append(Sample(name, self._labels(metric, key), value))
            for key, row in list(self._seconds.get(name, {}).items()):
                sums = tuple(accumulate(list(row.within)))
                found.append(Sample(name, self._labels(metric, key), row.total, max(row.count, sums[-1]), sums))
        return found

    def _labels(self, metric: Metric, key: tuple[str, ...]) -> Labels:
        return (*self._always, *zip(metric.labels, key, strict=True))

    def _check_number(self, name: str, value: float) -> None:
        metric = self._metrics.get(name)
        if not isfinite(value) or (value < 0 and metric is not None and metric.kind != "gauge"):
            raise OptionsInvalid(
                f"{value} was to be counted as {name}.",
                "It is no number, or less than nothing." if isfinite(value) else "It is no number.",
                "Count what has happened; only a gauge goes down.",
            )

    def _key(
        self, name: str, kinds: tuple[Kind, ...], labels: Mapping[str, str], known: Mapping[tuple[str, ...], object]
    ) -> tuple[str, ...]:
        metric = self._metrics.get(name)
        if metric is None or metric.kind not in kinds or set(metric.labels) != set(labels):
            raise OptionsInvalid(
                f"{name} was to be counted with labels {', '.join(sorted(labels)) or 'none'}.",
                f"The vocabulary has {metric}." if metric else "The vocabulary has no such name.",
                "Use a name of the vocabulary with its labels, or add one to it.",
            )
        key = tuple(labels[label] for label in metric.labels)
        return key if key in known or len(known) < MOST_SERIES else (OTHERS,) * len(key)


def total(samples: Iterable[Sample], metric: str, **labels: str) -> float:
    """The sum of all values of a metric that have these labels; of `seconds` how many there were."""
    wanted, found = set(labels.items()), 0.0
    for sample in samples:
        if sample.metric == metric and wanted <= set(sample.labels):
            found += sample.count if sample.buckets else sample.value
    return found


def exposition(samples: Iterable[Sample], metrics: Mapping[str, Metric]) -> str:
    """What Prometheus reads, version 0.0.4 of its text format; names begin with `tensorway_`.

    Values that several sources have under the same labels are added up, for the format has each once. What the
    vocabulary has not is left out: one source with words of its own would else make all others unreadable.
    """
    by_name: dict[str, dict[Labels, Sample]] = {}
    for sample in samples:
        if sample.metric in metrics:
            rows, key = by_name.setdefault(sample.metric, {}), tuple(sorted(sample.labels))
            rows[key] = _sum(rows[key], sample) if key in rows else sample
    lines: list[str] = []
    for name, found in by_name.items():
        metric = metrics[name]
        full = f"tensorway_{name}"
        about = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {full} {about}", f"# TYPE {full} {_TYPES[metric.kind]}"]
        for row in found.values():
            if metric.kind != "seconds":
                lines.append(f"{full}{_written(row.labels)} {float(row.value)!r}")
                continue
            for bound, count in zip((*map(repr, BUCKETS), "+Inf"), (*row.buckets, row.count), strict=True):
                lines.append(f"{full}_bucket{_written((*row.labels, (_BOUND, bound)))} {count}")
            lines.append(f"{full}_sum{_written(row.labels)} {float(row.value)!r}")
            lines.append(f"{full}_count{_written(row.labels)} {row.count}")
    return "\n".join([*lines, ""])


def _sum(one: Sample, other: Sample) -> Sample:
    buckets = tuple(map(add, one.buckets, other.buckets))
    return attrs.evolve(one, value=one.value + other.value, count=one.count + other.count, buckets=buckets)


_TYPES: Final[Mapping[Kind, str]] = {"counter": "counter", "gauge": "gauge", "seconds": "histogram"}


def _written(labels: Labels) -> str:
    texts = [f'{name}="{_escaped(value)}"' for name, value in labels]
    return f"{{{','.join(texts)}}}" if texts else ""


def _escaped(value: str) -> str:
    # A peer may be called by half of a surrogate pair, which UTF-8 cannot write.
    value = value.encode(errors="replace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
