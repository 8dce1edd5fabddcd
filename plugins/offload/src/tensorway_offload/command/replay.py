"""`tensorway offload replay`: a trace through several policies at several capacities, beside what could be had at best.

May import this dist. Each policy is made by the host, whoever brings it, with the trace's own clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

import tensorway
from tensorway.cli.charts import Chart, Series, draw, drawable
from tensorway.errors import OptionsInvalid
from tensorway.offload import EvictionPolicy, PolicyContext
from tensorway_offload.command.traces import read
from tensorway_offload.replay import Clock, Request, belady, blocks, endless, hits, ratio

if TYPE_CHECKING:
    from tensorway.cli.output import Output

#: What the command replays if no policies are named.
POLICIES: Final = "lru,arc,s3fifo,sieve,tinylfu,foresight"
#: Seconds from one line of progress to the next.
_EVERY: Final = 5.0
_BAR: Final = 24
#: Told that something begins, and how many requests it goes through; what to call with how many are done.
Step = Callable[[str, int], Callable[[int], None]]


@attrs.define
class _Progress:
    """One line now and then, with how much of all is done."""

    out: Output
    steps: int
    done: int = 0
    told: float = attrs.field(factory=time.monotonic)

    def step(self, what: str, requests: int) -> Callable[[int], None]:
        """Something begins that goes through all requests; what to call with how many are done."""
        self.out.progress(f"{self._bar(0.0)} {what}")
        begun = self.done
        self.done += 1

        def tell(done: int) -> None:
            if time.monotonic() - self.told >= _EVERY:
                self.told = time.monotonic()
                self.out.progress(f"{self._bar(done / requests, begun)} {what}: {done:,} of {requests:,} requests")

        return tell

    def end(self) -> None:
        """All of it is done."""
        self.out.progress(f"[{'#' * _BAR}] 100% done")

    def _bar(self, part: float, begun: int | None = None) -> str:
        share = ((self.done if begun is None else begun) + part) / self.steps
        full = int(share * _BAR)
        return f"[{'#' * full}{'.' * (_BAR - full)}] {share:>4.0%}"


def run(given: argparse.Namespace, out: Output) -> int:
    """Replay, and put hit ratios side by side."""
    if given.plot is not None:
        drawable(given.plot)
    names = [name.strip() for name in (given.policies or POLICIES).split(",") if name.strip()]
    for name in names:  # what cannot be made is said before the work
        _policy(*_named(name), PolicyContext(1, Clock()))
    requests = read(given.trace, out)
    progress = _Progress(out, (len(names) + 1) * len(given.capacities))
    found = compared(requests, names, given.capacities, progress.step)
    progress.end()
    answer = {"trace": str(given.trace), **found, "plot": "" if given.plot is None else str(given.plot)}
    if given.plot is not None:
        draw(given.plot, f"Hit ratios of {given.trace.name}", [chart(answer)])
    out.json("tensorway.offload-replay/1", answer)
    _print(answer, out)
    return 0


def compared(requests: list[Request], names: Sequence[str], capacities: Sequence[str], step: Step) -> dict[str, Any]:
    """Hit ratios of these policies, beside the best that could be: what is printed and drawn."""
    asked, unique = blocks(requests)
    rooms = [max(1, _blocks(text, unique)) for text in capacities]
    best = [
        ratio(belady(requests, room), requests, step(f"Belady with {room:,} blocks", len(requests))) for room in rooms
    ]
    rows = [_row(*_named(name), requests, rooms, step) for name in names]
    return {
        "requests": len(requests),
        "blocks": asked,
        "unique": unique,
        "capacities": [{"given": text, "blocks": room} for text, room in zip(capacities, rooms, strict=True)],
        "endless": ratio(endless(requests), requests),
        "belady": best,
        "policies": [{"policy": text, **attrs.asdict(row)} for text, row in zip(names, rows, strict=True)],
    }


@attrs.frozen
class Row:
    """What one policy came to."""

    #: At each capacity.
    hits: list[float]
    requests_per_second: list[float]


def _row(name: str, options: dict[str, Any], requests: list[Request], capacities: list[int], step: Step) -> Row:
    found, rates = [], []
    for capacity in capacities:
        clock = Clock()
        policy = _policy(name, options, PolicyContext(capacity, clock))
        tell = step(f"{name} with {capacity:,} blocks", len(requests))
        started = time.thread_time()
        found.append(ratio(hits(policy, requests, capacity, clock), requests, tell))
        rates.append(round(len(requests) / max(1e-9, time.thread_time() - started), 1))
    return Row(found, rates)


def _policy(name: str, options: dict[str, Any], context: PolicyContext) -> EvictionPolicy:
    made: EvictionPolicy = tensorway.create("eviction_policy", name, options, context)
    return made


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """`name[:option=value]...`: the values as JSON, or as they are."""
    name, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionsInvalid(
                f"The policy {text!r} was asked for.",
                f"{pair!r} is no option with a value.",
                f"Write {name}:option=value; tensorway plugins show {name} lists its options.",
            )
        try:
            options[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            options[key.strip()] = value.strip()
    return name, options


def _blocks(text: str, unique: int) -> int:
    return int(unique * float(text[:-1]) / 100) if text.endswith("%") else int(text)


def chart(answer: dict[str, Any]) -> Chart:
    """Hit ratio against capacity."""
    lines = [(row["policy"], row["hits"], False) for row in answer["policies"]]
    endless = [answer["endless"]] * len(answer["capacities"])
    lines += [("Belady, who knows the future", answer["belady"], True), ("no limit", endless, True)]
    return Chart(
        "Hit ratio by capacity",
        "capacity, of all different blocks" if _shares(answer) else "capacity, in blocks",
        tuple(Series(name, tuple(values), aside) for name, values, aside in lines),
        tuple(row["given"] for row in answer["capacities"]),
        up="blocks found, of all that are asked for",
        span=(0.0, 0.0),
    )


def _shares(answer: dict[str, Any]) -> bool:
    return all(row["given"].endswith("%") for row in answer["capacities"])


def _print(answer: dict[str, Any], out: Output) -> None:
    out.line(
        f"{answer['requests']:,} requests ask for {answer['blocks']:,} blocks, {answer['unique']:,} different ones."
    )
    width = max(len("no limit"), *(len(row["policy"]) for row in answer["policies"]))
    heads = [f"{row['given']:>7}" for row in answer["capacities"]]
    out.line(f"{'policy':<{width}}  {'  '.join(heads)}  requests/s")
    for row in answer["policies"]:
        rate = min(row["requests_per_second"])
        out.line(f"{row['policy']:<{width}}  {_ratios(row['hits'])}  {rate:>10,.0f}")
    out.line(f"{'Belady':<{width}}  {_ratios(answer['belady'])}")
    out.line(f"{'no limit':<{width}}  {_ratios([answer['endless']] * len(answer['capacities']))}")
    out.text("Blocks found at the head of each request, of all that are asked for.")
    if answer["plot"]:
        out.line(f"drawn in {answer['plot']}")


def _ratios(values: list[float]) -> str:
    return "  ".join(f"{value:>7.4f}" for value in values)
