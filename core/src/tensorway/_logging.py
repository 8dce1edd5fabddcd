"""Loggers by room, and a warning that is given once per host, not once per rank.

Ground: imports nothing of tensorway. Everything logs through stdlib logging under `tensorway.<room>`; nothing here
configures a handler, because logging belongs to the application.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

_lock = threading.Lock()
_said: set[Hashable] = set()


def logger(room: str) -> logging.Logger:
    """The logger of one room: `tensorway.plugins`, `tensorway.native`, and so on."""
    return logging.getLogger(f"tensorway.{room}")


def warn_once(
    log: logging.Logger, key: Hashable, message: str, *args: object, rank: int, extra: Mapping[str, object]
) -> bool:
    """Warn in one line, once per process and on local rank 0 only; true if this call said it."""
    with _lock:
        if rank != 0 or key in _said:
            return False
        _said.add(key)
    log.warning(message, *args, extra=dict(extra))
    return True


def forget() -> None:
    """Let everything be said again: after a refresh, and between tests."""
    with _lock:
        _said.clear()


@contextmanager
def preserved() -> Iterator[None]:
    """Keep the application's logging as it is while a library is imported that reconfigures it.

    NIXL calls `logging.config.dictConfig` at import: that closes every handler in the process (a `FileHandler` in
    mode "w" then loses what comes after) and sets `logging.raiseExceptions` to False. Handlers that are not in
    logging's private list are not closed, so the list is empty while the library loads.
    """
    handlers, by_name = list(logging._handlerList), dict(logging._handlers)  # type: ignore[attr-defined]
    raise_exceptions = logging.raiseExceptions
    root = logging.getLogger()
    root_state = (root.level, list(root.handlers))
    logging._handlerList.clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging._handlerList[:0] = handlers  # type: ignore[attr-defined]
        logging._handlers.update(by_name)  # type: ignore[attr-defined]
        logging.raiseExceptions = raise_exceptions
        root.setLevel(root_state[0])
        root.handlers[:] = root_state[1]
