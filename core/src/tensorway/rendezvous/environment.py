"""Which environment variables may travel to other processes, and which must not.

Room `rendezvous`; may import the ground and its own room. `variables` knows of each where its value is true. A launcher
copies what `outgoing` returns; a worker calls `sanitize` before anything else, which drops what reached it by another
way. Reports name variables and never show a value. Unknown variables are not ours to copy.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections import Counter
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import msgspec

from tensorway import settings
from tensorway._logging import logger, warn_once
from tensorway.decoding import UNREADABLE
from tensorway.platforms import boot_id
from tensorway.rendezvous.variables import VARIABLES, Scope, Variable, policy, register, registered, row_of

__all__ = [
    "STAMP",
    "VARIABLES",
    "Report",
    "Scope",
    "Variable",
    "Verdict",
    "cache_key",
    "leaked",
    "outgoing",
    "register",
    "report",
    "sanitize",
    "scope_of",
    "this_host",
]

_log = logger("rendezvous")

#: Carries to workers where their environment comes from; see `leaked`.
STAMP: Final = "TENSORWAY_ENVIRONMENT_OF"
#: Turns all this off, or says where variables are true.
POLICY: Final = "TENSORWAY_ENVIRONMENT_POLICY"

Fate = Literal["travels", "held", "unknown", "dropped"]

#: A secret as long as this is looked for within other values; a shorter one is compared only.
_LONG: Final = 8
_PASSWORD: Final = re.compile(r"://[^/\s@]*:[^/\s@]+@")
#: What Ray fills in on the node: so it does not arrive as it was sent.
_REFERENCE: Final = re.compile(r"\$(\{|[A-Za-z_])")
_WHY: Final[Mapping[str, str]] = {
    "cluster": "true in the whole cluster",
    "host": "true on one host only",
    "rank": "true for one process only",
    "secret": "a secret stays where it is",
}


@attrs.frozen
class Verdict:
    """What becomes of one variable, and why."""

    name: str
    fate: Fate
    #: Where its value is true; empty for an unknown one.
    scope: str
    why: str


@attrs.frozen
class Report:
    """What became of the variables of an environment; without a single value, so it may be shown to everybody."""

    #: The host on which it was made.
    host: str
    verdicts: tuple[Verdict, ...]

    def names(self, fate: Fate) -> list[str]:
        """The variables of one fate."""
        return [each.name for each in self.verdicts if each.fate == fate]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"host": self.host, "variables": [attrs.asdict(each) for each in self.verdicts]}

    def __str__(self) -> str:
        """One line: what was dropped, with the reasons, or how many of which fate there are."""
        dropped: dict[str, list[str]] = {}
        for each in self.verdicts:
            if each.fate == "dropped":
                dropped.setdefault(each.why, []).append(each.name)
        if dropped:
            rows = "; ".join(f"{', '.join(names)} ({why})" for why, names in dropped.items())
            return f"dropped from the environment of {self.host}: {rows}"
        counts = Counter(each.fate for each in self.verdicts)
        return f"environment of {self.host}: {', '.join(f'{n} {fate}' for fate, n in counts.items()) or 'nothing'}"


class _Stamp(msgspec.Struct, frozen=True):
    host: str
    left: dict[str, str]


_DECODE_STAMP: Final = msgspec.json.Decoder(_Stamp).decode


def scope_of(name: str, variables: tuple[Variable, ...] | None = None) -> Scope | None:
    """Where the value of a variable is true; None for one that is not ours."""
    row = row_of(name, registered() if variables is None else variables)
    return row.scope if row else None


# -- at the launcher


def outgoing(
    environment: Mapping[str, str], host: str | None = None, variables: tuple[Variable, ...] | None = None
) -> dict[str, str]:
    """What a launcher may copy to processes elsewhere: what is true in the cluster, and the stamp for `leaked`.

    With `TENSORWAY_ENVIRONMENT_POLICY=off` it is all that is known and no secret, without a stamp: what goes wrong then
    is what this module is for.
    """
    verdicts = report(environment, variables).verdicts
    copied = {each.name: environment[each.name] for each in verdicts if each.fate == "travels"}
    rows = _rows(environment, variables)
    if rows is None:
        return copied
    left = {name: _digest(environment[name]) for name in environment if _betrays(name, environment, rows)}
    return {**copied, STAMP: json.dumps({"host": host or this_host(), "left": left}, sort_keys=True)}


def report(environment: Mapping[str, str], variables: tuple[Variable, ...] | None = None) -> Report:
    """What of this environment travels, what is held back and why, and what is unknown."""
    rows = _rows(environment, variables)
    known = registered() if rows is None else rows
    found = {name: row_of(name, known) for name in sorted(environment) if name != STAMP}
    secrets = {name: environment[name].strip() for name, row in found.items() if row and row.scope == "secret"}
    verdicts = [_judge(name, environment[name], row, secrets, off=rows is None) for name, row in found.items()]
    return Report(socket.gethostname(), tuple(verdicts))


def _judge(name: str, value: str, row: Variable | None, secrets: Mapping[str, str], *, off: bool) -> Verdict:
    if row is None:
        return Verdict(name, "unknown", "", "not known here, so not ours to copy")
    if row.scope == "secret" or (row.scope != "cluster" and not off):
        return Verdict(name, "held", row.scope, _WHY[row.scope])
    if not value.strip():
        return Verdict(name, "held", row.scope, "blank, which means unset")
    told = [of for of, text in secrets.items() if text and (text in value if len(text) >= _LONG else text == value)]
    if told or _PASSWORD.search(value):
        return Verdict(name, "held", row.scope, f"its value holds {f'that of {told[0]}' if told else 'a password'}")
    if _REFERENCE.search(value):
        return Verdict(name, "held", row.scope, "it refers to other variables, which Ray would fill in on the node")
    return Verdict(name, "travels", row.scope, _WHY["cluster"] if row.scope == "cluster" else "the policy is off")


def _betrays(name: str, environment: Mapping[str, str], rows: tuple[Variable, ...]) -> bool:
    """Whether the same value on another host shows that it was copied from here. Never a secret: a digest tells it."""
    row = row_of(name, rows)
    return row is not None and row.scope in ("host", "rank") and not row.coincides and bool(environment[name].strip())


# -- at the worker


def leaked(
    environment: Mapping[str, str], host: str | None = None, variables: tuple[Variable, ...] | None = None
) -> list[str]:
    """On a worker: variables whose values are its launcher's though they are true only there; `sanitize` drops them.

    They came by a way that nobody here controls: a job's environment, `mpirun -x`, a shell that was copied. A value
    that an operator set for this host is another, or this is the launcher's host, and nothing is said about it.
    """
    rows, stamp = _rows(environment, variables), _stamp(environment)
    if rows is None or stamp is None or stamp.host == (host or this_host()):
        return []
    names = (
        name for name in stamp.left.keys() & environment.keys() if scope_of(name, rows) not in ("cluster", "secret")
    )
    return sorted(name for name in names if _digest(environment[name]) == stamp.left[name])


def sanitize(
    environment: MutableMapping[str, str] | None = None,
    host: str | None = None,
    variables: tuple[Variable, ...] | None = None,
) -> Report:
    """A worker's first act: drop what leaked from its launcher, and say so in one line.

    It is this process's own environment unless another is given.

    Also drops what is true on one host and blank: that means unset, and some take it for an address. Libraries read
    their variables when they are loaded, so call it before that. The second time it finds nothing.
    """
    given = settings.environment() if environment is None else environment
    rows, stamp = _rows(given, variables), _stamp(given)
    if rows is None:
        return Report(socket.gethostname(), ())
    why = {name: "blank, which means unset" for name in given if not given[name].strip() and _of_host(name, rows)}
    origin = _printable(stamp.host) if stamp else ""
    why.update(dict.fromkeys(leaked(given, host, rows), f"the value of {origin}, where its launcher runs"))
    if environment is None:
        settings.unset(why)
    else:
        for name in why:
            del environment[name]
    verdicts = (Verdict(name, "dropped", scope_of(name, rows) or "", text) for name, text in sorted(why.items()))
    made = Report(socket.gethostname(), tuple(verdicts))
    if why:
        to_do = f"what is true on every host travels with {POLICY}=NAME=cluster"
        extra = {"variables": sorted(why)}
        warn_once(_log, ("sanitize", *sorted(why)), "%s; %s", made, to_do, rank=settings.local_rank(), extra=extra)
    return made


def _of_host(name: str, rows: tuple[Variable, ...]) -> bool:
    return scope_of(name, rows) == "host"


def _stamp(environment: Mapping[str, str]) -> _Stamp | None:
    try:
        return _DECODE_STAMP(environment.get(STAMP, "").encode("utf-8", "backslashreplace"))
    except UNREADABLE:
        return None  # not written by us: it says nothing about anything


def _rows(environment: Mapping[str, str], variables: tuple[Variable, ...] | None) -> tuple[Variable, ...] | None:
    """What is known of variables, as the operator has it; None when the policy is off."""
    operator = policy(environment.get(POLICY, ""))
    if operator is None or variables is not None:
        return None if operator is None else variables
    return registered(operator)


# -- what depends on it


def cache_key(environment: Mapping[str, str], variables: tuple[Variable, ...] | None = None) -> str:
    """A digest of the variables on which compiled things depend; a blank one counts as unset."""
    rows = registered() if variables is None else variables
    found = {name: row_of(name, rows) for name in environment if environment[name].strip()}
    chosen = {name: environment[name] for name, row in found.items() if row and row.cache_key}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def this_host() -> str:
    """What tells this host from others: its name, its boot, and the network that its addresses belong to."""
    return f"{socket.gethostname()} {boot_id()} {Path('/proc/self/ns/net').readlink()}"


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _printable(host: str) -> str:
    """The name of a host out of a stamp, which anybody may have written."""
    name = host.partition(" ")[0][:64]
    return name if name.isprintable() and name else "another host"
