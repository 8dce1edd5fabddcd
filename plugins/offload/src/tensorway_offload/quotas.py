"""How many rows each tenant has, and how many it may have. May import the core's offload room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from tensorway.offload import OffloadKey

#: Where a key says whose block it is, as `tensorway.offload.key_tenant` reads it.
_TENANT: Final = slice(-12, -4)


class Quotas:
    """Rows by tenant. Tenants without rows are not remembered."""

    def __init__(self, capacity: int, share: float | None) -> None:
        #: None if there is no limit.
        self.limit = None if share is None else max(1, int(capacity * share))
        self.rows: dict[bytes, int] = {}

    def added(self, keys: Sequence[OffloadKey]) -> None:
        """These have rows now."""
        for tenant, count in _by_tenant(keys).items():
            self.rows[tenant] = self.rows.get(tenant, 0) + count

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """These have none any more."""
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
            counts[key[_TENANT]] += 1
            if counts[key[_TENANT]] <= self.limit:
                found.append(key)
        return found

    def reset(self) -> None:
        """Nobody has any."""
        self.rows.clear()


def tenant(key: OffloadKey) -> bytes:
    """Whose block it is."""
    return key[_TENANT]


def _by_tenant(keys: Sequence[OffloadKey]) -> Mapping[bytes, int]:
    """How many of these each tenant has; they are mostly of one."""
    tenants = {key[_TENANT] for key in keys}
    return dict.fromkeys(tenants, len(keys)) if len(tenants) == 1 else Counter(key[_TENANT] for key in keys)
