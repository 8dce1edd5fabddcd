"""`TensorwayOffloadingSpec`: what vLLM makes on both sides, from its configuration.

May import vllm, the core and this package.
"""

from __future__ import annotations

from typing import Any

import attrs
import vllm.v1.kv_offload.base as theirs
from vllm.v1.kv_offload.config import OffloadingConfig

import tensorway
from tensorway.offload import OffloadContext
from tensorway_vllm import metrics, probes
from tensorway_vllm.manager import ManagerAdapter
from tensorway_vllm.options import options_of
from tensorway_vllm.pages import facts_of, geometries, tensors_of
from tensorway_vllm.worker import WorkerAdapter


class TensorwayOffloadingSpec(theirs.OffloadingSpec):
    """See `vllm.v1.kv_offload.base.OffloadingSpec`; the options are `tensorway_vllm.options.SpecOptions`."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, theirs.OffloadingMetricMetadata]:
        """Names that managers and workers count by, asked where metrics are served."""
        return metrics.offloading_definitions()

    def __init__(self, config: OffloadingConfig) -> None:
        probes.check_offloading()
        self.options = options_of(config.extra_config)
        super().__init__(config)
        self._context = OffloadContext(
            engine=f"vllm {config.engine_id}",
            role="manager",
            ranks=geometries(config),
            pages_per_block=config.cache.blocks_per_chunk,
            facts=facts_of(config, probes.version(), self.options.facts),
            deadline=self.options.open_seconds,
        )
        self._manager: ManagerAdapter | None = None
        self._worker: WorkerAdapter | None = None

    def get_manager(self) -> ManagerAdapter:
        """The scheduler's side, made at the first call."""
        if self._manager is None:
            manager = tensorway.create("offloading", self.options.backend, self.options.options, self._context)
            self._manager = ManagerAdapter(
                manager,
                self.config.parallel.world_size,
                {group.group_id: place for place, group in enumerate(self.config.groups)},
                self.kv_events_config.enable_kv_cache_events,
            )
        return self._manager

    def get_worker(self, kv_caches: theirs.CanonicalKVCaches) -> WorkerAdapter:
        """The side of this rank, made at the first call."""
        if self._worker is None:
            context = attrs.evolve(
                self._context,
                role="worker",
                rank=self.config.parallel.rank,
                ranks=geometries(self.config, tensors_of(kv_caches)),
            )
            worker = tensorway.create("offloading", self.options.backend, self.options.options, context)
            self._worker = WorkerAdapter(worker, context.pages_per_block, self.options.flush_seconds, kv_caches)
        return self._worker
