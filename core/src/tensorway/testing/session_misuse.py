"""What ranks of the session suite do that nobody should: what does not exist, after the end, in a forked child.

Room `testing`; see `session_ranks`.
"""

from __future__ import annotations

import os
import signal
import time
from array import array
from collections.abc import Callable, Sequence

from tensorway.eplb import Fetch, Send
from tensorway.testing.ranks import Place, Rank
from tensorway.testing.session_ranks import PATIENCE, group_of, mover


def close_twice(rank: Rank, place: Place) -> tuple[float, list[str]]:
    """Close, and again; the seconds that took, and what each use afterwards raises."""
    found, began = mover(rank), time.monotonic()
    fetch = Fetch(0, 1, array("i", [0]), array("i", [0]), 9)
    for _ in range(2):
        found.session.close()
    took = time.monotonic() - began
    uses: list[Callable[[], object]] = [
        lambda: found.session.post(fetch, 1.0),
        lambda: found.session.begin(9, [], []),
        lambda: found.session.regroup(group_of(place), 1.0),
    ]
    if found.session.capabilities.initiator == "both":
        uses.append(lambda: found.session.serve(Send(0, 1, array("i", [0]), 9), 1.0))
    return took, [_raised(use)[0] for use in uses]


def refusals(rank: Rank) -> dict[str, str]:
    """What does not exist here, and the classes of the error that is raised if it is asked for."""
    found = mover(rank)

    def posted(
        layer: int, peer: int, slots: Sequence[int], rows: Sequence[int], cycle: int = 0
    ) -> Callable[[], object]:
        return lambda: found.session.post(Fetch(layer, peer, array("i", slots), array("i", rows), cycle), 1.0)

    def served(layer: int, peer: int, slot: int, cycle: int = 0) -> Callable[[], object]:
        return lambda: found.session.serve(Send(layer, peer, array("i", [slot]), cycle), 1.0)

    layers, slots, rows = len(found.layout.layers), found.layout.slots, found.staging.rows
    uses = {
        "a fetch from itself": posted(0, 0, [0], [0]),
        "a rank that is no member's": posted(0, len(found.members), [0], [0]),
        "a layer that is not there": posted(layers, 1, [0], [0]),
        "a layer below zero": posted(-1, 1, [0], [0]),
        "a slot that is not there": posted(0, 1, [slots], [0]),
        "a slot below zero": posted(1, 1, [-1], [0]),
        "a row that is not there": posted(0, 1, [0], [rows]),
        "a row below zero": posted(0, 1, [0], [-1]),
        "more slots than rows": posted(0, 1, [0, 1], [0]),
        "a cycle below zero": posted(0, 1, [0], [0], -1),
    }
    if found.session.capabilities.initiator == "both":
        uses |= {
            "a send to itself": served(0, 0, 0),
            "a send to a rank that is no member's": served(0, len(found.members), 0),
            "a send of a layer that is not there": served(layers, 1, 0),
            "a send of a slot that is not there": served(0, 1, slots),
            "a send of a slot below zero": served(0, 1, -1),
            "a send in a cycle below zero": served(0, 1, 0, -1),
        }
    return {what: ", ".join(_raised(use)) for what, use in uses.items()}


def _raised(use: Callable[[], object]) -> list[str]:
    """The class of what is raised, and those that it is derived from."""
    try:
        use()
    except Exception as error:  # whatever it is, the test shows it
        return [each.__name__ for each in type(error).__mro__]
    return ["nothing"]


def use_in_a_child(rank: Rank) -> int:
    """Fork, and use and close the session there; the child's exit code, 7 if it was refused."""
    found, child = mover(rank), os.fork()
    if child == 0:
        code = 1
        try:
            if _raised(lambda: found.session.post(found.fetch(0, 1, [0], 9), 1.0))[0] == "Closed":
                found.session.close()
                code = 7
        finally:
            os._exit(code)
    until = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
