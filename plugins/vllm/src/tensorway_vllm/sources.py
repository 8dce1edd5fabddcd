"""What vLLM calls the places that cached tokens come from, where it has words for them: 0.32 and newer.

May import vllm. An older vLLM does not ask, and has nothing here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

#: Memory of the host, another engine, files, and what has no word.
HOST: Any = None
PEER: Any = None
DISK: Any = None
OTHER: Any = None

if importlib.util.find_spec("vllm.v1.metrics.cache_hit_source") is not None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HOST, PEER = CacheHitSource.HOST, CacheHitSource.P2P
    DISK, OTHER = CacheHitSource.DISK, CacheHitSource.EXTERNAL_UNSPECIFIED
