"""A small manager that is right, for tests of the suite; the broken ones are made of it."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict

from tensorway.errors import Closed
from tensorway.metrics import Counters
from tensorway.offload import (
    METRICS,
    LookupResult,
    OffloadingEvent,
    PrefixLookup,
    PrepareLoadOutput,
    PrepareStoreOutput,
    Ticket,
)
from tensorway.testing.offload_ground import Clock

LEASE = 10.0
PROMISE = 1.0


class Rows(tuple):
    medium = "cpu"


class Job:
    def __init__(self, rows, stores, req):
        self.rows, self.stores, self.req, self.stale = rows, stores, req, False


class Plain:
    """Rows of one medium, least recently stored first; one thread for each promotion."""

    def __init__(self, capacity, tier=None, clock=None):
        self.capacity, self.tier, self.clock = capacity, tier, clock or Clock()
        self.free = list(range(capacity))
        self.ready = OrderedDict()
        self.pins = Counter()
        self.leases = {}
        self.jobs = {}
        self.number = self.epoch = 0
        self.events = []
        self.promoting = {}
        self.denied = {}
        self.counts = Counters(METRICS, backend="plain", engine="suite")
        self.lock = threading.RLock()
        self.closed = False

    def open(self):
        if self.closed:
            raise Closed("A manager was used.", "It is closed.", "Make another one.")

    # -- requests

    def begins(self, req):
        return "new"

    def ended(self, req):
        self.leases.pop(req.request, None)
        self.denied.pop(req.request, None)

    def touch(self, keys, req):
        for key in reversed(keys):
            if key in self.ready:
                self.ready.move_to_end(key)

    # -- lookups

    def lookup(self, key, req):
        return self.lookup_many([key], req)[0]

    def lookup_many(self, keys, req):
        with self.lock:
            self.open()
            return [self.find(key, req) for key in keys]

    def lookup_prefix(self, keys, req):
        with self.lock:
            self.open()
            ready = later = 0
            for key in keys:
                result = self.find(key, req)
                if result is LookupResult.MISS:
                    break
                if result is LookupResult.HIT and not later:
                    ready += 1
                else:
                    later += 1
            return PrefixLookup(ready, later)

    def find(self, key, req):
        result = self.result(key, req)
        self.counts.add("offload_lookups_total", result=result.value)
        return result

    def result(self, key, req):
        if key in self.ready:
            self.lease(key, req)
            return LookupResult.HIT
        if key in self.promoting:
            if self.clock() - self.promoting[key]["since"] > PROMISE:
                return LookupResult.MISS
            self.promoting[key]["waiting"].append(req)
            return LookupResult.HIT_PENDING
        if self.allowed(key, req) and self.tier.contains([key], 1.0)[0]:
            return self.promote(key, req)
        return LookupResult.MISS

    def lease(self, key, req):
        self.leases.setdefault(req.request, {})[key] = self.clock() + LEASE

    def allowed(self, key, req):
        reserved = any(key in job.rows for job in self.jobs.values() if job.stores and not job.stale)
        wanted = req.tiers is None or bool(req.tiers)
        return self.tier is not None and wanted and not reserved and key not in self.denied.get(req.request, ())

    def promote(self, key, req):
        if self.room(1, [key]) is None:
            return LookupResult.MISS
        job = {"row": self.free.pop(), "waiting": [req], "since": self.clock(), "outcome": None}
        self.promoting[key] = job

        def fetch():
            try:
                job["outcome"] = self.tier.get([(key, memoryview(bytearray(8)))], 1.0)[0]
            except Exception:
                job["outcome"] = "failed"

        threading.Thread(target=fetch, daemon=True).start()
        return LookupResult.HIT_PENDING

    # -- stores

    def leased(self):
        now = self.clock()
        return {key for keys in self.leases.values() for key, until in keys.items() if until > now}

    def spared(self, offered):
        return {*offered, *self.leased()}

    def room(self, count, offered):
        """Which blocks go, so that so many rows are free; None if they cannot be."""
        missing = count - len(self.free)
        spared = self.spared(offered)
        idle = [key for key, row in self.ready.items() if not self.pins[row] and key not in spared]
        if missing > len(idle):
            return None
        gone = idle[: max(0, missing)]
        for key in gone:
            self.free.append(self.ready.pop(key))
        self.tell("removed", gone, "evicted")
        return gone

    def tell(self, what, keys, cause=""):
        if keys or what == "cleared":
            self.events.append(OffloadingEvent(what, list(keys), "cpu", cause))

    def present(self):
        return {*self.ready, *self.promoting}.union(
            *(job.rows for job in self.jobs.values() if job.stores and not job.stale)
        )

    def ticket(self, rows, stores, req):
        self.number += 1
        ticket = Ticket(self.epoch, self.number)
        self.jobs[ticket] = Job(rows, stores, req)
        return ticket

    def prepare_store(self, keys, req):
        with self.lock:
            self.open()
            present = self.present()
            new = [key for key in dict.fromkeys(keys) if key not in present]
            gone = self.room(len(new), keys)
            if gone is None:
                return None
            rows = {key: self.free.pop() for key in new}
            return PrepareStoreOutput(self.ticket(rows, True, req), new, Rows(rows.values()), gone)

    def complete_store(self, ticket, failed=()):
        with self.lock:
            job = self.jobs.pop(ticket, None)
            if job is None:
                return
            good = {} if job.stale else {key: row for key, row in job.rows.items() if key not in failed}
            self.free += [row for key, row in job.rows.items() if key not in good]
            for key in reversed(good):
                self.ready[key] = good[key]
            self.tell("stored", good)
            self.counts.add("offload_stored_total", len(good), medium="cpu")
            if self.tier is not None and good and (job.req.tiers is None or job.req.tiers):
                self.tier.put([(key, memoryview(b"")) for key in good], 1.0)

    # -- loads

    def prepare_load(self, keys, req):
        with self.lock:
            self.open()
            if any(key not in self.ready for key in keys):
                return None
            rows = {key: self.ready[key] for key in keys}
            self.pins.update(rows.values())
            for key in keys:
                self.leases.get(req.request, {}).pop(key, None)
            return PrepareLoadOutput(self.ticket(rows, False, req), Rows(rows.values()))

    def complete_load(self, ticket, failed=()):
        with self.lock:
            job = self.jobs.pop(ticket, None)
            if job is None:
                return
            lost = [key for key, row in job.rows.items() if key in failed and self.ready.get(key) == row]
            for key in lost:
                del self.ready[key]
            self.tell("removed", lost, "failed")
            self.unpin(job.rows.values())

    def unpin(self, rows):
        for row in rows:
            self.pins[row] -= 1
            if not self.pins[row] and row not in self.ready.values():
                self.free.append(row)

    # -- all

    def poll(self):
        with self.lock:
            for key, job in list(self.promoting.items()):
                if job["outcome"] is None:
                    continue
                del self.promoting[key]
                if job["outcome"] == "done":
                    self.ready[key] = job["row"]
                    self.tell("stored", [key])
                    for req in job["waiting"]:
                        self.lease(key, req)
                    continue
                self.free.append(job["row"])
                for req in job["waiting"]:
                    self.denied.setdefault(req.request, set()).add(key)

    def busy(self):
        return bool(self.promoting)

    def take_events(self):
        with self.lock:
            found, self.events = self.events, []
            return found

    def statistics(self):
        counts = self.counts
        counts.set("offload_capacity_blocks", self.capacity, medium="cpu")
        reserved = sum(len(job.rows) for job in self.jobs.values() if job.stores)
        counts.set("offload_blocks", len(self.ready), medium="cpu", state="ready")
        counts.set("offload_blocks", reserved, medium="cpu", state="reserved")
        return counts.samples()

    def reset(self):
        with self.lock:
            self.epoch += 1
            for job in self.jobs.values():
                job.stale = True
            rows = list(self.ready.values())
            self.ready.clear()
            self.leases.clear()
            self.free += [row for row in rows if not self.pins[row]]
            self.tell("cleared", [])

    def close(self, deadline=5.0):
        self.closed = True
