"""Engines that share a folder: requests with hashes, and what goes wrong in the processes of their ranks.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from tensorway.kv import Match, RequestView
from tensorway.testing.ranks import Rank
from tensorway_kv.testing.engine import Engine, fill, until
from tensorway_kv.testing.memory import JUNK, Ids, salted

#: Tokens of a block of the engines that are here.
BLOCK: Final = 4


def asking(request: str, tokens: int, content: int = 1, tenant: str = "", block: int = BLOCK) -> RequestView:
    """A request whose tokens, and bytes, a number stands for."""
    hashes = tuple(hashlib.sha256(f"{content}/{at}/{block}".encode()).digest() for at in range(tokens // block))
    return RequestView(request, tokens, hashes=hashes, salt=tenant)


def save(engine: Engine, view: RequestView, blocks: Ids, content: int = 1) -> None:
    """Compute a request and end it, until it is saved."""
    engine.each(fill, blocks, view.tokens, content)
    assert engine.ask("finish", view, blocks, view.tokens).keep
    until(lambda: view.id in engine.released, engine)


def look(engine: Engine, view: RequestView, have: int = 0) -> Match:
    """What is stored of a request, once that is known."""
    found: list[Match] = []

    def known() -> bool:
        found.append(engine.ask("lookup", view, have))
        return found[-1].mode != "later"

    until(known, engine)
    return found[-1]


def load(engine: Engine, view: RequestView, blocks: Ids, have: int, tokens: int) -> int | None:
    """Load tokens that were found; None if they were received, else how many are good."""
    engine.ask("reserve", view, blocks, have, tokens)
    until(lambda: view.id in engine.received or view.id in engine.failed, engine)
    if view.id in engine.received:
        engine.received.remove(view.id)
        return None
    return engine.failed.pop(view.id)


# -- in the processes


def verify_prefix(rank: Rank, blocks: Ids, start: int, good: int, stop: int, content: int) -> None:
    """See that the good tokens are there, and nothing outside of the request's tokens was written.

    What lies between the good ones and the end was promised to nobody.
    """
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for _, places, names in held.places(blocks, range(start, stop)):
        expected[places] = held.memory[places]
    for _, places, names in held.places(blocks, range(start, good)):
        expected[places] = salted(names, content)
    np.testing.assert_array_equal(held.memory, expected)


def hang(rank: Rank) -> None:
    """Let the file system not answer from now on, whatever it is asked; `unhang` ends that."""
    event = rank.notes["hanging"] = threading.Event()
    originals = rank.notes["originals"] = {name: getattr(os, name) for name in ("open", "lstat", "stat", "scandir")}
    main = threading.main_thread()

    def waiting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not main:
                event.wait(60)
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(os, name, waiting(name))


def unhang(rank: Rank) -> None:
    """Let the file system answer, also what it was asked before."""
    for name, original in rank.notes.pop("originals").items():
        setattr(os, name, original)
    rank.notes.pop("hanging").set()


def no_files_longer_than(rank: Rank, nbytes: int) -> None:
    """Let the disk be full for files of this process that are longer; -1 for no more."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes if nbytes >= 0 else hard, hard))


def save_on(rank: Rank, plan: bytes) -> None:
    """Begin what a plan says and come back; the test kills this process while it works."""
    rank.notes["mover"].submit(plan)


def files_below(folder: str) -> list[Path]:
    """All files, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
