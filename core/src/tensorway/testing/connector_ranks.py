"""What processes of an engine do with a planner or a mover of any connector: step, submit, fill, compare, close.

Room `testing`; may import `kv` and the rooms below. The functions are called in a process, by
`tensorway.testing.ranks`; `connector_engines` says in which.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway.errors import TensorwayError
from tensorway.kv import METRICS, Capabilities, Event, KVContext, RequestView, Result, Step
from tensorway.metrics import Sample, total
from tensorway.references import resolve
from tensorway.testing.connector_memory import Memory, Shape
from tensorway.testing.possessions import fewest
from tensorway.testing.ranks import Rank

#: Seconds that opening, or one wait for a layer, may take.
PATIENCE: Final = 60.0
#: Tokens of a request that came, of which request and into which blocks.
Span = tuple[Sequence[int], int, int, int]


@attrs.frozen
class Opening:
    """With what both sides of an engine are made."""

    connector: str
    options: Mapping[str, object]
    engine: str
    shape: Shape
    #: "module:function" that is given each side, and returns what is used in its place: for tests of the suite.
    around: str = ""
    facts: Mapping[str, str] = attrs.field(factory=dict)


def open_side(rank: Rank, opening: Opening, role: Any, number: int, probed: bool = False) -> Capabilities:
    """Make a planner or a mover, with memory of its own; what it can do."""
    close_sides(rank)
    held = Memory(opening.shape, number)
    given = KVContext(
        opening.engine, rank.rendezvous(), role, opening.shape.tp, number, held.geometry,
        {"model": "tiny", **opening.facts}, PATIENCE,
    )  # fmt: skip
    made = _create(opening, given) if probed else _construct(opening, given)
    rank.notes["memory"] = held
    rank.notes[role] = resolve(opening.around)(made) if opening.around else made
    capabilities: Capabilities = made.capabilities
    return capabilities


def _create(opening: Opening, given: KVContext) -> Any:
    """In the way that an engine takes: by name, probed."""
    import tensorway

    return tensorway.create("kv_connector", opening.connector, dict(opening.options), given)


def _construct(opening: Opening, given: KVContext) -> Any:
    """Not probed: that is slow."""
    from tensorway.plugins import host
    from tensorway.plugins.options import validated

    (slot,) = host().named(opening.connector, "kv_connector")
    offer = slot.load(host().context, PATIENCE)
    assert offer is not None and offer.factory is not None, slot.record
    return offer.factory(validated(offer, dict(opening.options)), given)


def close_sides(rank: Rank) -> float:
    """End what is open here; how many seconds that took."""
    began = time.monotonic()
    for role in ("mover", "planner"):
        side = rank.notes.pop(role, None)
        if side is not None:
            side.close()
    return time.monotonic() - began


def close_twice(rank: Rank, role: str) -> float:
    """End a side, and again, and keep it; how many seconds that took."""
    began = time.monotonic()
    for _ in range(2):
        rank.notes[role].close()
    return time.monotonic() - began


# -- steps


def ask(rank: Rank, name: str, *arguments: Any) -> Any:
    """Call a method of the planner."""
    return getattr(rank.notes["planner"], name)(*arguments)


def decide(rank: Rank, said: Sequence[tuple[int, list[Result]]]) -> tuple[Step, bool, list[Event]]:
    """Give the planner what movers said, and ask what is next; whether it is busy, and what has happened to blocks."""
    planner = rank.notes["planner"]
    for number, results in said:
        planner.on_results(number, results)
    step: Step = planner.plan_step()
    # Collections of the connector's own need not survive another process.
    copied = Step(tuple(step.released), tuple(step.received), dict(step.failed), step.plan)
    return copied, bool(planner.busy()), list(planner.events())


def turn(rank: Rank, plan: bytes) -> list[Result]:
    """Submit a plan and say what has ended."""
    submit(rank, plan)
    return poll(rank)


def submit(rank: Rank, plan: bytes) -> None:
    """Give the mover its plan."""
    rank.notes["mover"].submit(plan)


def poll(rank: Rank) -> list[Result]:
    """What the mover says; whatever it raises fails the test."""
    return list(rank.notes["mover"].poll())


def submit_damaged(rank: Rank, plan: bytes, seed: int) -> list[str]:
    """Give the mover what is no plan; what else than an error of ours came of it."""
    rng = random.Random(seed)
    cut = [plan[:length] for length in {1, 2, len(plan) // 2, len(plan) - 2, len(plan) - 1} if 0 < length < len(plan)]
    wrong = []
    for bad in [*cut, b"\xc1", b"no plan at all", rng.randbytes(64), b"\xdd\xff\xff\xff\xff", b"\x91" * 5000]:
        try:
            rank.notes["mover"].submit(bad)
        except TensorwayError:
            continue
        except Exception as error:  # the test shows it
            wrong.append(f"{bad[:20]!r} raised {type(error).__name__}: {error}")
        else:
            wrong.append(f"{bad[:20]!r} was taken")
    return wrong


def flush(rank: Rank, deadline: float) -> float:
    """Wait until nothing reads pages; how many seconds that took."""
    began = time.monotonic()
    rank.notes["mover"].flush(deadline)
    return time.monotonic() - began


# -- layers


def wait_layers(rank: Rank, blocks: Sequence[int], start: int, stop: int, salt: int) -> list[bool]:
    """Wait for one layer after the other; whether the bytes of each are here then."""
    held: Memory = rank.notes["memory"]
    found = []
    for layer in range(held.shape.layers):
        rank.notes["mover"].before_layer(layer, PATIENCE)
        found.append(held.holds(blocks, start, stop, salt, [layer]))
    return found


def compute_layers(rank: Rank, blocks: Sequence[int], start: int, stop: int, salt: int) -> None:
    """Compute tokens layer by layer, and say so after each."""
    held: Memory = rank.notes["memory"]
    for layer in range(held.shape.layers):
        held.fill(blocks, start, stop, salt, [layer])
        rank.notes["mover"].after_layer(layer)


# -- memory


def fill(rank: Rank, blocks: Sequence[int], start: int, stop: int, salt: int) -> None:
    """Compute tokens of a request."""
    rank.notes["memory"].fill(blocks, start, stop, salt)


def spoil(rank: Rank, blocks: Sequence[int]) -> None:
    """Use blocks for something else."""
    rank.notes["memory"].spoil(blocks)


def wipe(rank: Rank) -> None:
    """Let nothing be in memory."""
    rank.notes["memory"].wipe()


def wrong(rank: Rank, spans: Sequence[Span], beside: Sequence[int] = ()) -> str:
    """What is not as it should be; empty if all is."""
    found: str = rank.notes["memory"].wrong(spans, beside)
    return found


# -- looking


def methods(rank: Rank, role: str, names: Sequence[str]) -> list[str]:
    """Which of these a side has."""
    return [name for name in names if callable(getattr(rank.notes[role], name, None))]


def raised(rank: Rank, role: str, name: str, *arguments: Any) -> str:
    """The class of what a call raises; empty if it raises nothing."""
    try:
        getattr(rank.notes[role], name)(*arguments)
    except Exception as error:  # whatever it is, the test shows it
        return type(error).__name__
    return ""


def counted(rank: Rank, role: str, metric: str, labels: Mapping[str, str]) -> float:
    """What a side has counted."""
    return total(rank.notes[role].statistics(), metric, **labels)


def misnamed(rank: Rank, role: str) -> list[str]:
    """Statistics that are not values of the vocabulary."""
    wrong = []
    for sample in rank.notes[role].statistics():
        if not isinstance(sample, Sample) or sample.metric not in METRICS:
            wrong.append(f"{sample} is no value of the vocabulary")
            continue
        names = [name for name, _ in sample.labels]
        missing = {"backend", "engine", *METRICS[sample.metric].labels} - set(names)
        if missing or len(set(names)) != len(names):
            wrong.append(f"{sample.metric} has labels {names}; missing: {sorted(missing)}")
        if not all(isinstance(value, str) for _, value in sample.labels) or not sample.value >= 0:
            wrong.append(f"{sample} has a value or label that is none")
        if METRICS[sample.metric].kind == "seconds" and not sample.buckets:
            wrong.append(f"{sample.metric} has no buckets")
    return wrong


def possessions(rank: Rank) -> tuple[int, int]:
    """Threads and open files."""
    return fewest()


def look_up(rank: Rank, request: RequestView, have: int) -> Any:
    """Ask the planner once."""
    return rank.notes["planner"].lookup(request, have)
