"""The suite of managers: one that is right passes, and each way of being wrong is seen."""

from __future__ import annotations

import importlib.util
import inspect
import time
from pathlib import Path

import pytest

from tensorway.metrics import Sample
from tensorway.offload import LookupResult, PrefixLookup, PrepareStoreOutput, Ticket
from tensorway.testing import OffloadingManagerSuite, offload_model
from tensorway.testing.offload_ground import Clock


def beside(name):
    """A module in this folder, from wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = beside("plain_manager")
Plain = plain.Plain


class TestPlain(OffloadingManagerSuite):
    lease = plain.LEASE
    patience = 20.0

    def make(self, capacity):
        self.clock = Clock()
        return Plain(capacity, clock=self.clock)

    def make_over(self, capacity, tier):
        return Plain(capacity, tier, time.monotonic)

    def pass_time(self, seconds):
        self.clock.pass_time(seconds)


# -- and what is wrong


class SeenAtOnce(Plain):
    def prepare_store(self, keys, req):
        out = Plain.prepare_store(self, keys, req)
        if out is not None:
            job = self.jobs[out.ticket]
            self.ready.update(job.rows)
        return out


class ToldAtOnce(Plain):
    def prepare_store(self, keys, req):
        out = Plain.prepare_store(self, keys, req)
        self.tell("stored", out.keys if out else ())
        return out


class StoredTwice(Plain):
    def present(self):
        return {*self.ready}


class Unsorted(Plain):
    def prepare_store(self, keys, req):
        return Plain.prepare_store(self, sorted(keys, reverse=True), req)


class NothingIsRefused(Plain):
    def prepare_store(self, keys, req):
        return Plain.prepare_store(self, keys, req) if keys else None


class CountsDuplicates(Plain):
    def prepare_store(self, keys, req):
        return None if len(keys) > self.capacity else Plain.prepare_store(self, keys, req)


class EvictsBeforeItCounts(Plain):
    def room(self, count, offered):
        while self.ready and len(self.free) < count and Plain.room(self, len(self.free) + 1, offered):
            pass
        return None if len(self.free) < count else []


class ShortOfOne(Plain):
    """It keeps a row in reserve."""

    def room(self, count, offered):
        return None if count and Plain.room(self, count + 1, offered) is None else Plain.room(self, count, offered)


class EvictsWhatIsOffered(Plain):
    def spared(self, offered):
        return self.leased()


class EvictsMore(Plain):
    def room(self, count, offered):
        gone = Plain.room(self, count, offered)
        return gone and gone + (Plain.room(self, len(self.free) + 1, offered) or [])


class SilentEvictions(Plain):
    def tell(self, what, keys, cause=""):
        if cause != "evicted":
            Plain.tell(self, what, keys, cause)


class ToldInTheEnd(Plain):
    """Evictions are told when the store is completed, after it."""

    def room(self, count, offered):
        before = len(self.events)
        gone = Plain.room(self, count, offered)
        self.later = [*getattr(self, "later", ()), *self.events[before:]]
        del self.events[before:]
        return gone

    def complete_store(self, ticket, failed=()):
        Plain.complete_store(self, ticket, failed)
        self.events += getattr(self, "later", ())
        self.later = []


class FailedIsThere(Plain):
    def complete_store(self, ticket, failed=()):
        Plain.complete_store(self, ticket)


class FailedTakesAll(Plain):
    def complete_store(self, ticket, failed=()):
        Plain.complete_store(self, ticket, self.jobs[ticket].rows if failed and ticket in self.jobs else ())


class FailedTakesOthers(Plain):
    def complete_store(self, ticket, failed=()):
        Plain.complete_store(self, ticket, failed)
        for key in failed:
            if key in self.ready:
                self.free.append(self.ready.pop(key))


class FailedRowsAreLost(Plain):
    def complete_store(self, ticket, failed=()):
        free = [*self.free]
        Plain.complete_store(self, ticket, failed)
        self.free = free


class TicketsAreNumbers(Plain):
    """An unknown ticket is an error."""

    def complete_store(self, ticket, failed=()):
        assert ticket in self.jobs, "an unknown ticket"
        Plain.complete_store(self, ticket, failed)


class OneTicketForAll(Plain):
    def ticket(self, rows, stores, req):
        Plain.ticket(self, rows, stores, req)
        return Ticket(0, 0)


class TicketsLast(Plain):
    def complete_load(self, ticket, failed=()):
        job = self.jobs.get(ticket)
        Plain.complete_load(self, ticket, failed)
        if job is not None:
            self.jobs[ticket] = job


class PinsNothing(Plain):
    def prepare_load(self, keys, req):
        out = Plain.prepare_load(self, keys, req)
        self.pins.clear()
        return out

    def unpin(self, rows):
        pass


class PinsOnce(Plain):
    def prepare_load(self, keys, req):
        out = Plain.prepare_load(self, keys, req)
        for row in self.pins:
            self.pins[row] = min(self.pins[row], 1)
        return out

    def unpin(self, rows):
        for row in rows:
            self.pins[row] = max(0, self.pins[row] - 1)


class PinsForEver(Plain):
    def unpin(self, rows):
        pass


class NoLeases(Plain):
    def leased(self):
        return set()


class NoLeaseOfAPrefix(Plain):
    def lookup_prefix(self, keys, req):
        before = {key: dict(value) for key, value in self.leases.items()}
        found = Plain.lookup_prefix(self, keys, req)
        self.leases = before
        return found


class LeasesForEver(Plain):
    def leased(self):
        return {key for keys in self.leases.values() for key in keys}


class ShortLeases(Plain):
    def lease(self, key, req):
        self.leases.setdefault(req.request, {})[key] = self.clock() + plain.LEASE / 4


class LeasesOutliveRequests(Plain):
    def ended(self, req):
        pass


class LoadsWhatIsThere(Plain):
    def prepare_load(self, keys, req):
        return Plain.prepare_load(self, [key for key in keys if key in self.ready], req)


class PinsBeforeItLooks(Plain):
    def prepare_load(self, keys, req):
        out = Plain.prepare_load(self, keys, req)
        if out is None:
            self.pins.update(self.ready[key] for key in keys if key in self.ready)
        return out


class FailedIsKept(Plain):
    def complete_load(self, ticket, failed=()):
        Plain.complete_load(self, ticket)


class FailedRowsAreFree(Plain):
    """A row from which another load still reads is handed out."""

    def complete_load(self, ticket, failed=()):
        rows = [self.ready[key] for key in failed if key in self.ready]
        Plain.complete_load(self, ticket, failed)
        self.free += [row for row in rows if row not in self.free]


class SilentFailures(Plain):
    def tell(self, what, keys, cause=""):
        if cause != "failed":
            Plain.tell(self, what, keys, cause)


class EndsWhatIsUnderWay(Plain):
    def ended(self, req):
        Plain.ended(self, req)
        for job in self.jobs.values():
            job.stale = True


class NoTenants(Plain):
    def find(self, key, req):
        return Plain.find(self, next((each for each in self.ready if each[:-12] == key[:-12]), key), req)


class TouchRaises(Plain):
    def touch(self, keys, req):
        for key in keys:
            self.ready.move_to_end(key)


class ResetKeepsTickets(Plain):
    def reset(self):
        Plain.reset(self)
        for job in self.jobs.values():
            job.stale = False


class ResetFreesAll(Plain):
    def reset(self):
        Plain.reset(self)
        self.free = list(range(self.capacity))
        self.jobs.clear()
        self.pins.clear()


class ResetKeepsLeases(Plain):
    def reset(self):
        ready = dict(self.ready)
        Plain.reset(self)
        self.ready.update(dict(list(ready.items())[:1]))


class SilentReset(Plain):
    def tell(self, what, keys, cause=""):
        if what != "cleared":
            Plain.tell(self, what, keys, cause)


class OwnWords(Plain):
    def statistics(self):
        return [*Plain.statistics(self), Sample("hits", (), 1.0)]


class Miscounts(Plain):
    def statistics(self):
        return [sample for sample in Plain.statistics(self) if ("state", "reserved") not in sample.labels]


class AlwaysBusy(Plain):
    def busy(self):
        return True


class OpenForEver(Plain):
    def open(self):
        pass


class RaisesAfterTheEnd(Plain):
    def complete_load(self, ticket, failed=()):
        if self.closed:
            raise KeyError(ticket)
        Plain.complete_load(self, ticket, failed)


class SaysAgain(Plain):
    def take_events(self):
        return list(self.events)


class NoLock(Plain):
    def room(self, count, offered):
        gone = Plain.room(self, count, offered)
        self.lock.release()
        time.sleep(0.0005)
        self.lock.acquire()
        return gone


class PendingIsHit(Plain):
    def lookup_prefix(self, keys, req):
        found = Plain.lookup_prefix(self, keys, req)
        return PrefixLookup(found.ready + found.later)


class LaterForEver(Plain):
    """What does not fit is promised all the same."""

    def promote(self, key, req):
        found = Plain.promote(self, key, req)
        return LookupResult.RETRY if found is LookupResult.MISS else found


class WaitsForRoom(LaterForEver):
    """It waits for room that nobody gives back."""

    def leased(self):
        return set(self.ready)


class PromisesForEver(Plain):
    def result(self, key, req):
        if key in self.promoting:
            self.promoting[key]["since"] = self.clock()
        return Plain.result(self, key, req)


class PromotesOverOthers(Plain):
    """The anchor: what was promoted and not looked up yet is evicted by what comes behind it."""

    def promote(self, key, req):
        leases, self.leases = self.leases, {}
        found = Plain.promote(self, key, req)
        self.leases = leases
        return LookupResult.RETRY if found is LookupResult.MISS else found

    def lease(self, key, req):
        pass


class BelievesTiers(Plain):
    def poll(self):
        for job in self.promoting.values():
            job["outcome"] = job["outcome"] and "done"
        Plain.poll(self)


class SpinsOnFailures(Plain):
    def poll(self):
        Plain.poll(self)
        self.denied.clear()


class LosesPromotedRows(Plain):
    def poll(self):
        free = list(self.free)
        Plain.poll(self)
        self.free = free


class AsksAllTiers(Plain):
    def allowed(self, key, req):
        reserved = any(key in job.rows for job in self.jobs.values())
        return self.tier is not None and not reserved and key not in self.denied.get(req.request, ())


class NeverCascades(Plain):
    def complete_store(self, ticket, failed=()):
        tier, self.tier = self.tier, None
        Plain.complete_store(self, ticket, failed)
        self.tier = tier


class RefusesAnOutput(Plain):
    def prepare_store(self, keys, req):
        out = Plain.prepare_store(self, keys, req)
        return out and PrepareStoreOutput(out.ticket, out.keys, plain.Rows(out.target[:-1]), out.evicted)


MODEL = "test_any_order_of_calls_keeps_the_contract"
SEEN = "test_a_block_is_seen_when_its_store_is_completed"
ROOM = "test_what_does_not_fit_is_refused_and_nothing_has_changed"
ONCE = "test_a_ticket_counts_once"
FAILED_LOAD, FAILED_STORE = (
    "test_what_failed_to_be_loaded_is_forgotten",
    "test_what_failed_to_be_stored_was_never_there",
)
RESET = "test_a_reset_forgets_everything_and_tickets_mean_nothing"
FOUND = "test_what_was_found_stays_until_its_request_ends"
LOADING = "test_what_is_being_loaded_stays"
END, ENDS = "test_a_lookup_comes_to_an_end_however_much_is_below", "test_a_tier_that_fails_is_a_miss"
ALL_END = "test_requests_that_want_more_than_there_is_room_for_all_come_to_an_end"
#: What is broken, a test that sees it, and what that says.
BREAKS = [
    (SeenAtOnce, SEEN, "before it is there"),
    (SeenAtOnce, MODEL, ""),
    (ToldAtOnce, SEEN, ""),
    (ToldAtOnce, MODEL, ""),
    (RefusesAnOutput, SEEN, ""),
    (RefusesAnOutput, MODEL, ""),
    (StoredTwice, "test_what_is_there_or_under_way_is_not_stored_again", ""),
    (StoredTwice, MODEL, ""),
    (Unsorted, "test_what_is_there_or_under_way_is_not_stored_again", ""),
    (NothingIsRefused, "test_nothing_asked_is_nothing_done", "refused"),
    (CountsDuplicates, "test_a_key_counts_once", "refused"),
    (CountsDuplicates, MODEL, ""),
    (EvictsBeforeItCounts, ROOM, "all of it is there"),
    (EvictsBeforeItCounts, MODEL, ""),
    (ShortOfOne, ROOM, "refused"),
    (ShortOfOne, MODEL, ""),
    (EvictsWhatIsOffered, "test_what_is_offered_is_not_evicted_for_it", "what was offered"),
    (EvictsWhatIsOffered, MODEL, ""),
    (EvictsMore, "test_what_has_to_go_is_told_before_what_comes", ""),
    (EvictsMore, MODEL, ""),
    (SilentEvictions, "test_what_has_to_go_is_told_before_what_comes", ""),
    (SilentEvictions, MODEL, ""),
    (ToldInTheEnd, "test_what_has_to_go_is_told_before_what_comes", ""),
    (FailedIsThere, FAILED_STORE, "not there"),
    (FailedIsThere, MODEL, ""),
    (FailedTakesAll, FAILED_STORE, ""),
    (FailedTakesAll, MODEL, ""),
    (FailedTakesOthers, FAILED_STORE, ""),
    (FailedRowsAreLost, FAILED_STORE, "refused|were evicted"),
    (FailedRowsAreLost, MODEL, ""),
    (TicketsAreNumbers, ONCE, "an unknown ticket"),
    (OneTicketForAll, ONCE, ""),
    (OneTicketForAll, MODEL, ""),
    (TicketsLast, ONCE, ""),
    (TicketsLast, MODEL, ""),
    (PinsNothing, LOADING, "in use was evicted"),
    (PinsNothing, MODEL, ""),
    (PinsOnce, LOADING, ""),
    (PinsForEver, LOADING, "refused, with"),
    (PinsForEver, MODEL, ""),
    (NoLeases, FOUND, "what look_up found"),
    (NoLeases, MODEL, ""),
    (NoLeaseOfAPrefix, FOUND, "what lookup_prefix found"),
    (LeasesForEver, "test_a_lease_that_nobody_uses_ends_by_itself", "assert"),
    (ShortLeases, "test_a_lease_that_nobody_uses_ends_by_itself", "assert"),
    (LeasesOutliveRequests, "test_a_request_that_has_ended_may_complete_what_it_prepared", "refused, with"),
    (LeasesOutliveRequests, MODEL, ""),
    (LoadsWhatIsThere, "test_what_is_not_there_pins_nothing", "not there was prepared"),
    (LoadsWhatIsThere, MODEL, ""),
    (PinsBeforeItLooks, "test_what_is_not_there_pins_nothing", "refused, with|something is pinned"),
    (PinsBeforeItLooks, MODEL, ""),
    (FailedIsKept, FAILED_LOAD, "not there"),
    (FailedIsKept, MODEL, ""),
    (FailedRowsAreFree, FAILED_LOAD, ""),
    (FailedRowsAreFree, MODEL, ""),
    (SilentFailures, FAILED_LOAD, "not what is there"),
    (SilentFailures, MODEL, ""),
    (EndsWhatIsUnderWay, "test_a_request_that_has_ended_may_complete_what_it_prepared", ""),
    (EndsWhatIsUnderWay, MODEL, ""),
    (NoTenants, "test_tenants_find_their_own", "not there"),
    (NoTenants, MODEL, ""),
    (TouchRaises, "test_touching_what_is_not_there_does_not_matter", ""),
    (TouchRaises, MODEL, ""),
    (ResetKeepsTickets, RESET, ""),
    (ResetKeepsTickets, MODEL, ""),
    (ResetFreesAll, RESET, "were evicted for"),
    (ResetFreesAll, MODEL, ""),
    (ResetKeepsLeases, RESET, ""),
    (ResetKeepsLeases, MODEL, ""),
    (SilentReset, RESET, "not what is there"),
    (SilentReset, MODEL, ""),
    (OwnWords, "test_what_is_said_of_it_is_true", "hits"),
    (Miscounts, "test_what_is_said_of_it_is_true", "assert 7 == 5"),
    (AlwaysBusy, "test_what_is_said_of_it_is_true", "for ever"),
    (OpenForEver, "test_who_is_closed_refuses", "lookup_many"),
    (RaisesAfterTheEnd, "test_who_is_closed_refuses", ""),
    (SaysAgain, MODEL, ""),
    (NoLock, "test_threads_share_it", ""),
    (PendingIsHit, END, ""),
    (LaterForEver, END, "for ever"),
    (PromisesForEver, ENDS, "for ever"),
    (PromotesOverOthers, END, "for ever"),
    (WaitsForRoom, ALL_END, "wait for ever"),
    (BelievesTiers, ENDS, "what was never read is there|for ever"),
    (SpinsOnFailures, ENDS, "for ever"),
    (LosesPromotedRows, ENDS, "rows are lost"),
    (AsksAllTiers, "test_a_request_may_have_no_tiers", "assert 0 == 3"),
    (NeverCascades, "test_what_is_stored_goes_down_and_is_found_there_again", ""),
]


class Broken(OffloadingManagerSuite):
    """Not collected: its tests are called here."""

    lease, patience, runs, seed = plain.LEASE, 2.5, 200, 6
    make_over = TestPlain.make_over
    pass_time = TestPlain.pass_time


@pytest.mark.parametrize(("broken", "test", "says"), BREAKS)
def test_it_is_said(broken, test, says, monkeypatch):
    monkeypatch.setattr(offload_model, "PHASES", offload_model.PHASES[:1])  # what fails need not be made short
    suite = Broken()
    suite.clock = Clock()
    suite.make = lambda capacity: broken(capacity, clock=suite.clock)
    suite.make_over = lambda capacity, tier: broken(capacity, tier, time.monotonic)
    fault = "hangs" if broken is PromisesForEver else "failed"
    made = lambda capacity=8: suite.make(capacity)  # noqa: E731
    given = {"open_manager": made, "manager": made(), "capacity": 8, "count": 9, "fault": fault}
    function = getattr(suite, test)
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError, RuntimeError), match=says or None):
        function(**{name: given[name] for name in inspect.signature(function).parameters})


def test_every_test_of_the_suite_is_seen_to_fail():
    tests = {name for name in dir(OffloadingManagerSuite) if name.startswith("test_")}
    assert tests - {test for _, test, _ in BREAKS} == {"test_no_test_of_the_suite_is_replaced_without_a_reason"}
