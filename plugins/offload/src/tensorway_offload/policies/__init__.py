"""Orders of eviction: `lru`, `arc`, `s3fifo`, `sieve`, `tinylfu`, and `foresight`, which learns when blocks come back.

Each module may import the core's offload room and `recency`; none knows the manager that asks it.
"""

from __future__ import annotations
