"""Random requests to a manager over tiers that misbehave, by a seed: no wrong byte, no row used twice, an end to all.

    python -m tensorway_offload.testing.campaign [--seed N] [--count N]

May import the core and this dist. What an engine's worker would do is done here: a store writes what its key stands
for, a load must find exactly that. Tiers fail, lie, hang and come back as chance has it; time is the campaign's own, so
that a deadline costs none.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from tensorway.metrics import total
from tensorway.offload import (
    LookupResult,
    OffloadKey,
    OfTenant,
    PolicyContext,
    ReqContext,
    TierCapabilities,
    tenant_of_salt,
)
from tensorway_offload.below import Below
from tensorway_offload.limits import BelowOptions, NamedTier, TierLimits
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions
from tensorway_offload.policies.lru import Lru
from tensorway_offload.testing.faulty import FAULTS, FaultyTier
from tensorway_offload.testing.rows import Clock, Rows, keys_of, until

#: Steps in which a request must have heard of all its blocks; each is a tenth of a second of the campaign's time.
_STEPS: Final = 400
_STEP: Final = 0.1
_ROWS: Final = 24
_CHAIN: Final = 12
_SALTS: Final = ("", "a", "b")


@attrs.frozen
class _Spec:
    """Which rows."""

    rows: Sequence[int]
    medium: str = "memory"

    def __len__(self) -> int:
        return len(self.rows)


class Life:
    """One manager over some tiers, from its opening to its end."""

    def __init__(self, seed: int) -> None:
        self.rng, self.clock = random.Random(seed), Clock()
        self.rows, self.counts = Rows(_ROWS), Counter[str]()
        self.tiers = [self._tier() for _ in range(self.rng.randrange(1, 4))]
        limits = TierLimits(
            batch_blocks=self.rng.choice((1, 4, 64)),
            queue_blocks=self.rng.choice((2, 8, 64)),
            threads=self.rng.choice((1, 4)),
            asked_last=self.rng.random() < 0.3,
            tenant_bytes=self.rng.choice((0, 0, 4096)),
        )
        named = [NamedTier(f"t{place}", tier, limits) for place, tier in enumerate(self.tiers)]
        options = BelowOptions(refill=self.rng.random() < 0.5, remember=self.rng.choice((0.0, 2.0)))
        self.below = Below(named, self.rows.row, options, self.clock)
        self.manager = Manager(
            medium="memory",
            capacity=_ROWS,
            spec=_Spec,
            policy=Lru(PolicyContext(_ROWS, self.clock)),
            options=ManagerOptions(),
            lower=self.below,
            clock=self.clock,
        )
        #: Rows that somebody writes to, and how many read each.
        self._written: set[int] = set()
        self._read: Counter[int] = Counter()

    def run(self, requests: int) -> None:
        """So many of them; raises for the first thing that does not hold."""
        for number in range(requests):
            salt = self.rng.choice(_SALTS)
            tiers = self.rng.choice((None, None, None, frozenset(), frozenset({"t0"})))
            req = ReqContext(f"r{number}", salt, tiers)
            keys = keys_of(f"chain {self.rng.randrange(6)}", self.rng.randrange(1, _CHAIN), salt)
            self.manager.begins(req)
            ready = self._looked_up(keys, req)
            self._load(keys[:ready], req)
            self._store(keys, req)
            self.manager.ended(req)
            self._now_and_then()
        self._end()

    # -- what an engine does

    def _looked_up(self, keys: Sequence[OffloadKey], req: ReqContext) -> int:
        if self.rng.random() < 0.2:
            return self._each_looked_up(keys, req)
        for _ in range(_STEPS):
            found = self.manager.lookup_prefix(keys, req)
            if not found.later:
                self.counts["hit"] += found.ready
                return found.ready
            self._step()
        raise AssertionError(f"{req.request} has no answer after {_STEPS} steps: {found}")

    def _each_looked_up(self, keys: Sequence[OffloadKey], req: ReqContext) -> int:
        for _ in range(_STEPS):
            results = self.manager.lookup_many(keys, req)
            if not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results):
                misses = [place for place, result in enumerate(results) if result is LookupResult.MISS]
                return misses[0] if misses else len(keys)
            self._step()
        raise AssertionError(f"{req.request} has no answer after {_STEPS} steps: {results}")

    def _load(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        load = self.manager.prepare_load(keys, req) if keys else None
        if load is None:
            assert not keys, f"{len(keys)} blocks that were hits cannot be loaded in the same step"
            return
        rows = self._rows_of(load.source)
        assert not self._written & set(rows), "rows are read while they are written"
        self._read.update(rows)
        for _ in range(self.rng.randrange(3)):
            self._step()
        wrong = [key for key, row in zip(keys, rows, strict=True) if not self.rows.right(key, row)]
        assert not wrong, f"{len(wrong)} of {len(keys)} blocks have wrong bytes"
        self._read.subtract(rows)
        self.counts["loaded"] += len(keys)
        self.manager.complete_load(load.ticket, keys[:1] if self.rng.random() < 0.05 else ())

    def _store(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        store = self.manager.prepare_store(keys, req)
        if store is None or not store.keys:
            return
        rows = self._rows_of(store.target)
        assert len(set(rows)) == len(rows) and not self._written & set(rows), "a row is written by two"
        assert not any(self._read[row] for row in rows), "a row is written while it is read"
        self._written.update(rows)
        for key, row in zip(store.keys, rows, strict=True):
            self.rows.row(key, row)[:] = bytes(self.rows.nbytes)
        for _ in range(self.rng.randrange(3)):
            self._step()
        for key, row in zip(store.keys, rows, strict=True):
            assert bytes(self.rows.row(key, row)) == bytes(self.rows.nbytes), "somebody wrote to a row of a store"
            self.rows.fill(key, row)
        self._written.difference_update(rows)
        self.counts["stored"] += len(rows)
        self.manager.complete_store(store.ticket, store.keys[-1:] if self.rng.random() < 0.05 else ())

    def _now_and_then(self) -> None:
        chance = self.rng.random()
        if chance < 0.03:
            self.manager.reset()
        elif chance < 0.06:
            self.below.delete(OfTenant(tenant_of_salt(self.rng.choice(_SALTS))))
        elif chance < 0.2:
            for tier in self.tiers:
                tier.release()
        elif chance < 0.3:
            self.rng.choice(self.tiers).rates = self._rates()
        self._step()

    def _step(self) -> None:
        self.clock.now += _STEP
        self.manager.poll()
        self.manager.take_events()
        if self.rng.random() < 0.3:
            time.sleep(0.0002)  # let the threads of tiers have their turn

    # -- what holds at the end

    def _end(self) -> None:
        for tier in self.tiers:
            tier.rates = {}
            tier.release()
        until(lambda: not self.below.busy() and not any(tier.under_way for tier in self.tiers), self._step)
        # What is written to a faster tier in passing keeps no engine awake, and ends all the same.
        until(lambda: not total(self.below.statistics(), "offload_queue_blocks"), self._step)
        for tier in self.tiers:
            for key, data in tier.blocks.items():
                self.rows.row(key, 0)[:] = data  # nobody uses it any more
                assert self.rows.right(key, 0), "a tier has wrong bytes"
        samples = self.manager.statistics()
        for state in ("used", "writing", "quarantined"):
            held = total(samples, "offload_blocks", medium="memory", state=state)
            assert not held, f"{held:g} rows are {state} at the end"
        for what in ("loaded", "stored"):
            self.counts[f"{what} in tiers"] += int(
                sum(total(samples, f"offload_{what}_total", medium=f"t{n}") for n in range(3))
            )
        self.counts["dropped"] += int(total(samples, "offload_dropped_total"))
        self.counts["late"] += int(total(samples, "offload_failures_total", cause="late"))
        self.counts.update({f"fault {name}": count for tier in self.tiers for name, count in tier.faults.items()})
        self.manager.close(30.0)
        assert self.below.close(30.0), "a thread of a tier is left"

    def _rows_of(self, spec: Any) -> Sequence[int]:
        assert isinstance(spec, _Spec)
        assert all(0 <= row < _ROWS for row in spec.rows)
        return spec.rows

    def _tier(self) -> FaultyTier:
        capabilities = TierCapabilities(writable=self.rng.random() < 0.9, calls=self.rng.choice((1, 4)))
        return FaultyTier(self.rng.randrange(1 << 30), self._rates(), capabilities, 0.0005)

    def _rates(self) -> dict[str, float]:
        if self.rng.random() < 0.3:
            return {}
        chosen = self.rng.sample(sorted(FAULTS), self.rng.randrange(1, 5))
        return {name: self.rng.choice((0.02, 0.1, 0.2)) for name in chosen}


def campaign(
    seed: int, count: int, progress: Callable[[int, Counter[str]], None] = lambda done, counts: None
) -> Counter[str]:
    """So many lives of forty requests; what happened in them."""
    rng, counts = random.Random(seed), Counter[str]()
    for number in range(count):
        one = rng.randrange(1 << 40)
        try:
            life = Life(one)
            life.run(40)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, life {number} (Life({one}).run(40)): {error}") from error
        counts += life.counts
        progress(number + 1, counts)
    return counts


def main(argv: list[str] | None = None) -> int:
    """A campaign from the command line."""
    parser = argparse.ArgumentParser(
        prog="tensorway_offload.testing.campaign", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args(argv)
    started = time.monotonic()
    logging.getLogger("tensorway").setLevel(logging.ERROR)  # or each life would say what is wrong with its tiers

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def progress(done: int, counts: Counter[str]) -> None:
        if not done % 50:
            say(f"{done:,} lives in {time.monotonic() - started:.0f} s, {counts['loaded']:,} blocks loaded")

    say(f"seed {given.seed}: {given.count:,} lives of 40 requests")
    counts = campaign(given.seed, given.count, progress)
    say(
        f"no breach in {time.monotonic() - started:.0f} s: "
        + ", ".join(f"{k} {v:,}" for k, v in sorted(counts.items()))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
