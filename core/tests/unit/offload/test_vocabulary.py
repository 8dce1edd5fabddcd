"""What offloading counts can be counted, and read by who reads metrics."""

from __future__ import annotations

import re

import pytest

from tensorway.metrics import Counters, exposition
from tensorway.offload import CAUSES, METRICS, OUTCOMES


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_named_and_explained(metric):
    assert re.fullmatch("offload_[a-z_]+", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.help.endswith(".")
    assert not {"backend", "engine", "rank"} & set(metric.labels), "these are on every value"


def test_all_of_it_can_be_counted_and_exposed():
    counts = Counters(METRICS, backend="cpu", engine="e", rank="0")
    for metric in METRICS.values():
        count = {"counter": counts.add, "gauge": counts.set, "seconds": counts.took}[metric.kind]
        count(metric.name, 1, **dict.fromkeys(metric.labels, "x"))
    text = exposition(counts.samples(), METRICS)
    assert set(METRICS) == set(re.findall(r"# TYPE tensorway_(\w+) ", text))


def test_what_a_tier_says_is_a_cause_unless_it_went_well():
    assert set(OUTCOMES) - {"done"} <= CAUSES
