"""Can this backend be used on this machine? Only whether Python has SQLite: which file is meant, the options say."""

from __future__ import annotations

import importlib.util

from tensorway import ProbeResult

#: A Python can be built without it.
LIBRARY = "_sqlite3"


def probe() -> ProbeResult:
    """Look for the module; a file is opened when the tier is."""
    if importlib.util.find_spec(LIBRARY) is None:
        return ProbeResult.failed(f"this Python was built without {LIBRARY}", f"Take a Python that has {LIBRARY}.")
    import sqlite3

    return ProbeResult.passed(f"SQLite {sqlite3.sqlite_version}", sqlite=sqlite3.sqlite_version)
