"""Whatever children do, in whatever order: what must hold of every request of several connectors, by a seed."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import attrs
import pytest
from engines import Shape

from tensorway.kv import KVContext, RequestView
from tensorway.plugins import isolated
from tensorway_kv.offers import several
from tensorway_kv.several import tickets
from tensorway_kv.testing.memory import memory_of
from tensorway_kv.testing.scripted import BLOCK, Script, World

GEOMETRY = memory_of(Shape(), 0)[0]
CAUSES = ("lost", "failed", "stale", "handshake", "expired", "deadline", "nothing known")
RAISING = ["lookup", "reserve", "finish", "plan_step", "on_results", "cancel", "busy", "mover.submit", "mover.poll"]


@attrs.define
class Wanted:
    """A request, as the engine knows it."""

    view: RequestView
    blocks: list[list[int]]
    have: int
    reserved: bool = False
    tokens: int = 0
    ended: list[str] = attrs.field(factory=list)


class Model:
    """An engine that does anything, and knows what must hold."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.clock = SimpleNamespace(now=1000.0)
        names = "abcd"[: rng.randint(1, 4)]
        calm = rng.random() < 0.4
        self.world = World(seed, rng.randint(1, 2), {name: self.script(calm) for name in names})
        self.children = [self.child(name) for name in names]
        self.wanted: dict[str, Wanted] = {}
        self.kept: dict[str, int] = {}
        self.released: list[str] = []
        self.count = self.next_block = 0

    def script(self, calm):
        rng = self.rng
        raises = {} if calm or rng.random() < 0.5 else {rng.choice(RAISING): rng.choice((0.02, 0.1, 0.5))}
        return Script(
            tokens=rng.choice((0, 10, 99)),
            aligned=rng.random() < 0.3,
            later=rng.choice((0.0, 0.0, 0.3, 1.0)),
            fails=rng.choice((0.0, 0.3, 1.0)),
            causes=tuple(rng.sample(CAUSES, 2)),
            hangs=rng.choice((0.0, 0.0, 0.3)),
            steps=rng.randint(1, 4),
            raises=raises,
            keeps=rng.random(),
            releases=rng.choice((0.1, 0.5, 1.0)),
        )

    def child(self, name):
        rng = self.rng
        return {
            "name": name,
            "backend": "scripted",
            "options": {"child": name},
            "load": rng.random() < 0.9,
            "save": rng.choice(("always", "always", "never", "otherwise")),
            "deadline": rng.uniform(0.5, 4.0),
            "tries": rng.randint(1, 3),
            "patience": rng.choice((0.0, 0.3, 1.0)),
        }

    # -- what the engine does

    def run(self, steps):
        options = {"children": self.children, "deadline": 8.0, "faults": self.rng.randint(1, 4)}
        with isolated([several(None), self.world.offer()]) as host:

            def make(role, rank=0):
                context = KVContext("decode", None, role, self.world.ranks, rank, GEOMETRY)
                return host.create("kv_connector", "several", options, context)

            self.planner = make("planner")
            self.movers = [make("mover", rank) for rank in range(self.world.ranks)]
        for _ in range(steps):
            self.rng.choices(
                [self.new, self.ask, self.reserve, self.cancel, self.finish, self.step, self.rest],
                [3, 4, 4, 1, 2, 8, 1],
            )[0]()
        self.drain()
        self.planner.close()
        for mover in self.movers:
            mover.close()
        assert [] == self.world.breaches

    def new(self):
        rng = self.rng
        self.count += 1
        name = rng.choice((f"r{self.count}", f"{rng.randint(0, 2)}/r{self.count}"))
        tokens = rng.randint(1, 24)
        parts = {}
        for child in self.world.scripts:
            if rng.random() < 0.6:
                has = [{"child": child, "tokens": rng.randint(0, 26)} for _ in range(rng.randint(1, 3))]
                parts[child] = has[0] if len(has) == 1 else has
        ticket = {"no": "ticket"} if rng.random() < 0.05 else tickets.merged(parts)
        count = -(-tokens // BLOCK)
        blocks = [[self.next_block + n for n in range(count)]]
        self.next_block += count
        have = rng.choice((0, 0, rng.randint(0, tokens)))
        self.wanted[name] = Wanted(RequestView(name, tokens, ticket, salt=name), blocks, have)

    def one(self, reserved):
        found = [one for one in self.wanted.values() if one.reserved == reserved and not one.ended]
        return self.rng.choice(found) if found else None

    def ask(self):
        if (one := self.one(reserved=False)) is not None:
            match = self.planner.lookup(one.view, one.have)
            assert 0 <= match.tokens <= one.view.tokens - one.have
            assert sum(match.sources.values()) == match.tokens

    def reserve(self):
        if (one := self.one(reserved=False)) is not None:
            one.reserved, one.tokens = (
                True,
                self.rng.choice((0, one.view.tokens - one.have, one.view.tokens - one.have)),
            )
            self.world.opened |= set(one.blocks[0])
            for token in range(one.have):
                for rank in range(self.world.ranks):
                    self.world.write(rank, one.blocks[0], token, one.view.salt)
            self.planner.reserve(one.view, one.blocks, one.have, one.tokens)
            if self.rng.random() < 0.1:
                self.planner.reserve(one.view, one.blocks, one.have, one.tokens)

    def cancel(self):
        if (one := self.one(reserved=self.rng.random() < 0.6)) is not None:
            self.planner.cancel(one.view.id)
            if not one.reserved:
                one.ended.append("given up")

    def finish(self):
        done = [one for one in self.wanted.values() if one.ended and one.view.id not in self.kept]
        if done:
            one = self.rng.choice(done)
            aborted = self.rng.random() < 0.2
            kept = self.planner.finish(one.view, one.blocks, one.view.tokens, aborted=aborted)
            self.kept[one.view.id] = int(kept.keep)
            assert kept.ticket is None or kept.keep
            if kept.keep:
                assert self.keepers(one), "nobody keeps it"

    def rest(self):
        self.clock.now += self.rng.choice((0.05, 0.5, 2.0))

    def step(self):
        self.clock.now += 0.01
        step = self.planner.plan_step()
        for request in step.released:
            assert request not in self.released and self.kept[request] and not self.keepers(self.wanted[request])
            self.released.append(request)
        for request in step.received:
            one = self.end(request, "received")
            good = one.have + one.tokens
            assert all(self.world.good(one.blocks[0], token, one.view.salt) for token in range(good)), one
        for request, good in step.failed.items():
            one = self.end(request, "failed")
            assert one.tokens and one.have <= good < one.have + one.tokens
            assert all(self.world.good(one.blocks[0], token, one.view.salt) for token in range(good)), (good, one)
        for mover in self.movers:
            mover.submit(step.plan)
        for rank, mover in enumerate(self.movers):
            self.planner.on_results(rank, mover.poll())
        assert [] == self.world.breaches

    # -- what must hold

    def end(self, request, how):
        one = self.wanted[request]
        assert one.reserved and not one.ended, (one, how)
        one.ended.append(how)
        assert not self.world.written_to(one.blocks[0]), "it ended, and somebody writes to its pages"
        self.world.opened -= set(one.blocks[0])
        return one

    def keepers(self, one):
        names = {one.view.id, f"0/{one.view.id}"}
        gone = {name for name, side, rank in self.world.closed if side == "mover"}
        return {child for child, inner in self.world.kept if inner in names and child not in gone}

    def drain(self):
        """Everything comes to an end, once children that raise have raised enough or stopped."""
        for script in self.world.scripts.values():
            script.raises = {name: chance for name, chance in script.raises.items() if chance >= 0.5}
            script.releases = 1.0
        last = time.monotonic() + 30.0
        while self.left():
            assert time.monotonic() < last, (self.left(), self.world.scripts)
            self.clock.now += 0.2
            self.step()
            time.sleep(0.0002)  # for threads that close
        for child in self.world.scripts.values():
            child.raises = {}
        for _ in range(3):
            self.step()
        assert not self.planner.busy()
        assert all(len(one.ended) == 1 for one in self.wanted.values() if one.reserved)

    def left(self):
        kept = {request for request, keep in self.kept.items() if keep}
        under_way = [one for one in self.wanted.values() if one.reserved and not one.ended]
        return under_way or kept - set(self.released)


@pytest.mark.parametrize("seed", range(150))
def test_whatever_children_do_every_request_ends_once_and_is_what_it_says(seed, monkeypatch):
    model = Model(seed)
    monkeypatch.setattr("tensorway_kv.several.planner.time", SimpleNamespace(monotonic=lambda: model.clock.now))
    model.run(250)
