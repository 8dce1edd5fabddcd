"""The manager: that of `tensorway-offload` over rows of host memory, with a policy and tiers by their names.

May import the core, `tensorway-offload` and this package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import tensorway
from tensorway.offload import Lender, OffloadContext, OffloadKey, PolicyContext, TierContext, key_group
from tensorway.plugins.options import fitted
from tensorway_cpu.canonical import Canon, canonical
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.options import SEE, CPUOptions, tiers_of
from tensorway_cpu.region import Rows, open_rows
from tensorway_offload.below import Below
from tensorway_offload.limits import BelowOptions, NamedTier, TierLimits
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions

_ASKED: Final = "Options were given to {} of offloading 'cpu'."


class CPUManager(Manager):
    """See `tensorway.offload.OffloadingManager`."""

    def __init__(self, options: CPUOptions, context: OffloadContext) -> None:
        managed = fitted(ManagerOptions, options.manager, _ASKED.format("the manager"), SEE)
        canon, lent = canonical(context.ranks, context.pages_per_block, options.order), _Lent()
        self._host_rows, self._made_in = open_rows(options, context, canon), os.getpid()
        below: Below | None = None
        try:
            ordered = PolicyContext(self._host_rows.blocks, time.monotonic)
            policy = tensorway.create("eviction_policy", options.policy, options.policy_options, ordered)
            below = _below(options, context, canon, self._host_rows, lent)
            super().__init__(
                medium="cpu",
                capacity=self._host_rows.blocks,
                spec=CPULoadStoreSpec.of,
                policy=policy,
                options=managed,
                lower=below,
                engine=context.engine,
            )
        except BaseException:
            self._host_rows.close(still_used=below is not None and not below.close(context.deadline))
            raise
        lent.manager = self

    def close(self, deadline: float = 5.0) -> None:
        """End tiers first, and after them the memory that they read and write."""
        if os.getpid() != self._made_in:
            return  # tiers and their threads are the parent's
        super().close(deadline)
        self._host_rows.close(still_used=not self.quiet)


class _Lent:
    """What tiers borrow from, which is made after them."""

    manager: Lender | None = None

    def lend(self, keys: Sequence[OffloadKey], seconds: float) -> list[int | None]:
        """See `tensorway.offload.Lender`; nothing is here before there is a manager."""
        return [None] * len(keys) if self.manager is None else self.manager.lend(keys, seconds)

    def returned(self, keys: Sequence[OffloadKey]) -> None:
        """See `tensorway.offload.Lender`."""
        if self.manager is not None:
            self.manager.returned(keys)


def _below(options: CPUOptions, context: OffloadContext, canon: Canon, rows: Rows, lender: Lender) -> Below | None:
    """The tiers of the options, together; None if there are none."""
    together = fitted(BelowOptions, options.below, _ASKED.format("all tiers"), SEE)
    about = TierContext(
        context.engine,
        canon.fingerprint(context.facts),
        canon.nbytes,
        context.facts,
        rows.memory,
        rows.row_bytes,
        lender,
        context.services,
        context.deadline,
    )
    opened: list[NamedTier] = []
    try:
        for tier in tiers_of(options):
            name = tier.name or tier.backend
            limits = fitted(TierLimits, tier.limits, _ASKED.format(f"tier {name}"), SEE)
            opened.append(NamedTier(name, tensorway.create("offload_tier", tier.backend, tier.options, about), limits))
        if not opened:
            return None
        return Below(opened, partial(_bytes_of, rows, canon.nbytes), together)
    except BaseException:
        for each in opened:
            each.tier.close()
        raise


def _bytes_of(rows: Rows, nbytes: Sequence[int], key: OffloadKey, row: int) -> memoryview | None:
    """What a block has of a row; None if its key says a group that there is none of, and so is no key of ours."""
    group = key_group(key)
    return rows.row(row, nbytes[group]) if group < len(nbytes) else None
