"""`TensorwayOffloadingSpec`: what vLLM makes on both sides, from its configuration.

May import vllm, the core and this package.
"""

from __future__ import annotations

import platform
from typing import Any, Final

import attrs
import torch
import vllm.v1.kv_offload.base as theirs
from vllm.platforms import current_platform
from vllm.v1.kv_offload.config import OffloadingConfig

import tensorway
from tensorway.errors import Unsupported
from tensorway.offload import OffloadContext
from tensorway_vllm import metrics, plugin, probes, sources
from tensorway_vllm.offloading.inside import Inside
from tensorway_vllm.offloading.manager import ManagerAdapter
from tensorway_vllm.offloading.options import SpecOptions, options_of
from tensorway_vllm.offloading.pages import facts_of, geometries, mappings_of, page_bytes, tensors_of
from tensorway_vllm.offloading.worker import WorkerAdapter

#: Bytes of a number of the KV cache, for those whose packing on a processor is known.
_ITEMS: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
_AMX: Final = "+amx"


class TensorwayOffloadingSpec(theirs.OffloadingSpec):
    """See `vllm.v1.kv_offload.base.OffloadingSpec`; the options are `tensorway_vllm.offloading.options.SpecOptions`."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, theirs.OffloadingMetricMetadata]:
        """Names that managers and workers count by, asked where metrics are served."""
        return metrics.offloading_definitions()

    def __init__(self, config: OffloadingConfig) -> None:
        plugin.needed(plugin.SPEC[0])
        probes.check_offloading()
        self.options = options_of(config.extra_config)
        super().__init__(config)
        packing = _packing()
        self._inside = _inside(config, self.options, packing)
        backend = dict(self.options.options)
        if self.options.backend == "cpu":
            backend.setdefault("order", "HND")  # as pages have it, so that they are copied whole
        self._backend = backend
        self._context = OffloadContext(
            engine=f"vllm {config.engine_id}",
            role="manager",
            ranks=geometries(config, inside=self._inside),
            pages_per_block=config.cache.blocks_per_chunk,
            facts=facts_of(
                config,
                probes.version(),
                self.options.facts,
                self._inside,
                packing,
                self.options.other_block_sizes,
            ),
            deadline=self.options.open_seconds,
        )
        self._manager: ManagerAdapter | None = None
        self._worker: WorkerAdapter | None = None

    def get_manager(self) -> ManagerAdapter:
        """The scheduler's side, made at the first call."""
        if self._manager is None:
            manager = tensorway.create("offloading", self.options.backend, self._backend, self._context)
            self._manager = ManagerAdapter(
                manager,
                self.config.parallel.world_size,
                {group.group_id: place for place, group in enumerate(self.config.groups)},
                events=self.kv_events_config.enable_kv_cache_events,
                backend=self.options.backend,
                patience=self.options.lookup_seconds,
                below=_below(self.options),
            )
        return self._manager

    def get_worker(self, kv_caches: theirs.CanonicalKVCaches) -> WorkerAdapter:
        """The side of this rank, made at the first call."""
        if self._worker is None:
            parallel = self.config.parallel
            self._inside.compare(mappings_of(kv_caches), parallel.rank, parallel.world_size, page_bytes(self.config))
            context = attrs.evolve(
                self._context,
                role="worker",
                rank=parallel.rank,
                ranks=geometries(self.config, tensors_of(kv_caches), self._inside),
            )
            worker = tensorway.create("offloading", self.options.backend, self._backend, context)
            self._worker = WorkerAdapter(
                worker,
                context.pages_per_block,
                self.options.flush_seconds,
                kv_caches,
                backend=self.options.backend,
            )
        return self._worker


def _packing() -> str:
    """What decides how a head's keys and values lie in a page. On a processor it is the kind of processor."""
    if not current_platform.is_cpu():
        return "rows"
    return platform.machine() + (_AMX if torch.cpu._is_amx_tile_supported() else "")


def _inside(config: OffloadingConfig, options: SpecOptions, packing: str) -> Inside:
    heads = options.kv_heads or 0
    if not options.other_block_sizes:
        return Inside(heads)
    asked, to_do = "Engines of other block sizes were to load what is stored.", "Leave 'other_block_sizes' out."
    if not heads:
        true = "How many KV heads the model has is not known, or they are not divided evenly."
        raise Unsupported(asked, true, "Use TensorwayOffloadingConnector, give 'kv_heads', or leave the option out.")
    if packing == "rows":
        return Inside(heads)
    if packing.endswith(_AMX) or config.model.dtype not in _ITEMS:
        true = f"How vLLM packs {config.model.dtype} on {packing} is not known here."
        raise Unsupported(asked, true, to_do)
    return Inside(heads, _ITEMS[config.model.dtype])


def _below(options: SpecOptions) -> Any:
    """What vLLM calls the tiers below host memory: files, if all of them are."""
    tiers = options.options.get("tiers")
    names = {tier.get("backend") for tier in tiers if isinstance(tier, dict)} if isinstance(tiers, list) else set()
    return sources.DISK if names == {"fs"} else sources.OTHER
