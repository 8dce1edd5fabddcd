"""A member that says whatever it likes: messages by the hundred thousand to an engine that keeps blocks, by a seed.

    python -m tensorway_kv.testing.strangers [--seed N] [--count N] [--options JSON]

May import the core, its `testing` and this dist. The sender is another engine of the deployment, which the transport
knows by its name; some of what it sends is in the name of a third one. Neither `poll` nor what the planner does with it
raises; each message is refused and counted, or heard; not one of the leases that others hold ends or is kept longer;
and a hand-over goes on as if nothing had been said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from tensorway.errors import DeadlineExceeded, TensorwayError
from tensorway.kv import RequestView
from tensorway.testing.ranks import Rank, Ranks
from tensorway_kv import messages
from tensorway_kv.layouts import Cache, attention
from tensorway_kv.testing import engine as side
from tensorway_kv.testing import fuzz
from tensorway_kv.testing.engine import Deployment, Engine, until
from tensorway_kv.testing.shapes import Mixed

_TOKENS: Final = 16
_BLOCKS: Final = [[1, 2, 3, 4]]
_KEPT: Final = [f"kept-{number}" for number in range(8)]
#: Messages between two looks of who hears them.
_AT_ONCE: Final = 250
_SHAPE: Final = Mixed(1, (Cache((0, 1), attention(2, 8), 4),))


def flood(rank: Rank, seed: int, count: int, others: str) -> int:
    """Say so many things to the producer that this rank is connected to; how many the transport took."""
    rng, mover = random.Random(seed), rank.notes["mover"]
    (link,) = mover._links
    taken = 0
    for _ in range(count):
        payload = fuzz.hostile(rng)
        if rng.random() < 0.5:
            payload = _signed(rng, payload, mover.incarnation, others)
        try:
            mover.endpoint.notify(link.bound.peers[0], payload, 5.0)
            taken += 1
        except DeadlineExceeded:
            raise
        except (TensorwayError, TypeError):
            pass  # the transport itself takes no such thing
    return taken


def _signed(rng: random.Random, payload: Any, ours: str, others: str) -> Any:
    """The same from an engine that exists: from whom it comes, or from another; of a request that is kept."""
    message = messages.Reader().decode(payload)
    if message is None:
        return payload
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields["sender"] = rng.choice((ours, ours, others))
    if "request" in fields and rng.random() < 0.7:
        fields["request"] = rng.choice(_KEPT)
    if "rank" in fields and rng.random() < 0.7:
        fields["rank"] = 0
    if "held" in fields and rng.random() < 0.7:
        fields["held"] = tuple(messages.Held(name, rng.randrange(1, 1 << 62)) for name in _KEPT)
    return messages.encode(type(message)(**fields))


def listen(rank: Rank) -> list[Any]:
    """Hear until nothing more comes."""
    found, quiet = [], 0
    while quiet < 3:
        said = rank.notes["mover"].poll()
        quiet = 0 if said else quiet + 1
        found += said
        time.sleep(0.002)
    return found


class Strangers:
    """An engine that keeps blocks, one that may fetch them, and one that talks."""

    def __init__(self, seed: int, options: dict[str, Any]) -> None:
        self.rng, self.ranks = random.Random(seed), Ranks()
        self.counts: Counter[str] = Counter()
        self.deployment = Deployment(self.ranks, **{"lease": 600.0, "deadline": 20.0, **options})
        self.producer = self.deployment.engine("prefill", _SHAPE)
        self.consumer = self.deployment.engine("decode", _SHAPE)
        self.stranger = self.deployment.engine("stranger", _SHAPE)
        tickets = {name: self.producer.finish(name, _BLOCKS, _TOKENS) for name in (*_KEPT, "own", "met")}
        self.producer.step()
        # Both others are connected because each waits for something of its own.
        for one, name in ((self.stranger, "own"), (self.consumer, "met")):
            assert one.ask("lookup", RequestView(name, _TOKENS, tickets[name]), 0).tokens
            until(partial(_connected, one), one)
        self._life = self.consumer.planner.call(_life)
        self._tickets = tickets

    def close(self) -> None:
        """End all processes."""
        self.deployment.close()
        self.ranks.close()

    def run(self, count: int, progress: Callable[[int], None] = lambda said: None) -> None:
        """So many messages; raises for the first thing that does not hold."""
        said = 0
        while said < count:
            self._some(min(_AT_ONCE, count - said))
            said += _AT_ONCE
            if not said % 5000:
                progress(said)
        self._handed_over()

    def _some(self, count: int) -> None:
        before = self._refused()
        sent = self.stranger.movers[0].call(flood, self.rng.randrange(1 << 30), count, self._life)
        heard = self._hear()

        def all_heard() -> bool:
            self._hear(into=heard)
            return bool(self._refused() - before + len(heard) - sum(map(_honest, heard)) >= sent)

        until(all_heard, self.stranger)
        refused, beats = self._refused() - before, sum(map(_honest, heard))
        assert refused + len(heard) - beats == sent, (refused, len(heard), beats, sent)
        self.counts.update({"refused by the mover": refused, "heard": len(heard) - beats, "sent": sent})
        kept = {row["request"] for row in self.producer.ask("leases")}
        assert set(_KEPT) <= kept, f"ended by a stranger: {set(_KEPT) - kept}"

    def _hear(self, into: list[Any] | None = None) -> list[Any]:
        """What reaches the planner, too; it raises for nothing."""
        heard = self.producer.movers[0].call(listen)
        self.producer.planner.call(side.step, [(0, heard)])
        if into is not None:
            into += heard
            return []
        found: list[Any] = heard
        return found

    def _refused(self) -> int:
        counted = self.producer.movers[0].call(side.counted, "mover", "kv_messages_refused_total")
        return int(counted)

    def _handed_over(self) -> None:
        """Somebody else's request is served meanwhile, and every byte of it is right."""
        view = RequestView("met", _TOKENS, self._tickets["met"])
        self.consumer.ask("reserve", view, _BLOCKS, 0, _TOKENS)
        until(lambda: self.consumer.received or self.consumer.failed, self.consumer, self.producer)
        assert ["met"] == self.consumer.received, self.consumer.results
        self.consumer.each(side.verify, _BLOCKS, 0, _TOKENS, 1)
        row = next(row for row in self.producer.ask("leases") if row["request"] == _KEPT[0])
        assert row["left"] < 600.0, "renewed by a stranger who does not know its number"


def _life(rank: Rank) -> str:
    found: str = rank.notes["planner"].incarnation
    return found


def _connected(engine: Engine) -> bool:
    return all(engine.each(side.counted, "mover", "kv_links", {"state": "connected"}))


def _honest(heard: Any) -> bool:
    """Whether it is a heartbeat of who waits for one of these requests: nobody made that up."""
    message = messages.Reader().decode(heard.proof)
    return isinstance(message, messages.Heartbeat) and message.held[0].request in ("own", "met")


def main(argv: list[str] | None = None) -> int:
    """A campaign from the command line."""
    parser = argparse.ArgumentParser(prog="tensorway_kv.testing.strangers", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--options", type=json.loads, default={"transport": "local"})
    given = parser.parse_args(argv)
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    say(f"seed {given.seed}: {given.count:,} messages over {given.options}")
    campaign = Strangers(given.seed, given.options)
    try:
        campaign.run(given.count, lambda said: say(f"{said:,} in {time.monotonic() - started:.0f} s"))
    finally:
        campaign.close()
    say(
        f"no breach in {time.monotonic() - started:.0f} s: "
        + ", ".join(f"{k} {v:,}" for k, v in campaign.counts.items())
    )
    return 0


if __name__ == "__main__":
    # The processes find functions by the name of their module, and that is not this one's.
    sys.exit(importlib.import_module("tensorway_kv.testing.strangers").main())
