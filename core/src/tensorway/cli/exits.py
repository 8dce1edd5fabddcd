"""Exit codes, and the error that each belongs to. Documented in docs/reference/cli.md; a test compares.

Room `cli`.
"""

from __future__ import annotations

from typing import Final

from tensorway import errors

OK: Final = 0
BROKEN: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3
NOT_FOUND: Final = 4
INTERNAL: Final = 70
INTERRUPTED: Final = 130

#: Code -> one line for people.
MEANING: Final = {
    OK: "It worked; for `doctor`: nothing is broken (what merely cannot be used here is not broken).",
    BROKEN: "A plugin is broken; a test of `check` failed; for `doctor`, two dists claim one name; "
    "or what a command of a plugin looked at is not right (`bench compare`: slower).",
    USAGE: "The command line, an option or an environment variable cannot be meant.",
    UNAVAILABLE: "The backend that was asked for cannot be used here, two dists claim its name, "
    "or the peer cannot be reached.",
    NOT_FOUND: "No installed plugin offers what was asked for.",
    INTERNAL: "A defect of tensorway itself; `--debug` shows the traceback.",
    INTERRUPTED: "Interrupted from the keyboard.",
}

_BY_ERROR: Final = (
    (errors.BackendNotFound, NOT_FOUND),
    (errors.BackendUnavailable, UNAVAILABLE),
    (errors.BackendConflict, UNAVAILABLE),
    (errors.HostBusy, UNAVAILABLE),
    (errors.DeadlineExceeded, UNAVAILABLE),
    (errors.PeerLost, UNAVAILABLE),
    (errors.PluginDefect, BROKEN),
    (errors.OfferInvalid, BROKEN),
    (errors.TensorwayError, USAGE),
)


def code_for(error: BaseException) -> int:
    """The exit code that an error ends the command with."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), INTERNAL)
