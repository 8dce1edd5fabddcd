"""Connectors that are broken on purpose, each in one way, to see that the kit's suite says so.

May import the core and this dist. Each function is given a side of a connector that works, in its process, and changes
one thing; those of the planner leave movers alone, and the other way round.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import attrs
import msgspec

from tensorway.errors import PeerLost
from tensorway.kv import Event, Match, Result, Retention
from tensorway.metrics import Sample
from tensorway_kv import orders
from tensorway_kv.mover import HandoverMover
from tensorway_kv.planner import HandoverPlanner


def _after(side: Any, name: str, then: Callable[..., Any]) -> None:
    """Let `then` make something else of what a method returns; it is given that, and the arguments."""
    method = getattr(side, name)
    setattr(side, name, lambda *given, **named: then(method(*given, **named), *given))


def _poke(side: Any) -> None:
    """Change the last byte of the last plane."""
    ctypes.memset(side._geometry.planes[-1].region.end - 1, 0x42, 1)


def a_byte_beside(side: Any) -> Any:
    """It writes one byte that is no request's."""

    def then(results: list[Result]) -> list[Result]:
        if any(one.what == "received" for one in results):
            _poke(side)
        return results

    if isinstance(side, HandoverMover):
        _after(side, "poll", then)
    return side


def a_byte_missing(side: Any) -> Any:
    """It says `received`, and has not read anything."""

    def submit(plan: bytes) -> None:
        what = orders.decode(plan, side.incarnation)
        fetches = tuple(msgspec.structs.replace(one, start=one.stop) for one in what.fetches)
        plain(orders.encode(msgspec.structs.replace(what, fetches=fetches)))

    if isinstance(side, HandoverMover):
        plain = side.submit
        side.submit = submit  # type: ignore[method-assign]
    return side


def twice_received(side: Any) -> Any:
    """It says that a request was received, and later says it again."""
    return _again(side, "received")


def twice_released(side: Any) -> Any:
    """It gives blocks back that the engine has already."""
    return _again(side, "released")


def _again(side: Any, field: str) -> Any:
    said: list[str] = []

    def then(step: Any) -> Any:
        found = attrs.evolve(step, **{field: [*getattr(step, field), *said]})
        said[:] = list(getattr(step, field))
        return found

    if isinstance(side, HandoverPlanner):
        _after(side, "plan_step", then)
    return side


def never_released(side: Any) -> Any:
    """It forgets to give blocks back."""
    if isinstance(side, HandoverPlanner):
        _after(side, "plan_step", lambda step: attrs.evolve(step, released=()))
    return side


def strangers_are_believed(side: Any) -> Any:
    """It finds tokens whatever the ticket is."""
    if isinstance(side, HandoverPlanner):
        _after(side, "lookup", lambda match, request, have: Match(match.tokens or max(request.tokens - have, 0), "now"))
    return side


def tickets_raise(side: Any) -> Any:
    """It raises for a ticket that is none."""
    if isinstance(side, HandoverPlanner):
        _after(side, "lookup", lambda match, request, have: match if match.tokens else request.ticket["body"][0])
    return side


def unknown_causes(side: Any) -> Any:
    """It has causes of its own."""
    if isinstance(side, HandoverMover):
        _after(side, "poll", lambda results: [attrs.evolve(one, cause=one.cause and "oops") for one in results])
    return side


def polls_raise(side: Any) -> Any:
    """It raises what a peer does to it."""

    def then(results: list[Result]) -> list[Result]:
        if any(one.cause for one in results):
            raise PeerLost.because("A mover was polled.", "this is raised")
        return results

    if isinstance(side, HandoverMover):
        _after(side, "poll", then)
    return side


def any_plan_is_taken(side: Any) -> Any:
    """It lets errors of plans pass, and does nothing."""
    if isinstance(side, HandoverMover):
        submit = side.submit

        def lenient(plan: bytes) -> None:
            try:
                submit(plan)
            except Exception:
                return

        side.submit = lenient  # type: ignore[method-assign]
    return side


def plans_crash(side: Any) -> Any:
    """It raises what its decoder raises."""
    if isinstance(side, HandoverMover):
        submit = side.submit

        def careless(plan: bytes) -> None:
            try:
                submit(plan)
            except Exception as error:
                raise KeyError(str(error)) from None

        side.submit = careless  # type: ignore[method-assign]
    return side


def lookups_fetch(side: Any) -> Any:
    """It begins to fetch when it is only asked."""

    def then(match: Match, request: Any, have: int) -> Match:
        side.reserve(request, [list(range(16))], have, match.tokens)
        return match

    if isinstance(side, HandoverPlanner):
        _after(side, "lookup", then)
    return side


def writes_later(side: Any) -> Any:
    """It still writes after it has said that a request failed."""
    left = [0]

    def then(results: list[Result]) -> list[Result]:
        if left[0]:
            left[0] += 1
            if left[0] > 4:
                _poke(side)
        left[0] = left[0] or int(any(one.cause for one in results))
        return results

    if isinstance(side, HandoverMover):
        _after(side, "poll", then)
    return side


def words_of_its_own(side: Any) -> Any:
    """It counts what the vocabulary has not."""
    _after(side, "statistics", lambda samples: [*samples, Sample("kv_oops", (), 1.0)])
    return side


def events_of_nothing(side: Any) -> Any:
    """It says again and again that something was removed."""
    if isinstance(side, HandoverPlanner):
        _after(side, "events", lambda _: [Event("removed", (b"never",), block_tokens=4)])
    return side


def hides_layers(side: Any) -> Any:
    """It has calls for layers that it does not declare."""
    side.capabilities = attrs.evolve(side.capabilities, layerwise=False)
    return side


def waits_for_no_layer(side: Any) -> Any:
    """It lets the engine compute with what is not there."""
    if isinstance(side, HandoverMover):
        side.before_layer = lambda layer, deadline: None  # type: ignore[method-assign]
    return side


def keeps_when_closed(side: Any) -> Any:
    """It keeps blocks although nobody will release them any more."""
    if isinstance(side, HandoverPlanner):
        _after(side, "finish", lambda retention, *given: Retention(True) if side._closed else retention)
    return side


def capabilities_differ(side: Any) -> Any:
    """Its movers can do what its planner cannot."""
    if isinstance(side, HandoverMover):
        side.capabilities = attrs.evolve(side.capabilities, push=not side.capabilities.push)
    return side


def always_busy(side: Any) -> Any:
    """Its engine never rests."""
    if isinstance(side, HandoverPlanner):
        _after(side, "busy", lambda _: True)
    return side


def a_file_of_each(side: Any) -> Any:
    """It leaves a file open for each request."""
    held: list[int] = []

    def then(results: list[Result]) -> list[Result]:
        held.extend(os.open("/dev/null", os.O_RDONLY) for one in results if one.what == "received")
        return results

    if isinstance(side, HandoverMover):
        _after(side, "poll", then)
    return side


def whole_blocks_only(side: Any) -> Any:
    """It writes a consumer's own prefix as well."""
    if isinstance(side, HandoverPlanner):
        reserve = side.reserve
        side.reserve = lambda request, blocks, have, tokens: reserve(request, blocks, 0, have + tokens)  # type: ignore[method-assign]
    return side


def forgets_that_it_is_closed(side: Any) -> Any:
    """The second `close` raises."""
    if isinstance(side, HandoverMover):
        closed: list[bool] = []
        close = side.close

        def once(deadline: float = 5.0) -> None:
            closed.append(True)
            if len(closed) == 2:
                raise ValueError("it is closed")
            close(deadline)

        side.close = once  # type: ignore[method-assign]
    return side


def results_of_nobody_raise(side: Any) -> Any:
    """It takes for granted that a result is of a request that it knows."""
    known: dict[str, str] = {}

    def then(_: None, rank: int, results: list[Result]) -> None:
        for one in results:
            if one.request.startswith("nobody"):
                raise KeyError(known.get(one.request, one.request))

    if isinstance(side, HandoverPlanner):
        _after(side, "on_results", then)
    return side
