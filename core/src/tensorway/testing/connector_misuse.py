"""What nobody should give to a connector: tickets that are none, results of nobody, blocks of another tenant.

Room `testing`; may import `kv` and the rooms below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from tensorway.kv import Match, RequestView, Result
from tensorway.testing.waiting import eventually

#: Seconds that a planner may say `later`.
_PATIENCE: Final = 60.0


def no_tickets() -> list[Any]:
    """What clients and other connectors may send along."""
    deep: Any = {}
    for _ in range(50):
        deep = {"body": deep, "parts": [deep]} if len(str(deep)) < 10_000 else {"body": deep}
    return [
        {},
        {"other": 1},
        {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "prefill"},
        {"engine": "prefill", "blocks": [[0]], "tokens": 1 << 62, "seal": ""},
        {"": "", "body": "\ud800", "seal": None, "length": float("nan")},
        {"body": "x" * 100_000},
        deep,
    ]


def damaged(ticket: Any, seed: int) -> Iterator[Any]:
    """A ticket that is good, with one of its texts or numbers changed, at any depth; none for none."""
    if isinstance(ticket, Mapping):
        yield _every_text_changed(ticket)
        for key in ticket:
            yield {name: value for name, value in ticket.items() if name != key}
            yield {**ticket, key: [ticket[key]]}
            if isinstance(ticket[key], str) and ticket[key]:
                yield {**ticket, key: _changed(ticket[key], seed)}


def _every_text_changed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _every_text_changed(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_every_text_changed(each) for each in value]
    return _changed(value, 0) if isinstance(value, str) else value


def _changed(text: str, seed: int) -> str:
    at = (len(text) // 2 + seed) % max(len(text), 1)
    return text[:at] + ("b" if text[at : at + 1] != "b" else "c") + text[at + 1 :]


def results_of_nobody() -> list[tuple[int, Result]]:
    """What no mover of this engine has said."""
    return [
        (0, Result("nobody", "received")),
        (0, Result("nobody", "sent", proof=b"\xff" * 9)),
        (0, Result("", "heard", proof=b"\xc1")),
        (0, Result("nobody", "cleared")),
        (99, Result("nobody", "received", "failed", "it never was")),
        (-1, Result("nobody", "received", tokens=1 << 62)),
    ]


def salted(view: RequestView, salt: str) -> RequestView:
    """The same request of another tenant."""
    return attrs.evolve(view, id=f"{view.id}-salted", salt=salt)


def rehashed(view: RequestView, known: int) -> RequestView:
    """A request that has the same first blocks, and then others."""
    others = [hashlib.blake2b(each, digest_size=len(each)).digest() for each in view.hashes[known:]]
    return attrs.evolve(view, id=f"{view.id}-rehashed", hashes=(*view.hashes[:known], *others))


def settle(ask: Callable[[], Match]) -> Match:
    """Ask until the answer is not `later`."""
    known: Match = eventually(lambda: None if (match := ask()).mode == "later" else match, _PATIENCE, "it is not known")
    return known
