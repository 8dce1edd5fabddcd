"""`TensorwayOffloadingConnector`: vLLM's own connector of offloading, and what it lacks: a load may fail.

May import vllm and this package. What vLLM's classes keep to themselves is not touched.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from tensorway._logging import logger
from tensorway_vllm import plugin
from tensorway_vllm.metrics import OffloadingStats
from tensorway_vllm.offloading.manager import ManagerAdapter
from tensorway_vllm.offloading.words import Outcome
from tensorway_vllm.offloading.worker import WorkerAdapter
from tensorway_vllm.plugin import SPEC

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logger("vllm")


class WorkerMetadata(OffloadingWorkerMetadata):
    """vLLM's, from workers to the scheduler, with what failed."""

    def __init__(self, base: OffloadingWorkerMetadata, outcome: Outcome) -> None:
        super().__init__(base.completed_jobs, base.transfer_stats)
        self.outcome = outcome

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of several workers, of which some may have nothing to tell but what vLLM's own class does."""
        merged = super().aggregate(other)
        told = [self.outcome, *([other.outcome] if isinstance(other, WorkerMetadata) else [])]
        return WorkerMetadata(merged, Outcome.of(told))


class TensorwayOffloadingConnector(OffloadingConnector):
    """See `vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        plugin.needed(plugin.CONNECTOR[0])
        _name_spec(vllm_config)
        _say_heads(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        #: vLLM takes block numbers of what failed for a single cache group only; of several, it takes requests.
        self._by_request = len(kv_cache_config.kv_cache_groups) > 1
        #: Of loads that workers have begun, whose they are.
        self._loading: dict[int, str] = {}
        #: On the scheduler's side: requests whose loads begin in this step.
        self._begun: set[str] = set()
        #: Nothing was planned since the last reset: vLLM asserts that what a reset leaves to flush is planned before
        #: the next one, and there is nothing more to forget.
        self._forgotten = False
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            _log.warning(
                "Requests whose KV blocks cannot be loaded will fail, for kv_load_failure_policy is 'fail'. "
                "Set it to 'recompute' in the KV transfer configuration, and they are computed."
            )

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> OffloadingStats:
        """What a step has told, where it is logged."""
        return OffloadingStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, *given: Any, **named: Any) -> KVConnectorPromMetrics:
        """Where metrics are served no connector is made, and the configuration is as it was written."""
        plugin.needed(plugin.CONNECTOR[0])
        _name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *given, **named)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was counted on this side since the last call."""
        worker = self._worker()
        return super().get_kv_connector_stats() if worker is None else worker.stats()

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Its blocks are there; a load of it may begin."""
        if num_external_tokens:
            self._begun.add(request.request_id)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What this step is. A reset preempts requests and lets them load in one step; vLLM takes a preempted request
        to have stores only, and its assertion would end the engine. One that loads has no stores to wait for.
        """
        preempted, begun = scheduler_output.preempted_req_ids, self._begun
        self._begun, self._forgotten = set(), False
        if preempted and not begun.isdisjoint(preempted):
            scheduler_output = dataclasses.replace(scheduler_output, preempted_req_ids=preempted - begun)
        return super().build_connector_meta(scheduler_output)

    def reset_cache(self) -> bool | None:
        """Forget what is offloaded."""
        done = True if self._forgotten else super().reset_cache()
        self._forgotten = True
        return done

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The worker is made; from now on this connector hears of what fails."""
        super().register_kv_caches(kv_caches)
        worker = self._worker()
        if worker is not None:
            worker.heard = True

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        """From a worker to the scheduler, after each step."""
        told, worker = super().build_connector_worker_meta(), self._worker()
        if told is None or worker is None:
            return told
        return WorkerMetadata(told, worker.outcome())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """From workers: the manager hears what failed before vLLM completes the jobs."""
        told: Any = connector_output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata) and isinstance(self.scheduler.manager, ManagerAdapter):
            self.scheduler.manager.told(told.outcome)
        super().update_connector_output(connector_output)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads begin; it is remembered whose they are."""
        told = self._connector_metadata
        if self._by_request and isinstance(told, OffloadingConnectorMetadata):
            self._loading.update({job: entry.req_id for job, entry in told.load_jobs.items()})
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended. With several cache groups, a request of which a block failed has failed."""
        told, worker = super().get_transfer_results(finished_req_ids), self._worker()
        if not self._by_request or worker is None:
            return told
        worker.bad_pages()
        failed = worker.bad_jobs()
        told.failed_recving |= {self._loading[job] for job in failed if job in self._loading}
        self._loading = {job: req for job, req in self._loading.items() if req not in told.finished_recving}
        return told

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that vLLM must compute, or fail their requests, as `kv_load_failure_policy` says."""
        worker = self._worker()
        if worker is None or self._by_request:
            return set()
        worker.bad_jobs()
        return worker.bad_pages()

    def _worker(self) -> WorkerAdapter | None:
        worker = self.connector_worker.worker if self.connector_worker is not None else None
        return worker if isinstance(worker, WorkerAdapter) else None


def _name_spec(vllm_config: VllmConfig) -> None:
    """Ours, if the configuration names none; with or without the plugin, whose names `VLLM_PLUGINS` may leave out."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.setdefault("spec_name", SPEC[0])
    if extra["spec_name"] == SPEC[0] and SPEC[0] not in OffloadingSpecFactory._registry:
        extra.setdefault("spec_module_path", SPEC[1])


def _say_heads(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """How many KV heads the model has, if they are divided evenly and pages have them one by one; else that it is none.

    vLLM's offloading configuration does not say it. A user who does has said it already.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if extra["spec_name"] != SPEC[0] or extra.get("kv_heads") is not None:
        return
    heads, ranks = vllm_config.model_config.get_total_num_kv_heads(), vllm_config.parallel_config.tensor_parallel_size
    groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    layers = [each for spec in groups for each in _of_layers(spec)]
    even = heads % ranks == 0 or ranks % heads == 0
    plain = all(
        type(spec) in (FullAttentionSpec, SlidingWindowSpec)
        and spec.num_kv_heads == max(1, heads // ranks)
        and not spec.kv_quant_mode.is_per_token_head
        for spec in layers
    )
    extra["kv_heads"] = heads if even and plain else 0


def _of_layers(spec: Any) -> list[Any]:
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
