"""What was counted since somebody asked last, as it goes from vLLM's engines to the process that serves `/metrics`.

May import attrs and the core's metrics. An engine tells changes and no totals: vLLM gives what a step has counted to
any one of the processes that serve, and Prometheus adds up what these have. A gauge is told when it is another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import attrs

from tensorway.metrics import BUCKETS, Labels, Metric, Sample

#: What asking may cost of the time that passes, and what it may cost without a pause after it, in seconds.
_SHARE: Final = 0.01
_SHORT: Final = 0.001
#: Labels that any value may have: whose it is, which of several connectors that are one, and at a worker which rank.
_BESIDE: Final = ("backend", "child", "rank")


class Counting:
    """A source's values, and what of them was told. One thread asks."""

    def __init__(self, source: Callable[[], Iterable[Sample]], metrics: Mapping[str, Metric]) -> None:
        """`metrics`: the vocabulary; what a source counts beside it is left out."""
        self._source, self._metrics = source, metrics
        self._told: dict[tuple[str, Labels], Sample] = {}
        self._again = 0.0

    def changes(self) -> list[Sample]:
        """What came to be since the last call. Nothing yet, if the last one cost so much that engines would feel it."""
        if time.monotonic() < self._again:
            return []
        began = time.thread_time()  # a busy machine makes it no dearer
        found = []
        for sample in self._source():
            key = (sample.metric, sample.labels)
            told = self._told.get(key)
            if told is not None and (told.value, told.count) == (sample.value, sample.count):
                continue  # as nearly all of them, in nearly all steps
            change = self._change(told, sample)
            if change is not None:
                found.append(change)
            self._told[key] = sample
        found = folded(found, self._metrics)
        cost = time.thread_time() - began
        if cost > _SHORT:
            self._again = time.monotonic() + cost / _SHARE
        return found

    def _change(self, told: Sample | None, now: Sample) -> Sample | None:
        metric = self._metrics.get(now.metric)
        if metric is None or metric.kind == "gauge":
            return now
        if told is None or now.value < told.value or now.count < told.count:
            return now if now.value or now.count else None  # the first one, or a source that has begun again
        buckets = tuple(max(0, new - old) for new, old in zip(now.buckets, told.buckets, strict=True))
        return attrs.evolve(now, value=now.value - told.value, count=now.count - told.count, buckets=buckets)


def folded(samples: Iterable[Sample], metrics: Mapping[str, Metric]) -> list[Sample]:
    """Those of the vocabulary, with labels in one order, of equal labels one: added up, or of a gauge the last."""
    found: dict[tuple[str, Labels], Sample] = {}
    for sample in samples:
        metric = metrics.get(sample.metric)
        if metric is None:
            continue
        given = dict(sample.labels)
        labels = tuple((name, given.get(name, "")) for name in names(metric))
        key = (sample.metric, labels)
        known = found.get(key)
        if known is None or metric.kind == "gauge":
            found[key] = attrs.evolve(sample, labels=labels)
        else:
            buckets = tuple(one + other for one, other in zip(known.buckets, sample.buckets, strict=True))
            found[key] = Sample(*key, known.value + sample.value, known.count + sample.count, buckets)
    return list(found.values())


def names(metric: Metric) -> tuple[str, ...]:
    """Labels that a metric has in vLLM, beside vLLM's own: its `engine` is vLLM's, which counts them from 0."""
    return (*metric.labels, *_BESIDE)


def packed(samples: Iterable[Sample]) -> list[list[Any]]:
    """As they go between processes."""
    return [
        [each.metric, [list(pair) for pair in each.labels], each.value, each.count, list(each.buckets)]
        for each in samples
    ]


def unpacked(rows: Iterable[Sequence[Any]]) -> list[Sample]:
    """From what `packed` has made."""
    return [
        Sample(metric, tuple((name, text) for name, text in labels), value, count, tuple(buckets))
        for metric, labels, value, count, buckets in rows
    ]


def observations(sample: Sample) -> list[float]:
    """So many seconds that their buckets, their number and, but for rounding, their sum are those of the sample.

    A histogram of vLLM's is filled with one observation after another, in whichever library it is.
    """
    within = [new - old for old, new in pairwise((0, *sample.buckets, sample.count))]
    low = [0.0, *BUCKETS]
    least = sum(count * bound for count, bound in zip(within, low, strict=True))
    high = [*BUCKETS, BUCKETS[-1] + max(0.0, sample.value - least)]
    room = sum(count * bound for count, bound in zip(within, high, strict=True)) - least
    share = min(1.0, max(0.0, (sample.value - least) / room)) if room > 0 else 0.0
    found: list[float] = []
    for count, lower, upper in zip(within, low, high, strict=True):
        # A bucket has its upper bound, and not its lower one.
        beyond = math.nextafter(lower, math.inf) if lower else 0.0
        found += [max(beyond, min(upper, lower + share * (upper - lower)))] * max(0, count)
    return found
