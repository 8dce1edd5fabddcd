"""What the installed dists say they offer: one walk over their metadata, no line of their code.

Room `plugins`; may import the ground. Metadata is hostile until checked: whatever is in it becomes a `Declaration` or
a `Complaint`, never an exception. (`importlib.metadata.entry_points()` would do half of this, parse every dist on the
way, hide a dist that is there twice, and raise on the first file that is not UTF-8.)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import attrs

from tensorway.hookspecs import API_GROUP, BENCH, COMMAND, DEMO, GROUP_PREFIX, HOOKS, OFFLOAD_COMMAND

if TYPE_CHECKING:
    from importlib.metadata import Distribution

#: What a backend may be called; anything else could carry a terminal's escape codes into a report.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_REFERENCE: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
#: What is no backend, in the order of `Scan`.
_FOR_PEOPLE: Final = (COMMAND, DEMO, OFFLOAD_COMMAND, BENCH)
#: More backends than this from one dist is a mistake or an attack; the rest is counted, not kept.
MAX_PER_DIST: Final = 256
#: An `entry_points.txt` above this is not parsed.
MAX_BYTES: Final = 4 << 20


@attrs.frozen
class Declaration:
    """One entry point: `dist` says that it offers backend `name` of `kind`, or brings a command or a demo's part."""

    kind: str
    name: str
    #: "module:attribute" of the hook implementation; empty for an offer registered in this process.
    value: str
    dist: str
    version: str
    #: Where the dist's metadata lies.
    location: str = ""
    #: The plugin API that the dist was written for; None when it does not say.
    api: int | None = None

    @property
    def label(self) -> str:
        """The name that is never ambiguous."""
        return f"{self.name}@{self.dist}"


@attrs.frozen
class Complaint:
    """Metadata that cannot be used as it is; shown by `doctor`, in nobody's way."""

    code: str
    dist: str
    reason: str
    remedy: str


@attrs.frozen
class Scan:
    """The result of one walk, in an order that does not depend on the file system."""

    declarations: tuple[Declaration, ...]
    complaints: tuple[Complaint, ...]
    #: Commands for the command line; `kind` is `COMMAND`.
    commands: tuple[Declaration, ...] = ()
    #: Parts of the demo; `kind` is `DEMO`.
    demos: tuple[Declaration, ...] = ()
    #: What follows `tensorway offload`; `kind` is `OFFLOAD_COMMAND`.
    offload_commands: tuple[Declaration, ...] = ()
    #: Benchmarks; `kind` is `BENCH`.
    benches: tuple[Declaration, ...] = ()


def scan(distributions: Callable[[], Iterable[Distribution]] | None = None) -> Scan:
    """Walk the installed dists once."""
    complaints: list[Complaint] = []
    found: dict[str, tuple[str, list[Declaration]]] = {}
    for dist in _walk(distributions or _metadata().distributions, complaints):
        text = _entry_points_text(dist, complaints)
        if text is None:
            continue
        try:
            identity = _Identity.of(dist)
        except Exception as error:
            complaints.append(_unreadable(dist, error))
            continue
        if identity.name in found:
            complaints.append(_twice(identity, found[identity.name][0]))
            continue
        found[identity.name] = (identity.location, list(_declarations(identity, tuple(_entries(text)), complaints)))
    order = {kind: index for index, kind in enumerate((*HOOKS, *_FOR_PEOPLE))}
    declarations = sorted(
        (declaration for _, rows in found.values() for declaration in rows),
        key=lambda row: (order[row.kind], row.name, row.dist),
    )
    return Scan(
        tuple(row for row in declarations if row.kind not in _FOR_PEOPLE),
        tuple(sorted(complaints, key=lambda row: (row.dist, row.code, row.reason))),
        *(tuple(row for row in declarations if row.kind == kind) for kind in _FOR_PEOPLE),
    )


def canonical(dist: str) -> str:
    """A dist's name in the index's own spelling, so that `Acme_NIXL` and `acme-nixl` are one."""
    return re.sub(r"[-_.]+", "-", dist).lower()


def installed_version(dist: str) -> str | None:
    """The version of one dist, None when it is not installed. For error messages: looks up one name, walks nothing."""
    try:
        return str(_metadata().version(dist))
    except Exception:  # not installed, or metadata nobody can read: the message goes without
        return None


def extras(dist: str) -> frozenset[str]:
    """The extras that a dist has, for the message that names one."""
    try:
        return frozenset(_metadata().metadata(dist).get_all("Provides-Extra") or ())
    except Exception:  # run from a checkout without metadata: the message goes without
        return frozenset()


@attrs.frozen
class _Entry:
    group: str
    name: str
    value: str


def _entries(text: str) -> Iterator[_Entry]:
    """The lines of an `entry_points.txt`.

    Not `dist.entry_points`: some versions of importlib.metadata raise there on the first value that is not a reference,
    and one bad line would hide every backend of its dist.
    """
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield _Entry(group, name.strip(), value.strip())


@attrs.frozen
class _Identity:
    name: str
    version: str
    location: str

    @classmethod
    def of(cls, dist: Distribution) -> _Identity:
        metadata = dist.metadata  # parsed anew at each access
        name: object = metadata["Name"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"the dist's name is {name!r}")
        return cls(canonical(name), printable(str(metadata["Version"])), _location(dist))


def _metadata() -> Any:
    # The stdlib's module before 3.12 lacks what the backport has; both cost tens of milliseconds, so not at import.
    if sys.version_info >= (3, 12):
        import importlib.metadata as module
    else:
        import importlib_metadata as module
    return module


def _walk(distributions: Callable[[], Iterable[Distribution]], complaints: list[Complaint]) -> Iterator[Distribution]:
    try:
        yield from distributions()
    except Exception as error:  # a finder on sys.meta_path that is not ours
        reason = f"walking the installed dists stopped early: {type(error).__name__}: {printable(str(error))}"
        complaints.append(
            Complaint("metadata-unreadable", "-", reason, "Look at sys.meta_path for what put a finder there.")
        )


def _entry_points_text(dist: Distribution, complaints: list[Complaint]) -> str | None:
    """The dist's entry points if they can concern us.

    Most dists end here, unparsed: this is what keeps the scan cheap.
    """
    try:
        text = dist.read_text("entry_points.txt")
    except Exception as error:
        complaints.append(_unreadable(dist, error))
        return None
    if not text or f"[{GROUP_PREFIX}" not in text.replace(" ", ""):
        return None
    if len(text) > MAX_BYTES:
        complaints.append(_unreadable(dist, ValueError(f"entry_points.txt has {len(text):,} characters")))
        return None
    return text


def _declarations(
    identity: _Identity, entry_points: tuple[_Entry, ...], complaints: list[Complaint]
) -> Iterator[Declaration]:
    ours = [ep for ep in entry_points if ep.group.startswith(GROUP_PREFIX) and ep.group != API_GROUP]
    api = _api(entry_points)
    seen: dict[tuple[str, str], str] = {}
    for entry_point in ours[:MAX_PER_DIST]:
        kind = entry_point.group.removeprefix(GROUP_PREFIX)
        problem = _problem(kind, entry_point, seen)
        if problem is not None:
            complaints.append(Complaint(problem[0], identity.name, problem[1], problem[2]))
        elif (kind, entry_point.name) not in seen:
            seen[kind, entry_point.name] = entry_point.value
            yield Declaration(
                kind, entry_point.name, entry_point.value, identity.name, identity.version, identity.location, api
            )
    if len(ours) > MAX_PER_DIST:
        reason = f"it declares {len(ours):,} backends; the first {MAX_PER_DIST} are looked at"
        complaints.append(Complaint("too-many", identity.name, reason, "Uninstall it, or report this to its author."))


def _problem(kind: str, entry_point: _Entry, seen: dict[tuple[str, str], str]) -> tuple[str, str, str] | None:
    """What is wrong with one entry point: code, reason, remedy."""
    if kind not in HOOKS and kind not in _FOR_PEOPLE:
        reason = f"it offers a {printable(kind)!r}, and this core has no such hook"
        return "unknown-hook", reason, "Upgrade tensorway, or report this to the plugin's author."
    if not _NAME.fullmatch(entry_point.name):
        reason = f"a {kind} is named {printable(entry_point.name)!r}; names are letters, digits, '.', '_' and '-'"
        return "entry-point-invalid", reason, "Report this to the plugin's author."
    if not _REFERENCE.fullmatch(entry_point.value):
        reason = f"{kind} {entry_point.name!r} refers to {printable(entry_point.value)!r}, which is not module:function"
        return "entry-point-invalid", reason, "Report this to the plugin's author."
    if seen.get((kind, entry_point.name), entry_point.value) != entry_point.value:
        reason = f"it declares {kind} {entry_point.name!r} twice; {seen[kind, entry_point.name]} is used"
        return "entry-point-invalid", reason, "Report this to the plugin's author."
    return None


def _api(entry_points: tuple[_Entry, ...]) -> int | None:
    numbers = [ep.name for ep in entry_points if ep.group == API_GROUP and ep.name.isascii() and ep.name.isdigit()]
    return int(numbers[0][:9]) if len(numbers) == 1 else None


def _twice(identity: _Identity, first: str) -> Complaint:
    # lib and lib64, or a stale egg-info beside a new install: Python imports the first, so the first is what counts.
    reason = f"its metadata is on the path twice: {first} is used, {identity.location} is ignored"
    return Complaint("found-twice", identity.name, reason, f"Remove {identity.location} if it is left over.")


def _unreadable(dist: Distribution, error: Exception) -> Complaint:
    location = _location(dist)
    reason = f"its metadata cannot be read: {type(error).__name__}: {printable(str(error))}"
    return Complaint(
        "metadata-unreadable", location.rsplit("/", 1)[-1] or "-", reason, f"Reinstall what is in {location}."
    )


def _location(dist: Distribution) -> str:
    # `_path` is private and stable since 3.8; without it the report only loses the place.
    return printable(str(getattr(dist, "_path", "")))


def printable(text: str) -> str:
    """Text from elsewhere, made fit for a terminal and a log: printable ASCII, 500 characters."""
    return text.encode("ascii", "backslashreplace").decode().translate(_CONTROL)[:500]


_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
