"""What the environment says. The only module that reads or writes `os.environ`.

Ground: may import `errors`. Every variable that core knows is a row of `VARIABLES`; docs and `doctor` are made from it.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from tensorway.errors import SettingInvalid

PREFIX: Final = "TENSORWAY_"

#: Every variable of ours, with one line for people.
VARIABLES: Final[Mapping[str, str]] = {
    "TENSORWAY_PLUGINS": "Which plugins may be used: `nixl,cpu` only these, `-rixl` all but this; `kind:name@dist`.",
    "TENSORWAY_STRICT": "`1` raises on a broken plugin instead of going on without it.",
    "TENSORWAY_PROBE_TIMEOUT": "Seconds that one probe may take (default 30).",
    "TENSORWAY_SECRET": "What all members of a deployment know; whoever knows it reaches their memory.",
    "TENSORWAY_SECRET_FILE": "A file with that secret, where TENSORWAY_SECRET is not set.",
    "TENSORWAY_HOST": "The host policy of every option `host` that is left blank: `cidr:10.0.0.0/8`, never an address.",
    "TENSORWAY_METRICS": "A folder in which each process has a socket that `tensorway top` asks. Unset: there is none.",
    "TENSORWAY_REQUIRE_MULTIHOST": "`1` fails tests that need several hosts where there can be none. Else they skip.",
    "TENSORWAY_LOCAL_RANK": "This process's rank on its host; only rank 0 logs what every rank would log.",
    "TENSORWAY_ENVIRONMENT_POLICY": "`off` lets all but secrets travel; `NAME=SCOPE` says where values are true.",
    "TENSORWAY_ENVIRONMENT_OF": "Written by launchers for their workers: where their environment comes from.",
}

#: Where launchers write the rank of a process on its host, in the order of trust.
_LOCAL_RANK_VARIABLES: Final = (
    "TENSORWAY_LOCAL_RANK",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)
_MAX_SECRET: Final = 65_536
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"", "0", "false", "no", "off"})


@attrs.frozen
class Settings:
    """What the environment said when it was read; pass one explicitly to leave the environment out of it."""

    #: Selectors that are allowed; empty means everything that is installed.
    allow: tuple[str, ...] = ()
    #: Selectors that are denied.
    deny: tuple[str, ...] = ()
    #: Raise on a broken plugin.
    strict: bool = False
    #: Seconds that one probe may take.
    probe_timeout: float = 30.0
    #: Rank of this process on its host; 0 also when nobody launched it as a rank.
    local_rank: int = 0


def from_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Read `Settings` from the environment; a value that cannot be meant raises `SettingInvalid`."""
    environ = os.environ if environ is None else environ
    allow, deny = _plugins(environ.get("TENSORWAY_PLUGINS", ""))
    return Settings(
        allow=allow,
        deny=deny,
        strict=_flag(environ, "TENSORWAY_STRICT"),
        probe_timeout=_seconds(environ, "TENSORWAY_PROBE_TIMEOUT", Settings().probe_timeout),
        local_rank=local_rank(environ),
    )


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Variables that look like ours and are not, each with the nearest that is: a misspelling does nothing."""
    environ = os.environ if environ is None else environ
    # Compared without the prefix, which would make every name near to every other.
    ours = {name.removeprefix(PREFIX): name for name in VARIABLES}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in VARIABLES)
    near = {name: difflib.get_close_matches(name.removeprefix(PREFIX), ours, n=1) for name in unknown}
    return {name: ours[matches[0]] if matches else None for name, matches in near.items()}


def get(name: str, default: str | None = None) -> str | None:
    """One variable that belongs to somebody else (a driver, a launcher), read here so that all reading is here."""
    return os.environ.get(name, default)


def flag(name: str) -> bool:
    """Whether a variable of ours says yes."""
    return _flag(os.environ, name)


def secret() -> str:
    """What all members of a deployment know; empty when nobody said it."""
    if given := os.environ.get("TENSORWAY_SECRET", ""):
        try:
            given.encode()
        except UnicodeEncodeError:  # bytes that are no text; the error would hold them
            raise SettingInvalid(
                "TENSORWAY_SECRET was set.", "It is not text in UTF-8.", "Set it to a long random text."
            ) from None
        return given
    file = os.environ.get("TENSORWAY_SECRET_FILE", "")
    return secret_in(file, "TENSORWAY_SECRET_FILE") if file else ""


def secret_in(file: str, what: str) -> str:
    """The secret that a file holds; `what` named the file."""
    try:
        return text_in(file)
    except OSError as error:
        raise SettingInvalid(
            f"{what}={file!r} was set.", f"It cannot be read: {error}.", "Name a file with the secret."
        ) from None


def text_in(file: str) -> str:
    """The one line or so that a file of a secret or a password holds; `OSError` for what can be none."""
    # A pipe would be waited for, and a device has no end.
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError("it is no regular file")
        held = opened.read(_MAX_SECRET + 1)
    if len(held) > _MAX_SECRET:
        raise OSError(f"it has more than {_MAX_SECRET:,} bytes")
    try:
        return held.decode().strip()
    except UnicodeDecodeError:  # it would hold what was read
        raise OSError("it is not text in UTF-8") from None


def environment() -> dict[str, str]:
    """A copy of all of it, to start a process with."""
    return dict(os.environ)


def set_default(name: str, value: str) -> bool:
    """Set a variable of a native library unless the user has set it (to more than blanks); true if this call set it."""
    if os.environ.get(name, "").strip():
        return False
    os.environ[name] = value
    return True


def unset(names: Iterable[str]) -> None:
    """Remove variables that came from elsewhere and are not true here."""
    for name in names:
        os.environ.pop(name, None)


def terminal(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the user's terminal may be sent color (https://no-color.org, and terminals that say they are dumb)."""
    environ = os.environ if environ is None else environ
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def _plugins(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    for item in items:
        if not item.removeprefix("-").strip("-"):
            raise SettingInvalid(
                f"TENSORWAY_PLUGINS={text!r} was set.",
                f"The item {item!r} names no plugin.",
                "Write names with commas between them, a minus before each to deny: TENSORWAY_PLUGINS=nixl,cpu.",
            )
    allow = tuple(item for item in items if not item.startswith("-"))
    deny = tuple(item[1:].strip() for item in items if item.startswith("-"))
    return allow, deny


def _flag(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name, "").strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise SettingInvalid(
        f"{name}={environ[name]!r} was set.",
        "It is neither a yes nor a no.",
        f"Set {name}=1 or {name}=0.",
    )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    # The upper end is a day: beyond that the deadline that every wait must have is one in name only (and `inf` and
    # `nan` are none).
    if 0 < seconds <= 86_400:
        return seconds
    raise SettingInvalid(
        f"{name}={environ[name]!r} was set.",
        "It is not a number of seconds above 0 and up to 86400.",
        f"Set {name}={default:g}, or unset it.",
    )


def local_rank(environ: Mapping[str, str] | None = None) -> int:
    """This process's rank on its host, as its launcher says; 0 when nobody launched it as a rank."""
    environ = os.environ if environ is None else environ
    for name in _LOCAL_RANK_VARIABLES:
        text = environ.get(name, "").strip()
        if text.isascii() and text.isdigit():
            return int(text[:9])
        if text and name.startswith(PREFIX):
            raise SettingInvalid(
                f"{name}={environ[name]!r} was set.",
                "It is not a rank (0, 1, 2, ...).",
                f"Unset {name}; the launcher's LOCAL_RANK is used then.",
            )
    return 0
