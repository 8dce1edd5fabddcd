"""How many bytes of each tenant a tier has, as far as this engine knows: what it wrote, or what the tier says.

May import the core's offload room. A tier that counts tenants is believed; of one that does not, it is what this engine
has written and not deleted, which is never too little of its own. What a tenant may have in host memory is in `shares`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tensorway.metrics import Sample
from tensorway.offload import OffloadKey, OfTenant, key_tenant

_METRIC = "offload_tenant_blocks"


class Quota:
    """Of one tier; the same for each tenant."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used: Counter[bytes] = Counter()
        self._blocks = self._nbytes = 0
        self._heard: Sequence[Sample] = ()

    def admit(self, sizes: Sequence[tuple[OffloadKey, int]]) -> list[bool]:
        """Which of these may be written, if those before them are."""
        if not self._most:
            return [True] * len(sizes)
        new: Counter[bytes] = Counter()
        found = []
        for key, size in sizes:
            tenant = key_tenant(key)
            fits = self._used[tenant] + new[tenant] + size <= self._most
            new[tenant] += size if fits else 0
            found.append(fits)
        return found

    def wrote(self, sizes: Iterable[tuple[OffloadKey, int]]) -> None:
        """These are there now, or will be."""
        for key, size in sizes:
            self._used[key_tenant(key)] += size
            self._blocks, self._nbytes = self._blocks + 1, self._nbytes + size

    def withdrew(self, sizes: Iterable[tuple[OffloadKey, int]]) -> None:
        """These are not there after all, or not any more."""
        for key, size in sizes:
            tenant = key_tenant(key)
            self._used[tenant] = max(0, self._used[tenant] - size)

    def deleted(self, which: OfTenant) -> None:
        """Nothing of this tenant is there."""
        self._used.pop(which.tenant, None)

    def heard(self, samples: Sequence[Sample]) -> None:
        """What the tier says of its tenants, in blocks of the mean size of those that were written."""
        if samples is self._heard or not self._blocks:
            return
        self._heard = samples
        mean = self._nbytes / self._blocks
        said = [(dict(s.labels).get("tenant", ""), s.value) for s in samples if s.metric == _METRIC]
        if said:
            self._used = Counter({_tenant(name): int(value * mean) for name, value in said})


def _tenant(name: str) -> bytes:
    """What keys say of a tenant whom metrics call so."""
    try:
        return bytes.fromhex(name)
    except ValueError:
        return bytes(8)  # `none`, and what nobody could read
