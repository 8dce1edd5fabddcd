"""The plugin host of this process: what is installed, what can be used here, and why the rest cannot.

Room `plugins`: may import the ground, and is imported by the movements, the transports' selection and the command
line. Importing it scans nothing; the first question does, once.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tensorway import _logging, native
from tensorway.plugins import scan as _scan
from tensorway.plugins.host import Host
from tensorway.plugins.slots import Slot
from tensorway.settings import Settings, from_environment
from tensorway.types import Offer

_lock = threading.RLock()
_host: Host | None = None


def host() -> Host:
    """The host of this process. The first call walks the metadata of what is installed; later calls cost nothing."""
    global _host
    if _host is None:
        with _lock:
            if _host is None:
                _host = Host(_scan.scan(), from_environment())
    return _host


def register(offer: Offer) -> Slot:
    """Offer a backend from this process; see `Host.register`."""
    return host().register(offer)


def refresh() -> Host:
    """Look again: at the metadata, the environment, and everything that failed. Objects that exist keep working."""
    global _host
    with _lock:
        importlib.invalidate_caches()
        native.forget_failures()
        _logging.forget()
        kept = _host.registered() if _host is not None else ()
        fresh = Host(_scan.scan(), from_environment())
        for offer in kept:
            fresh.register(offer)
        _host = fresh
        return fresh


@contextmanager
def isolated(offers: Iterable[Offer] = (), *, settings: Settings | None = None) -> Iterator[Host]:
    """A host that discovers nothing and ignores the environment: these offers and no others.

    For tests; not for threads.
    """
    global _host
    with _lock:
        before = _host
        _logging.forget()
        _host = Host(_scan.Scan((), ()), settings or Settings())
    try:
        for offer in offers:
            _host.register(offer)
        yield _host
    finally:
        with _lock:
            _host = before


__all__ = ["Host", "Slot", "host", "isolated", "refresh", "register"]
