"""What a user may set in `kv_connector_extra_config`. May import attrs, and the core's check of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from tensorway.plugins.options import fitted

_ASKED: Final = "kv_connector_extra_config was given to Tensorway's offloading in vLLM."
_SEE: Final = "See the README of tensorway-vllm."


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
    # What vLLM itself reads of the same mapping; named here so that what nobody reads is an error.
    spec_name: str = ""
    spec_module_path: str | None = None
    block_size: int | None = None
    blocks_per_chunk: int | None = None
    offload_prompt_only: bool = True
    self_describing_kv_events: bool = False


def options_of(extra: Mapping[str, object]) -> SpecOptions:
    """Options from vLLM's mapping; raises `OptionsInvalid`, with the nearest name for one that is unknown."""
    return fitted(SpecOptions, dict(extra), _ASKED, _SEE)
