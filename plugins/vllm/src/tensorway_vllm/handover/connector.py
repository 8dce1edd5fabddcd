"""`TensorwayConnector`, as vLLM makes it on both sides: its calls, given to the side that they are for.

May import vllm, the core and this package, and no device library.

Workers need no handshake (`get_handshake_metadata`): movers meet in the rendezvous. Nor is a quorum needed
(`get_finished_count`): the planner has heard of all ranks before vLLM is told anything, and all ranks report it in one
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from tensorway._logging import logger
from tensorway.kv import METRICS
from tensorway_vllm import plugin, probes, sources
from tensorway_vllm.counting import Counting
from tensorway_vllm.handover.making import Opened, Recipe
from tensorway_vllm.handover.memory import attention_of, facts_of, geometry, shape_of
from tensorway_vllm.handover.options import check, options_of
from tensorway_vllm.handover.scheduling import Scheduling
from tensorway_vllm.handover.words import Step, WorkerMetadata
from tensorway_vllm.handover.working import Working
from tensorway_vllm.metrics import HandoverPromMetrics, HandoverStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logger("vllm")


class TensorwayConnector(KVConnectorBase_V1, SupportsHMA):
    """See `vllm.distributed.kv_transfer.kv_connector.v1.base`."""

    if sources.PEER is not None:
        _cache_hit_source = sources.PEER

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        plugin.needed(plugin.HANDOVER[0])
        probes.check_handover(scheduling=role is KVConnectorRole.SCHEDULER)
        super().__init__(vllm_config, role, kv_cache_config)
        given = vllm_config.kv_transfer_config
        self._options = options_of(given.kv_connector_extra_config)
        check(self._options, given.engine_id, memory=role is KVConnectorRole.WORKER)
        self._shape = shape_of(vllm_config, kv_cache_config)
        self._recipe = Recipe(self._options, given.engine_id, vllm_config.parallel_config.world_size)
        self._rank = vllm_config.parallel_config.rank
        if given.is_kv_consumer and given.kv_load_failure_policy != "recompute":
            _log.warning(
                "Requests whose KV blocks do not come will fail, for kv_load_failure_policy is 'fail'. "
                "Set it to 'recompute' in the KV transfer configuration, and they are computed."
            )
        #: One of both sides; vLLM calls no method that is for the other one.
        self._side: Any = None
        if role is KVConnectorRole.SCHEDULER:
            self._side = Scheduling(
                self._options,
                self._shape,
                lambda: self._recipe.make("planner", 0, geometry(self._shape, 0), self._facts()),
                self._recipe.ranks,
                consumer=given.is_kv_consumer,
                producer=given.is_kv_producer,
            )
        self._counting = Counting(lambda: () if self._side is None else self._side.statistics(), METRICS)

    def _facts(self) -> dict[str, str]:
        options, about = self._options, (self._vllm_config, self._kv_cache_config, probes.version())
        return facts_of(*about, options.model, options.facts)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """By the option `layout`: pages are handed over as they lie, so a page of a layer must be one piece."""
        return options_of(vllm_config.kv_transfer_config.kv_connector_extra_config).layout or None

    # -- what was counted

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HandoverStats:
        """What a step has told, where it is logged."""
        return HandoverStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *given: Any, **named: Any) -> HandoverPromMetrics:
        """What Prometheus is told, where it asks."""
        plugin.needed(plugin.HANDOVER[0])
        return HandoverPromMetrics(*given, **named)

    def get_kv_connector_stats(self) -> HandoverStats | None:
        """What was counted on this side since the last call."""
        return HandoverStats.of(self._counting.changes())

    # -- the scheduler's side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond these come from elsewhere; None if it is not known yet."""
        found: tuple[int | None, bool] = self._side.matched(request, num_computed_tokens)
        return found

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """All that are handed over: a request's own pages, not those of a store by their hashes."""
        return tuple(group.place for group in self._shape.groups)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Its pages are there."""
        if self._side.concerns(request):
            self._side.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What this step is, for all workers."""
        step: Step = self._side.step()
        return step

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What movers have said. Of requests whose pages all ranks have, vLLM learns here: workers need not say so."""
        told: Any = connector_output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            received: set[str] = self._side.heard(told.said)
            if received:
                connector_output.finished_recving = received.union(connector_output.finished_recving or ())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether its pages are kept, and the ticket."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same."""
        if not self._side.concerns(request):
            return False, None
        ended: tuple[bool, dict[str, Any] | None] = self._side.finished(request, block_ids)
        return ended

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must go on stepping without requests."""
        return bool(self._side.busy())

    def reset_cache(self) -> bool:
        """What is kept is taken back."""
        return bool(self._side.reset())

    # -- the worker's side

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The memory of this rank. What cannot be handed over is an error here, before any request comes."""
        pages = geometry(self._shape, self._rank, kv_caches, attention_of(self._vllm_config, self._shape))
        device = next(tensor.device for tensor in kv_caches.values())
        facts = self._facts()

        def make() -> Opened[Any]:
            _use(device)
            return self._recipe.make("mover", self._rank, pages, facts)

        self._side = Working(make)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """A step begins."""
        self._side.begin(self._told())

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Pages of preempted requests are read and written by nobody else: vLLM keeps those that are."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests whose pages are on their way are not computed."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are read where they lie."""

    def wait_for_save(self) -> None:
        """Pages are read where they lie."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What the scheduler's side has decided for this step."""
        told = self._told()
        return KVConnectorTransferResults(set(told.sent), set(told.received), set(told.failed))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages of requests that came in part."""
        return set(self._told().bad)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the mover has to say."""
        said = self._side.said(self._told().listen)
        return WorkerMetadata({self._rank: (said,)}) if said is not None else None

    def shutdown(self) -> None:
        """End."""
        if self._side is not None:
            self._side.close()

    def _told(self) -> Step:
        told = self._get_connector_metadata()
        assert isinstance(told, Step)
        return told


def _use(device: torch.device) -> None:
    """A thread that registers memory of a device must be one that uses it."""
    if device.type != "cpu":
        import torch

        torch.accelerator.set_device_index(device)
