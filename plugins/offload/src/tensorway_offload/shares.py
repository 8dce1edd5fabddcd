"""How many of the rows in host memory each tenant has, and how many it may have. May import the core's offload room.

What a tenant may have in a tier below is the `quota` of that tier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tensorway.offload import OffloadKey, key_tenant


class Shares:
    """Rows by tenant, if they are limited. Tenants without rows are not remembered."""

    def __init__(self, capacity: int, share: float | None) -> None:
        #: None if there is no limit.
        self.limit = None if share is None else max(1, int(capacity * share))
        self.rows: dict[bytes, int] = {}

    def added(self, keys: Sequence[OffloadKey]) -> None:
        """These have rows now."""
        if self.limit is None:
            return
        for tenant, count in _by_tenant(keys).items():
            self.rows[tenant] = self.rows.get(tenant, 0) + count

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """These have none any more."""
        if self.limit is None:
            return
        for tenant, count in _by_tenant(keys).items():
            left = self.rows[tenant] - count
            if left:
                self.rows[tenant] = left
            else:
                del self.rows[tenant]

    def over(self, keys: Sequence[OffloadKey]) -> dict[bytes, int]:
        """How many rows of its own each tenant must give for these, which are new."""
        if self.limit is None:
            return {}
        wanted = {tenant: self.rows.get(tenant, 0) + n - self.limit for tenant, n in _by_tenant(keys).items()}
        return {tenant: count for tenant, count in wanted.items() if count > 0}

    def fitting(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """The first of these of each tenant, as many as it may have at all."""
        if self.limit is None or len(keys) <= self.limit:
            return list(keys)
        counts: Counter[bytes] = Counter()
        found = []
        for key in keys:
            counts[tenant := key_tenant(key)] += 1
            if counts[tenant] <= self.limit:
                found.append(key)
        return found

    def reset(self) -> None:
        """Nobody has any."""
        self.rows.clear()


def _by_tenant(keys: Sequence[OffloadKey]) -> Mapping[bytes, int]:
    """How many of these each tenant has."""
    return Counter(map(key_tenant, keys))
