"""Hand-overs between engines that look like nothing in particular, while ranks die, stop and come back; by a seed.

    python -m tensorway_kv.testing.campaign [--seed N] [--handovers N] [--options JSON]

May import the core, its `testing` and this dist. Of every request: it ends once, within its deadline and two seconds;
what is reported as received is right to the byte and nothing else was written; what failed says why. Of every lease: it
is released once, and in the end nothing is kept. Without a fault nothing fails.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import attrs

from tensorway.kv import RequestView
from tensorway.testing.ranks import Ranks
from tensorway_kv.testing import engine as side
from tensorway_kv.testing.engine import Deployment, Engine
from tensorway_kv.testing.pushing import compute
from tensorway_kv.testing.requests import Requests, Wanted, check
from tensorway_kv.testing.shapes import pair

DEADLINE: Final = 4.0
LEASE: Final = 2.0
PRESENCE: Final = 2.0
#: How much later than its deadline a request may end, on a machine that others use, too.
SLACK: Final = 2.0
#: Hand-overs between two engines before there are others.
_EACH: Final = 24

_GONE: Final = {"lost", "handshake", "deadline", "failed"}
#: What a fault may make of the requests of its round, whichever of them it meets; how often it comes.
FAULTS: Final[dict[str, tuple[set[str], int]]] = {
    "none": (set(), 8),
    "cancel": ({"cancelled"}, 5),
    "force": ({"stale"}, 10),
    "aborted": ({"refused", "stale"}, 3),
    "forged ticket": (set(), 2),
    "replayed ticket": (set(), 2),
    "late request": ({"stale"}, 1),
    "consumer killed": (set(), 1),
    "consumer stopped": ({"stale", "deadline", "lost", "handshake"}, 2),
    "producer killed": (_GONE, 2),
    "producer stopped": ({"stale", *_GONE}, 2),
    "producer restarted": (_GONE, 1),
}


@attrs.define
class Stopped:
    """A rank that stands still, and until when."""

    engine: Engine
    rank: int
    until: float


class Campaign:
    """Engines in pairs, one pair after the other, over one set of processes."""

    def __init__(self, seed: int, options: dict[str, Any]) -> None:
        self.rng, self.seed = random.Random(seed), seed
        self.options = {"deadline": DEADLINE, "lease": LEASE, "presence": PRESENCE, **options}
        self.ranks = Ranks()
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.slowest = 0.0
        self._pairs = 0
        self._promises = False
        #: Promised, and not yet ended.
        self._to_compute: list[Wanted] = []

    def close(self) -> None:
        """End all processes."""
        self.ranks.close()

    def run(self, handovers: int, progress: Callable[[], None] = lambda: None) -> None:
        """So many requests, and a few more; raises for the first thing that does not hold."""
        while self.counts["requests"] < handovers:
            self._pair(min(_EACH, handovers - self.counts["requests"]))
            progress()

    def _pair(self, handovers: int) -> None:
        own, theirs = pair(self.rng)
        self._pairs += 1
        # Engines that push have room for all of a round, or for hardly one request.
        room, prefer = self.rng.choice(((0, "pull"), (64, "pull"), (64, "push"), (64, "push"), (12, "push")))
        how = {"staging_blocks": room, "prefer": prefer, **self.options}
        # What goes through staging memory both ways is not sent while it is computed.
        self._promises = how["staging_blocks"] >= 64 and not how.get("stage")
        deployment = Deployment(self.ranks, **{**how, "path": f"/campaign-{self.seed}/{self._pairs}"})
        try:
            self.deployment = deployment
            self.producer = deployment.engine("prefill", theirs)
            self.consumer = deployment.engine("decode", own)
            self.requests = Requests(self.rng, theirs, own)
            stop = self.counts["requests"] + handovers
            while self.counts["requests"] < stop:
                self._round()
            self._nothing_left()
        except BaseException:
            say(f"pair {self._pairs}, after {self.counts['requests']} requests: {theirs} to {own}")
            raise
        finally:
            deployment.close()

    # -- one round

    def _round(self) -> None:
        rng = self.rng
        fault = rng.choices(list(FAULTS), [often for _, often in FAULTS.values()])[0]
        if fault == "aborted" and not self._promises:
            fault = "none"
        self.faults[fault] += 1
        wanted = self.requests.several(rng.randint(1, 4))
        try:
            promised = self._promises and fault != "late request" and rng.random() < 0.5
            for one in wanted:
                if promised or fault == "aborted":
                    self._promise(one)
                else:
                    self.requests.compute(self.producer, one)
                    one.ticket = self.producer.keep(one.theirs, one.their_lists(), one.tokens)
            if fault == "late request":
                self._until_kept_no_more(wanted)
            elif rng.random() < 0.7:
                self._step(self.producer)
            self._reserve(wanted, fault)
            self._go(wanted, fault)
            self._judge(wanted, fault)
            self._let_go(wanted, fault)
        except BaseException:
            say(f"in a round of {len(wanted)} with fault: {fault}")
            raise
        self.counts["requests"] += len(wanted)

    def _step(self, engine: Engine, *chunks: tuple[Any, int, int, int]) -> None:
        """One step; what the producer lets go of is used for something else at once, as an engine would."""
        known = len(engine.released)
        if chunks:
            engine.does(compute, chunks, self.rng.random() < 0.9)
        else:
            engine.step()
        if engine is self.producer:
            for request in engine.released[known:]:
                self._let_be(engine, request)

    def _let_be(self, engine: Engine, request: str) -> None:
        if (blocks := self.requests.let_go(request)) is not None:
            engine.each(side.spoil, blocks)

    def _promise(self, one: Wanted) -> None:
        one.ticket = self.producer.ask("promise", RequestView(one.theirs, one.tokens), one.tokens)
        assert one.ticket is not None
        one.promised, one.computed = True, one.shared  # what it shares is computed when its turn comes
        self._to_compute.append(one)

    def _work(self, aborts: bool = False) -> None:
        """A step of the producer, which computes some of what it promised; the last step of a request ends it."""
        # The first has the tokens that others share: it is never the one that is given up, unless it is alone.
        one, producer = self._to_compute[-1 if aborts else 0], self.producer
        view = RequestView(one.theirs, one.tokens)
        if one.computed < one.tokens and not aborts:
            first, stop = one.computed, self.rng.randint(one.computed + 1, one.tokens)
            producer.ask("computes", view, one.their_blocks, first, stop)
            self._step(producer, (one.their_blocks, first, stop, one.number))
            one.computed = stop
            return
        self._to_compute.remove(one)
        if not aborts:
            self.requests.compute(producer, one)  # its states
        kept = producer.planner.call(side.finish, view, one.their_lists(), one.tokens, aborts)
        if not kept:
            producer.released.append(one.theirs)
            self._let_be(producer, one.theirs)

    def _until_kept_no_more(self, wanted: list[Wanted]) -> None:
        until, names = time.monotonic() + LEASE + SLACK, {one.theirs for one in wanted}
        # The engine may have its blocks back before the lease is over.
        while names - {*self.producer.released} or any(row["request"] in names for row in self.producer.ask("leases")):
            assert time.monotonic() < until, "leases that nobody knows of did not end"
            self._step(self.producer)

    def _reserve(self, wanted: list[Wanted], fault: str) -> None:
        consumer = self.consumer
        for one in wanted:
            if fault == "late request" and one.have == one.tokens:
                one.have -= 1  # who lacks nothing is told nothing by a lookup: it would be no miss, and look like one
            view, here = RequestView(one.here, one.tokens, one.ticket), one.tokens - one.have
            if fault == "forged ticket" and one is wanted[0]:
                one.miss = True
                ticket = copy.deepcopy(one.ticket)
                ticket["body"] = ticket["body"].replace('"epoch":', '"epoch":1', 1)
                assert ticket != one.ticket
                view = RequestView(one.here, one.tokens, ticket)
            if fault == "late request":  # a miss, or stale if clocks that differ a little would allow it
                one.miss = not consumer.ask("lookup", view, one.have).tokens
            elif self.rng.random() < 0.5 or one.miss:
                match = consumer.ask("lookup", view, one.have)
                assert match.tokens == (0 if one.miss else here), (match, one)
            one.since = time.monotonic()
            consumer.ask("reserve", view, one.our_lists(), one.have, here)
            one.told = not (one.miss and here == 0)  # who has no ticket and lacks nothing is not heard of again
            if fault == "replayed ticket" and one is wanted[0]:
                again = RequestView(f"{one.here}-again", one.tokens, one.ticket)
                assert consumer.ask("lookup", again, 0).tokens == 0
                consumer.ask("reserve", again, one.our_lists(), 0, one.tokens)
                self._step(consumer)
                assert consumer.failed.pop(again.id) == 0

    def _go(self, wanted: list[Wanted], fault: str) -> None:
        """Step both engines until all has ended, and let the fault come when it comes."""
        begun, pending = time.monotonic(), fault not in ("none", "forged ticket", "replayed ticket", "late request")
        dead: set[str] = set()
        stopped: Stopped | None = None
        turns = itertools.cycle(self.rng.sample((self.consumer.name, self.producer.name), 2))
        strikes_in = self.rng.choice((0, 0, 1, 1, 2, 3, 5, 8))
        if pending and self.rng.random() < 0.4:  # in the middle of the first step that reads
            strikes_in = 0
            self.consumer.begin()
        while True:
            now = time.monotonic()
            if pending and not strikes_in:
                pending, stopped = False, self._strike(wanted, fault, dead)
                took = time.monotonic() - now  # in which nobody was asked
                begun += took
                for one in wanted:
                    one.since += took
            strikes_in -= 1
            if stopped is not None and now >= stopped.until:
                stopped.engine.movers[stopped.rank].signal(signal.SIGCONT)
                stopped = None
            engine = self.consumer if next(turns) == self.consumer.name else self.producer
            if engine.name not in dead and (stopped is None or stopped.engine is not engine):
                if self._to_compute and engine is self.producer and self.rng.random() < 0.7:
                    self._work()
                else:
                    self._step(engine)
            self._note(wanted)
            if not pending and stopped is None and all(one.ended for one in wanted if one.told):
                break
            if self.consumer.name in dead:
                break
            limit = DEADLINE + SLACK + (LEASE + PRESENCE if "stopped" in fault else 0)
            assert time.monotonic() - begun < limit, f"no end: {[one for one in wanted if not one.ended]}"

    def _note(self, wanted: list[Wanted]) -> None:
        for one in wanted:
            if not one.ended and (one.here in self.consumer.received or one.here in self.consumer.failed):
                one.ended = time.monotonic() - one.since
                self.slowest = max(self.slowest, one.ended)

    def _strike(self, wanted: list[Wanted], fault: str, dead: set[str]) -> Stopped | None:
        rng, chosen = self.rng, self.rng.choice(wanted)
        whom = self.consumer if fault.startswith("consumer") else self.producer
        rank = rng.randrange(len(whom.movers))
        if fault == "cancel":
            chosen.struck = True
            self.consumer.ask("cancel", chosen.here)
        elif fault == "aborted":
            if self._to_compute:
                self._to_compute[-1].struck = True
                self._work(aborts=True)
        elif fault == "force":
            chosen.struck = True
            self.producer.ask("force", chosen.theirs)
        elif fault.endswith("stopped"):
            whom.movers[rank].signal(signal.SIGSTOP)
            return Stopped(whom, rank, time.monotonic() + rng.uniform(0.1, 1.6 * LEASE))
        elif fault.endswith("killed"):
            whom.movers[rank].signal(signal.SIGKILL)
            dead.add(whom.name)
        elif fault.endswith("restarted"):
            self._again(whom)
            self.producer = self.deployment.engines[0]
        return None

    def _again(self, engine: Engine) -> Engine:
        """Kill what is left of an engine, and let it begin its next life."""
        for process in (*engine.movers, engine.planner):
            if process.alive:
                process.signal(signal.SIGKILL)
        return self.deployment.again(engine)

    # -- what must hold

    def _judge(self, wanted: list[Wanted], fault: str) -> None:
        consumer, (allowed, _) = self.consumer, FAULTS[fault]
        if fault == "consumer killed":
            return
        for one in wanted:
            results = [said for said in consumer.results if (said.request, said.what) == (one.here, "received")]
            assert len(results) == (0 if one.miss else len(consumer.movers)), results
            causes = {result.cause for result in results if result.cause}
            assert consumer.received.count(one.here) + (one.here in consumer.failed) == one.told, one
            if not one.told:
                continue
            one.good = one.tokens if one.here in consumer.received else consumer.failed[one.here]
            if one.here in consumer.received:
                assert not causes and not one.miss
                assert fault != "late request", f"too late, and received: {one}"
                self.counts["received"] += 1
                continue
            expected = allowed if one.struck or fault not in ("cancel", "force", "aborted") else set()
            assert one.miss or (causes and causes <= expected), f"{one} failed: {results}"
            assert all("prefill" in result.why for result in results if result.cause), results
            self.counts[f"failed: {min(causes) if causes else 'no ticket'}"] += 1
            pause = 1.6 * LEASE if fault == "consumer stopped" else 0.0
            assert one.ended <= DEADLINE + SLACK + pause, f"too late: {one}"
        self.counts["bytes"] += sum(consumer.each(check, wanted))

    def _let_go(self, wanted: list[Wanted], fault: str) -> None:
        """Everything comes back, once; whoever has lost a rank begins anew."""
        if fault in ("producer killed", "producer restarted"):
            self._to_compute.clear()
        while self._to_compute:
            self._work()
        if fault == "producer killed":
            self.producer = self._again(self.producer)
        if fault in ("producer killed", "producer restarted"):
            self.requests.forget()
        else:
            # The ranks that are left of a consumer hold on until its deadline.
            names, until = [one.theirs for one in wanted], time.monotonic() + DEADLINE + LEASE + SLACK
            while any(name not in self.producer.released for name in names):
                assert time.monotonic() < until, f"still kept: {self.producer.ask('leases')}"
                self._step(self.producer)
                if fault != "consumer killed":
                    self._step(self.consumer)
            assert all(self.producer.released.count(name) == 1 for name in names), names
        if fault == "consumer killed":
            self.consumer = self._again(self.consumer)
        self.requests.ended(wanted)

    def _nothing_left(self) -> None:
        # Whoever was stopped is asked again, less and less often, whether it writes to landing memory.
        until = time.monotonic() + LEASE + SLACK + 4 * DEADLINE
        while sum(one.step() for one in (self.consumer, self.producer)):
            assert time.monotonic() < until, "an engine has something to do, and nothing is wanted"
        assert [] == list(self.producer.ask("leases"))
        assert self.requests.whole, "blocks were lost"
        assert 0 == self.consumer.planner.call(side.counted, "planner", "kv_requests_waiting")
        for one in (self.consumer, self.producer):
            for state in ("used", "held"):
                assert 0 == one.planner.call(side.counted, "planner", "kv_staging_blocks", {"state": state})
        assert {0} == set(self.consumer.each(side.counted, "mover", "kv_requests_waiting"))
        self.consumer.each(check, [])


def main(argv: list[str] | None = None) -> int:
    """Run a campaign; stops at the first thing that does not hold."""
    parser = argparse.ArgumentParser(prog="tensorway_kv.testing.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--handovers", type=int, default=2000)
    parser.add_argument("--options", type=json.loads, default={"transport": "local"})
    given = parser.parse_args(argv)
    say(f"seed {given.seed}: {given.handovers} hand-overs over {given.options}")
    campaign, started = Campaign(given.seed, given.options), time.monotonic()

    def progress() -> None:
        counts = campaign.counts
        ends = ", ".join(f"{name} {counts[name]}" for name in sorted(counts) if name not in ("requests", "bytes"))
        say(
            f"{counts['requests']} hand-overs in {time.monotonic() - started:.0f} s, {counts['bytes']:,} bytes right, "
            f"no breach: {ends}; the slowest end {campaign.slowest:.2f} s"
        )

    try:
        campaign.run(given.handovers, progress)
    finally:
        campaign.close()
        say("; ".join(f"{fault} {times}" for fault, times in sorted(campaign.faults.items())))
    return 0


def say(line: str) -> None:
    """Progress, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
