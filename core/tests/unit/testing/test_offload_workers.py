"""The suite of workers: one that is right passes, and each way of being wrong is seen."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import time
from pathlib import Path

import attrs
import pytest

from tensorway.errors import Closed, DeadlineExceeded, MemoryInvalid
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, EngineSpec, TransferResult
from tensorway.testing import OffloadingWorkerSuite, offload_workers


def beside(name):
    """A module in this folder, from wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = beside("plain_manager")


class Copies:
    """It copies when it is asked to; rows are bytes in a list."""

    def __init__(self, context, capacity):
        self.planes = context.ranks[context.rank].planes
        self.per_block = context.pages_per_block
        self.rows = [None] * capacity
        self.results, self.known = [], set()
        self.closed = False
        self.counts = Counters(METRICS, backend="plain", engine="suite", rank=str(context.rank))

    def store(self, job, source, target):
        self.begin("store", job, source, target)

    def load(self, job, source, target):
        self.begin("load", job, target, source)

    def begin(self, what, job, engine, rows):
        if self.closed:
            raise Closed("A block was to be copied.", "The worker is closed.", "Make another one.")
        self.check(engine, rows)
        failed = [at for at, row in enumerate(rows) if not self.good(what, engine.pages[at], row)]
        nbytes = sum(self.copy(what, engine.pages[at], row) for at, row in enumerate(rows) if at not in failed)
        self.counts.add("offload_bytes_total", nbytes, medium="cpu", what=what)
        cause = "refused" if failed else ""
        self.tell(TransferResult(job, cause, "there is no such page or row" if failed else "", failed, nbytes))

    def tell(self, result):
        self.results.append(result)
        self.known.add(result.job)

    def check(self, engine, rows):
        fits = isinstance(engine, EngineSpec) and isinstance(rows, plain.Rows)
        fits = fits and len(engine.groups) == len(engine.pages) == len(rows) and not any(engine.groups)
        if not fits or not all(isinstance(pages, list) and len(pages) == self.per_block for pages in engine.pages):
            raise MemoryInvalid("Blocks were to be copied.", "Their places do not fit each other.", "Compare them.")

    def good(self, what, pages, row):
        least = 0 if what == "store" else -1
        return 0 <= row < len(self.rows) and all(
            isinstance(page, int) and least <= page < self.planes[0].pages for page in pages
        )

    def copy(self, what, pages, row):
        nbytes = sum(plane.page_bytes for plane in self.planes)
        if what == "store":
            self.rows[row] = [[ctypes.string_at(*self.place(plane, page)) for plane in self.planes] for page in pages]
        else:
            for page, data in zip(pages, self.rows[row], strict=True):
                self.write(page, data)
        return nbytes * len(pages)

    def write(self, page, data):
        if page >= 0:
            for plane, piece in zip(self.planes, data, strict=True):
                ctypes.memmove(self.place(plane, page)[0], piece, len(piece))

    @staticmethod
    def place(plane, page):
        return plane.base + page * plane.stride, plane.page_bytes

    def poll(self):
        found, self.results = self.results, []
        return found

    def wait(self, jobs, deadline):
        pass

    def statistics(self):
        return self.counts.samples()

    def close(self, deadline=5.0):
        self.closed = True


def made(worker):
    def make(context, capacity):
        return plain.Plain(capacity) if context.role == "manager" else worker(context, capacity)

    return make


class TestCopies(OffloadingWorkerSuite):
    make = staticmethod(made(Copies))


# -- and what is wrong


class AByteLess(Copies):
    @staticmethod
    def place(plane, page):
        return plane.base + page * plane.stride, plane.page_bytes - 1


class FirstPlane(Copies):
    def write(self, page, data):
        Copies.write(self, page, data[:1] * len(data))


class NextPage(Copies):
    def write(self, page, data):
        Copies.write(self, page, data)
        if page >= 0:
            Copies.write(self, (page + 1) % 32, data)


class StoreWipes(Copies):
    def copy(self, what, pages, row):
        nbytes = Copies.copy(self, what, pages, row)
        if what == "store":
            ctypes.memset(self.place(self.planes[0], pages[0])[0], 0, 1)
        return nbytes


class KeepsTheFirst(Copies):
    """It thinks that a row which has something needs nothing."""

    def copy(self, what, pages, row):
        return 1 if what == "store" and self.rows[row] else Copies.copy(self, what, pages, row)


class NegativePages(Copies):
    """Python's -1."""

    def write(self, page, data):
        Copies.write(self, page % self.planes[0].pages, data)


class StopsAtNone(Copies):
    def copy(self, what, pages, row):
        if -1 in pages:
            pages = [*pages[: pages.index(-1)], *[-1] * (len(pages) - pages.index(-1))]
        return Copies.copy(self, what, pages, row)


class StoresHalves(Copies):
    def good(self, what, pages, row):
        return Copies.good(self, "load", pages, row)

    def copy(self, what, pages, row):
        return Copies.copy(self, what, [max(page, 0) for page in pages] if what == "store" else pages, row)


class SaysTwice(Copies):
    def tell(self, result):
        Copies.tell(self, result)
        self.results.append(result)


class WaitTakes(Copies):
    def wait(self, jobs, deadline):
        self.results = [each for each in self.results if each.job not in jobs]


class WaitRaises(Copies):
    def wait(self, jobs, deadline):
        if not self.known.issuperset(jobs):
            raise KeyError(jobs)


class WaitsForEver(Copies):
    def wait(self, jobs, deadline):
        if not self.known.issuperset(jobs):
            time.sleep(0.4)
            raise DeadlineExceeded("Jobs were waited for.", "They do not end.", "Wait on.")


class AnyPage(Copies):
    """It believes what it is told, and puts it somewhere."""

    def good(self, what, pages, row):
        return row < len(self.rows)

    @staticmethod
    def place(plane, page):
        return plane.base + page % 32 * plane.stride, plane.page_bytes


class RaisesForPages(Copies):
    def good(self, what, pages, row):
        assert Copies.good(self, what, pages, row), "an assertion in a worker ends the engine"
        return True


class TakesAnything(Copies):
    def check(self, engine, rows):
        if len(engine.pages) < len(rows):
            raise IndexError("list index out of range")


class OwnCauses(Copies):
    def tell(self, result):
        Copies.tell(self, attrs.evolve(result, cause="oops" if result.cause else ""))


class SaysNoReason(Copies):
    def tell(self, result):
        Copies.tell(self, attrs.evolve(result, why=""))


class AnyRow(Copies):
    def good(self, what, pages, row):
        return True

    def copy(self, what, pages, row):
        return Copies.copy(self, what, pages, row % len(self.rows))


class OpenForEver(Copies):
    def close(self, deadline=5.0):
        pass


class GoesOn(Copies):
    """It copies on after it was closed."""

    def load(self, job, source, target):
        if self.closed:  # and is asked again
            for pages, row in zip(self.last[0].pages, self.last[1], strict=True):
                self.copy("load", pages, row)
        self.last = target, source
        Copies.load(self, job, source, target)


class OwnWords(Copies):
    def statistics(self):
        return [*Copies.statistics(self), Sample("copied", (), 1.0)]


class CountsNothing(Copies):
    def statistics(self):
        return []


BYTES = "test_every_byte_comes_back_to_any_page_and_no_other_is_written"
AGAIN = "test_whatever_is_stored_evicted_and_stored_again_a_load_is_right"
PAGE, SPECS = "test_a_page_that_there_is_none_of_is_refused", "test_specs_that_do_not_fit_are_refused"
CLOSED, STATISTICS = "test_who_is_closed_refuses_and_touches_nothing", "test_statistics_are_values_of_the_vocabulary"
#: What is broken, a test that sees it, and what that says.
BREAKS = [
    (AByteLess, BYTES, "bytes are wrong"),
    (FirstPlane, BYTES, "bytes are wrong"),
    (NextPage, BYTES, "bytes are wrong"),
    (StoreWipes, BYTES, "a store wrote to pages"),
    (KeepsTheFirst, AGAIN, "bytes are wrong"),
    (NextPage, AGAIN, "bytes are wrong"),
    (NegativePages, "test_a_page_that_is_not_wanted_is_left_alone", "bytes are wrong"),
    (StopsAtNone, "test_a_page_that_is_not_wanted_is_left_alone", "bytes are wrong"),
    (StoresHalves, "test_what_lacks_a_page_is_never_stored", "assert"),
    (SaysTwice, "test_several_jobs_end_each_once", "were waited for"),
    (WaitTakes, "test_several_jobs_end_each_once", "were waited for"),
    (WaitRaises, "test_waiting_has_an_end", "10000"),
    (WaitsForEver, "test_waiting_has_an_end", "took half a minute"),
    (AnyPage, PAGE, "assert"),
    (RaisesForPages, PAGE, "ends the engine"),
    (OwnCauses, PAGE, "no cause of the vocabulary"),
    (SaysNoReason, PAGE, "does not say why"),
    (TakesAnything, SPECS, "was taken|index out of range|has no attribute"),
    (AnyRow, "test_rows_that_there_are_none_of_are_refused", "assert"),
    (OpenForEver, CLOSED, "Closed"),
    (GoesOn, CLOSED, "after the end"),
    (OwnWords, STATISTICS, "copied"),
    (CountsNothing, STATISTICS, "assert"),
]


@pytest.mark.parametrize(("broken", "test", "says"), BREAKS)
def test_it_is_said(broken, test, says, monkeypatch):
    if broken is WaitsForEver:
        monkeypatch.setattr(offload_workers, "LONG", 0.5)
    suite = OffloadingWorkerSuite()
    suite.make = made(broken)
    opening = inspect.unwrap(OffloadingWorkerSuite.open_engine)(suite)
    given = {"open_engine": next(opening), "ranks": 1, "pages": 1, "order": "NHD", "page": 40, "what": "load"}
    function = getattr(suite, test)
    wanted = inspect.signature(function).parameters
    if "engine" in wanted:
        given["engine"] = given["open_engine"]()
    with pytest.raises((AssertionError, KeyError, IndexError, AttributeError, TypeError), match=says):
        function(**{name: given[name] for name in wanted})


def test_every_test_of_the_suite_is_seen_to_fail():
    tests = {name for name in dir(OffloadingWorkerSuite) if name.startswith("test_")}
    assert tests - {test for _, test, _ in BREAKS} == {"test_no_test_of_the_suite_is_replaced_without_a_reason"}
