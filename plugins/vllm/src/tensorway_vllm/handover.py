"""`TensorwayConnector`: hands requests over between vLLM engines, by any connector of Tensorway.

May import vllm, the core and this package. Whole pages go over: what is inside of a page is the attention backend's
own affair, and the tokens behind the last whole page are computed by who decodes.

What the planner decides goes to the workers with its plan, and comes back from them as vLLM wants to hear it: a request
is told to have ended by all ranks in one step, after all of them have the plan that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config

import tensorway
from tensorway._logging import logger
from tensorway.errors import Unsupported
from tensorway.kv import METRICS, KVContext, Mover, Planner, RequestView, Result
from tensorway.plugins.options import fitted
from tensorway_vllm import probes
from tensorway_vllm.counting import Counting
from tensorway_vllm.metrics import HandoverPromMetrics, HandoverStats
from tensorway_vllm.pages import facts_of, geometries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from tensorway.metrics import Sample

_log = logger("vllm")
_ASKED: Final = "kv_connector_extra_config was given to TensorwayConnector."
#: Under which the ticket, or the wish for one, is in `kv_transfer_params`.
TICKET: Final = "tensorway"
HAND_OVER: Final = "hand_over"
#: Why a request ends that was not given up.
_SAID: Final = ("stop", "length", "repetition")


@attrs.frozen
class HandoverOptions:
    """Options of `TensorwayConnector`."""

    #: Where engines meet, and its options.
    rendezvous: str
    rendezvous_options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Which `kv_connector`, and its options.
    connector: str = "handover"
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: What engines must agree on beside model, type and layout, such as a revision.
    facts: dict[str, str] = attrs.field(factory=dict)
    #: Seconds that opening may take, and for which pages are waited for that vLLM wants back.
    open_seconds: float = attrs.field(default=60.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])
    flush_seconds: float = attrs.field(default=60.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])


class Metadata(KVConnectorMetadata):
    """Of one step, from the scheduler to all workers."""

    def __init__(self, plan: bytes, sent: set[str], received: set[str], failed: set[str]) -> None:
        self.plan, self.sent, self.received, self.failed = plan, sent, received, failed


class WorkerMetadata(KVConnectorWorkerMetadata):
    """What movers say, by their ranks."""

    def __init__(self, said: Mapping[int, list[Result]]) -> None:
        self.said = dict(said)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of several workers."""
        assert isinstance(other, WorkerMetadata)
        ranks = {*self.said, *other.said}
        return WorkerMetadata({rank: [*self.said.get(rank, ()), *other.said.get(rank, ())] for rank in ranks})


class TensorwayConnector(KVConnectorBase_V1, SupportsHMA):
    """See `vllm.distributed.kv_transfer.kv_connector.v1.base`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        given = vllm_config.kv_transfer_config
        self._options = fitted(HandoverOptions, given.kv_connector_extra_config, _ASKED, "See tensorway-vllm.")
        if len(kv_cache_config.kv_cache_groups) != 1:
            true = f"The model has {len(kv_cache_config.kv_cache_groups)} cache groups."
            raise Unsupported(_ASKED, true, "Hand over models with one cache group.")
        self._config = build_offloading_config(vllm_config, kv_cache_config)
        self._pages, self._tokens = kv_cache_config.num_blocks, self._config.groups[0].tokens_per_block
        side = Scheduling if role is KVConnectorRole.SCHEDULER else Working
        self._side: Any = side(self._options, self._config)
        self._counting = Counting(self._side.statistics, METRICS)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """A page of a layer in one piece."""
        return "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HandoverStats:
        """What a step has told, where it is logged."""
        return HandoverStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *given: Any, **named: Any) -> HandoverPromMetrics:
        """What Prometheus is told, where it asks."""
        return HandoverPromMetrics(*given, **named)

    def get_kv_connector_stats(self) -> HandoverStats | None:
        """What was counted on this side since the last call."""
        return HandoverStats.of(self._counting.changes())

    # -- the scheduler's side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond these come from elsewhere; None if it is not known yet."""
        found: tuple[int | None, bool] = self._side.matched(request, num_computed_tokens)
        return found

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Its blocks are there."""
        self._side.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What this step is, for all workers."""
        step: Metadata = self._side.step()
        return step

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What movers have said."""
        told: Any = connector_output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            for rank, results in told.said.items():
                self._side.planner.on_results(rank, results)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks are kept, and the ticket."""
        ended: tuple[bool, dict[str, Any] | None] = self._side.finished(request, block_ids)
        return ended

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same."""
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must go on stepping without requests."""
        return bool(self._side.busy())

    # -- the worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The memory of this rank."""
        names = self._config.groups[0].layer_names
        self._side.register([_flat(kv_caches[name], self._pages) for name in names])

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """A step begins."""
        told = self._get_connector_metadata()
        assert isinstance(told, Metadata)
        self._side.begin(told)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Pages are about to be written that somebody may still read."""
        self._side.flush()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests whose blocks are on their way are not computed."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are read where they lie."""

    def wait_for_save(self) -> None:
        """Blocks are read where they lie."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What the planner has decided for this step."""
        told = self._get_connector_metadata()
        assert isinstance(told, Metadata)
        return KVConnectorTransferResults(set(told.sent), set(told.received), set(told.failed))

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the mover has to say."""
        said: list[Result] = self._side.said()
        return WorkerMetadata({self._config.parallel.rank: said}) if said else None

    def shutdown(self) -> None:
        """End."""
        self._side.close()


class Scheduling:
    """The planner, and which requests vLLM has parked or keeps for it: nothing is told of any other."""

    def __init__(self, options: HandoverOptions, config: Any) -> None:
        self._tokens = config.groups[0].tokens_per_block
        self._rendezvous, made = _made(options, config, "planner", geometries(config)[0])
        self.planner: Planner = made
        self._have: dict[str, int] = {}
        self._reserved: set[str] = set()
        self._parked: set[str] = set()
        self._kept: set[str] = set()

    def matched(self, request: Request, have: int) -> tuple[int | None, bool]:
        """See `get_num_new_matched_tokens`. Of a request that was asked for once, there is nothing any more."""
        if request.request_id in self._reserved or _ticket(request) is None:
            return 0, False
        match = self.planner.lookup(self._view(request), have)
        if match.mode == "later":
            return None, False
        self._have[request.request_id] = have
        whole = (have + match.tokens) // self._tokens * self._tokens - have
        return (whole, True) if whole > 0 and match.mode != "nothing" else (0, False)

    def allocated(self, request: Request, pages: list[int], tokens: int) -> None:
        """See `update_state_after_alloc`."""
        name = request.request_id
        if name in self._reserved or _ticket(request) is None:
            return
        have = self._have.pop(name, 0)
        self._reserved.add(name)
        if tokens:
            self._parked.add(name)
        self.planner.reserve(self._view(request), [pages[: -(-(have + tokens) // self._tokens)]], have, tokens)

    def step(self) -> Metadata:
        """See `build_connector_meta`."""
        step = self.planner.plan_step()
        sent = self._kept & set(step.released)
        failed = self._parked & set(step.failed)
        received = (self._parked & set(step.received)) | failed
        self._kept -= sent
        self._parked -= received
        return Metadata(step.plan, sent, received, failed)

    def finished(self, request: Request, pages: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`. What is still written to, vLLM keeps until it hears that it is received."""
        name = request.request_id
        self._have.pop(name, None)
        self._reserved.discard(name)
        if name in self._parked:
            self.planner.cancel(name)
            return False, None
        whole = min(request.num_computed_tokens // self._tokens, len(pages))
        aborted = str(request.get_finished_reason()) not in _SAID
        kept = self.planner.finish(self._view(request), [pages[:whole]], whole * self._tokens, aborted=aborted)
        if kept.keep:
            self._kept.add(name)
        return kept.keep, None if kept.ticket is None else {TICKET: dict(kept.ticket)}

    def busy(self) -> bool:
        """Whether steps are needed."""
        return bool(self._kept) or self.planner.busy()

    def statistics(self) -> Sequence[Sample]:
        """What the planner counts."""
        return self.planner.statistics()

    def close(self) -> None:
        """End."""
        self.planner.close()
        self._rendezvous.close()

    def _view(self, request: Request) -> RequestView:
        given = request.kv_transfer_params or {}
        return RequestView(
            request.request_id,
            request.num_tokens // self._tokens * self._tokens or request.num_tokens,
            _ticket(request),
            hand_over=given.get(HAND_OVER) is True,
        )


class Working:
    """The mover. It joins the planner's life, which comes after the memory: so it is made in the first step."""

    def __init__(self, options: HandoverOptions, config: Any) -> None:
        self._options, self._config = options, config
        self._memory: list[Any] = []
        self._mover: Mover | None = None
        self._rendezvous: Any = None

    def register(self, memory: list[Any]) -> None:
        """See `register_kv_caches`."""
        self._memory = memory
        geometries(self._config, [memory])  # what does not fit is said now

    def begin(self, step: Metadata) -> None:
        """See `start_load_kv`."""
        if self._mover is None:
            geometry = geometries(self._config, [self._memory])[self._config.parallel.rank]
            self._rendezvous, self._mover = _made(self._options, self._config, "mover", geometry)
        self._mover.submit(step.plan)

    def said(self) -> list[Result]:
        """What has ended."""
        return self._mover.poll() if self._mover is not None else []

    def flush(self) -> None:
        """See `handle_preemptions`."""
        if self._mover is not None:
            self._mover.flush(self._options.flush_seconds)

    def statistics(self) -> Sequence[Sample]:
        """What the mover counts."""
        return self._mover.statistics() if self._mover is not None else ()

    def close(self) -> None:
        """End."""
        if self._mover is not None:
            self._mover.close()
            self._rendezvous.close()


def _made(options: HandoverOptions, config: Any, role: Any, geometry: Any) -> tuple[Any, Any]:
    """Where engines meet, and the side that is there."""
    rendezvous = tensorway.create("rendezvous", options.rendezvous, options.rendezvous_options)
    facts = facts_of(config, probes.version(), options.facts)
    parallel = config.parallel
    context = KVContext(
        config.engine_id,
        rendezvous,
        role,
        parallel.world_size,
        parallel.rank if role == "mover" else 0,
        geometry,
        facts,
        options.open_seconds,
    )
    try:
        return rendezvous, tensorway.create("kv_connector", options.connector, options.options, context)
    except BaseException:
        rendezvous.close()
        raise


def _ticket(request: Request) -> Mapping[str, Any] | None:
    """As it came; a client may have written it."""
    given = (request.kv_transfer_params or {}).get(TICKET)
    return given if isinstance(given, dict) else None


def _flat(tensor: torch.Tensor, pages: int) -> Any:
    """A layer's pages as bytes."""
    import torch
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    whole = group_kernel_blocks(tensor, pages)
    stride = whole.stride(0) * whole.element_size()
    flat = torch.tensor([], dtype=torch.int8, device=whole.device)
    return flat.set_(
        whole.untyped_storage(), whole.storage_offset() * whole.element_size(), (pages, stride), (stride, 1)
    )
