"""What vLLM's `/metrics` shows of Tensorway, by the core's names with `vllm:tensorway_` before them.

May import vllm, the core's vocabularies and this package; no device library, for processes that only serve import it.

Names begin as vLLM's do: `LLM.get_metrics` leaves out all others, and vLLM takes only those back when an engine is made
again in one process. The labels are vLLM's (`model_name`, `engine`), those of the vocabulary, `backend`, `child` (of
several connectors that are one, else empty) and `rank` (empty at the scheduler).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

from tensorway import kv, offload
from tensorway.metrics import BUCKETS, Metric, Sample
from tensorway_vllm.counting import folded, names, observations, packed, unpacked

PREFIX: Final = "vllm:tensorway_"
_ROWS: Final = "rows"
#: Labels that would make a line of the log long.
_NOT_LOGGED: Final = ("backend", "child", "peer", "rank")


class HandoverStats(KVConnectorStats):
    """What hand-overs have counted, from an engine to where it is logged and served."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> HandoverStats | None:
        """None if there is nothing to tell."""
        return cls(data={_ROWS: packed(samples)}) if samples else None

    def samples(self) -> list[Sample]:
        """Changes, and gauges."""
        return unpacked(self.data.get(_ROWS, ()))

    def reset(self) -> None:
        """Nothing was counted."""
        self.data: dict[str, Any] = {_ROWS: []}

    def aggregate(self, other: KVConnectorStats) -> HandoverStats:
        """Of several ranks, of the scheduler, of several steps."""
        assert isinstance(other, HandoverStats)
        self.data = {_ROWS: packed(folded([*self.samples(), *other.samples()], kv.METRICS))}
        return self

    def reduce(self) -> dict[str, int | float]:
        """For a line of the log: what was counted by what and why, and how long it took each time."""
        return _logged(self.samples())

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data.get(_ROWS)


class HandoverPromMetrics(KVConnectorPromMetrics):
    """What hand-overs have counted, for Prometheus."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {metric.name: self._made(metric) for metric in kv.METRICS.values()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """What one step has counted."""
        for sample in HandoverStats(data=transfer_stats_data).samples():
            labels = [*self.per_engine_labelvalues[engine_idx], *(text for _, text in sample.labels)]
            metric = self._metrics[sample.metric].labels(*labels)
            kind = kv.METRICS[sample.metric].kind
            if kind == "gauge":
                metric.set(sample.value)
            elif kind == "counter":
                metric.inc(sample.value)
            else:
                for seconds in observations(sample):
                    metric.observe(seconds)

    def _made(self, metric: Metric) -> Any:
        about = {
            "name": f"{PREFIX}{metric.name}",
            "documentation": metric.help,
            "labelnames": [*self._labelnames, *names(metric)],
        }
        if metric.kind == "gauge":
            # Several processes may serve, and each hears of some steps only.
            return self._gauge_cls(**about, multiprocess_mode="mostrecent")
        if metric.kind == "counter":
            return self._counter_cls(**about)
        return self._histogram_cls(**about, buckets=BUCKETS)


class OffloadingStats(OffloadingConnectorStats):
    """vLLM's, whose line of the log is as short as the other's."""

    def reduce(self) -> dict[str, int | float]:
        """vLLM's own words, and ours."""
        ours: list[Sample] = []
        for name, rows in self._values.items():
            metric = offload.METRICS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
            if metric is None:
                continue
            for texts, value in rows.items():
                labels = tuple(zip(names(metric), texts, strict=True))
                several = isinstance(value, list)
                ours.append(Sample(metric.name, labels, *((sum(value), len(value)) if several else (value,))))
        told = {name: value for name, value in super().reduce().items() if not name.startswith(PREFIX)}
        return {**told, **_logged(ours)}


def _logged(samples: Sequence[Sample]) -> dict[str, int | float]:
    """What is not zero, by name and by what makes it short to read; of times, that of each."""
    sums: dict[str, list[float]] = {}
    for sample in samples:
        texts = [text for name, text in sample.labels if text and name not in _NOT_LOGGED]
        name = f"{sample.metric}({' '.join(texts)})" if texts else sample.metric
        row = sums.setdefault(name, [0.0, 0.0])
        row[0] += sample.value
        row[1] += sample.count
    return {name: round(value / count, 6) if count else value for name, (value, count) in sums.items() if value}


def offloading_definitions() -> dict[str, OffloadingMetricMetadata]:
    """What the spec tells vLLM of the metrics that its managers and workers have."""
    kinds: dict[str, Any] = {"counter": OffloadingCounterMetadata, "gauge": OffloadingGaugeMetadata}
    made: dict[str, OffloadingMetricMetadata] = {}
    for metric in offload.METRICS.values():
        if metric.kind == "seconds":
            made[PREFIX + metric.name] = OffloadingHistogramMetadata(metric.help, names(metric), BUCKETS)
        else:
            made[PREFIX + metric.name] = kinds[metric.kind](metric.help, names(metric))
    return made


def offloading_stats(samples: Sequence[Sample]) -> OffloadingConnectorStats | None:
    """Changes of what a manager or a worker counts, as vLLM's own connector tells them; None if there are none."""
    if not samples:
        return None
    stats = OffloadingConnectorStats()
    for sample in samples:
        name, labels = PREFIX + sample.metric, tuple(text for _, text in sample.labels)
        kind = offload.METRICS[sample.metric].kind
        if kind == "gauge":
            stats.set_gauge(name, sample.value, labels)
        elif kind == "counter":
            stats.increase_counter(name, sample.value, labels)
        else:
            for seconds in observations(sample):
                stats.observe_histogram(name, seconds, labels)
    return stats
