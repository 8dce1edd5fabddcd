"""What a user may set in `kv_connector_extra_config`. May import attrs, and the core's errors and check of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted

_ASKED: Final = "kv_connector_extra_config was given to Tensorway's offloading in vLLM."
_SEE: Final = "See docs/vllm.md."
#: Options of vLLM's own offloading specs that nobody would read here, and what to give for them.
_VLLMS: Final = {
    "cpu_bytes_to_use": "Give 'options': {'capacity_bytes': ...}.",
    "eviction_policy": "Give 'options': {'policy': ...}.",
    "cache_policy_module_path": "Give 'options': {'policy': ...}; policies are found by their entry points.",
    "store_threshold": "Give 'options': {'manager': {'store_threshold': ...}}.",
    "max_tracker_size": "Give 'options': {'manager': {'sightings': ...}}.",
    "secondary_tiers": "Give 'options': {'tiers': [{'backend': ...}]}.",
    "backpressure": "Give 'options': {'tiers': [{'backend': ..., 'limits': ...}]}.",
    "canonical_layout": "Leave it out: what is stored is independent of tensor parallelism where 'kv_heads' is known.",
}


@attrs.frozen
class SpecOptions:
    """Options of Tensorway's offloading, beside those that vLLM reads itself."""

    #: Which `offloading` backend keeps the blocks, and its options.
    backend: str = "cpu"
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: What makes KV of this engine different from that of others with the same model name: a revision, an adapter.
    #: Engines share tiers only if they say the same.
    facts: dict[str, str] = attrs.field(factory=dict)
    #: Seconds for which the engine waits for copies of pages that it wants back.
    flush_seconds: float = attrs.field(default=60.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])
    #: Seconds that opening the backend may take.
    open_seconds: float = attrs.field(default=60.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])
    #: Seconds for which a request may wait to hear whether its blocks are there; then they are misses for it.
    lookup_seconds: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])
    #: KV heads of the model, with which engines of another tensor-parallel size can load what is stored. None asks
    #: vLLM, which says it to `TensorwayOffloadingConnector` only; 0 keeps each rank's pages whole.
    kv_heads: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    #: Whether engines of other block sizes can load it, if vLLM gives their blocks equal hashes. On a processor it is
    #: stored in small pieces then.
    other_block_sizes: bool = False
    # What vLLM itself reads of the same mapping; named here so that what nobody reads is an error.
    spec_name: str = ""
    spec_module_path: str | None = None
    block_size: int | None = None
    blocks_per_chunk: int | None = None
    offload_prompt_only: bool = True
    self_describing_kv_events: bool = False


def options_of(extra: Mapping[str, object]) -> SpecOptions:
    """Options from vLLM's mapping; raises `OptionsInvalid`, with the nearest name for one that is unknown."""
    for name in extra:
        if name in _VLLMS:
            raise OptionsInvalid(_ASKED, f"{name!r} is of vLLM's own offloading, and not read by ours.", _VLLMS[name])
    return fitted(SpecOptions, dict(extra), _ASKED, _SEE)
