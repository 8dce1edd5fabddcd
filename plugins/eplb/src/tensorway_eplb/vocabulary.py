"""What a rank of a group counts, by the names that dashboards know: see `tensorway.metrics`.

May import the core. The names of `Rebalancer.statistics` are older, and engines read them: this says them otherwise.
Each value also has the labels `group` and `member`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tensorway.metrics import Counters, Metric, Sample, vocabulary

METRICS: Final = vocabulary(
    Metric("eplb_rebalances_total", "counter", (), "Rebalances that ended with an outcome."),
    Metric("eplb_rebalances_skipped_total", "counter", (), "Those of them that had nothing to move."),
    Metric("eplb_layers_committed_total", "counter", (), "Layers that have their new weights."),
    Metric("eplb_layers_aborted_total", "counter", ("cause",), "Layers that kept their old weights, by why."),
    Metric("eplb_members_lost_total", "counter", (), "Members that were lost in a rebalance."),
    Metric("eplb_rows_total", "counter", ("what",), "Rows that were fetched, loaded, resourced, or mismatched."),
    Metric("eplb_fetched_bytes_total", "counter", (), "Bytes of rows that came from other ranks."),
    Metric("eplb_failed_fetches_total", "counter", (), "Fetches that the fabric could not do."),
    Metric("eplb_stalls_total", "counter", (), "How often nothing happened for long while rows were to come."),
    Metric("eplb_seconds_total", "counter", ("phase",), "Time of rebalances, by phase, and of stalls."),
    Metric("eplb_members", "gauge", ("state",), "Members of the group: there, and lost."),
    Metric("eplb_quarantined_rows", "gauge", (), "Staging rows that a fabric has not let go of."),
)


def samples(counted: Mapping[str, float], now: Counters) -> list[Sample]:
    """What `statistics` says, and gauges of now, as values of `METRICS`."""
    for name, value in counted.items():
        start, _, cause = name.partition("_aborted_")
        first, _, kind = name.rpartition("_")
        if cause:
            now.add(f"eplb_{start}_aborted_total", value, cause=cause)
        elif kind == "seconds":
            now.add("eplb_seconds_total", value, phase=first)
        elif kind == "rows":
            now.add("eplb_rows_total", value, what=first)
        elif name != "layers_aborted":  # the sum of its causes
            now.add(f"eplb_{name}_total", value)
    return now.samples()
