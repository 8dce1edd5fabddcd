"""What is counted, under which name and with which labels: one vocabulary for whatever moves state.

Ground; may import attrs and the errors. Whoever counts has a `Counters` of its own and no lock: it belongs to the
thread that counts. A name that is not in the vocabulary is refused where it is counted, so that no backend invents a
second word for the same thing; `exposition` is the text that Prometheus reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
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
        """The same with more labels: who puts several backends together says which one each value is of."""
        return attrs.evolve(self, labels=(*labels.items(), *self.labels))


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
        self._metrics, self._always = metrics, tuple(always.items())
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._seconds: dict[str, dict[tuple[str, ...], _Seconds]] = {}

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """So many more."""
        values = self._values.setdefault(name, {})
        key = self._key(name, ("counter", "gauge"), labels, values)
        values[key] = values.get(key, 0) + amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """What is true now."""
        values = self._values.setdefault(name, {})
        values[self._key(name, ("gauge", "counter"), labels, values)] = value

    def took(self, name: str, seconds: float, /, **labels: str) -> None:
        """Something took so long."""
        rows = self._seconds.setdefault(name, {})
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
            for key, value in self._values.get(name, {}).items():
                found.append(Sample(name, self._labels(metric, key), value))
            for key, row in self._seconds.get(name, {}).items():
                sums = tuple(sum(row.within[: place + 1]) for place in range(len(BUCKETS)))
                found.append(Sample(name, self._labels(metric, key), row.total, row.count, sums))
        return found

    def _labels(self, metric: Metric, key: tuple[str, ...]) -> Labels:
        return (*self._always, *zip(metric.labels, key, strict=True))

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
    """What Prometheus reads, version 0.0.4 of its text format; names begin with `tensorway_`."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.metric, []).append(sample)
    lines: list[str] = []
    for name, rows in by_name.items():
        metric = metrics[name]
        full = f"tensorway_{name}"
        lines += [f"# HELP {full} {metric.help}", f"# TYPE {full} {_TYPES[metric.kind]}"]
        for row in rows:
            if metric.kind != "seconds":
                lines.append(f"{full}{_written(row.labels)} {row.value:g}")
                continue
            for bound, count in zip((*map(repr, BUCKETS), "+Inf"), (*row.buckets, row.count), strict=True):
                lines.append(f"{full}_bucket{_written((*row.labels, ('le', bound)))} {count}")
            lines.append(f"{full}_sum{_written(row.labels)} {row.value:g}")
            lines.append(f"{full}_count{_written(row.labels)} {row.count}")
    return "\n".join([*lines, ""])


_TYPES: Final[Mapping[Kind, str]] = {"counter": "counter", "gauge": "gauge", "seconds": "histogram"}


def _written(labels: Labels) -> str:
    texts = [f'{name}="{_escaped(value)}"' for name, value in labels]
    return f"{{{','.join(texts)}}}" if texts else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
