"""What an operator may set, checked before anything is opened. May import attrs, msgspec and the core.

All seconds are deadlines: nothing in the router waits without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted

ASKED: Final = "Options were given to tensorway vllm router."
SEE: Final = "See tensorway vllm router --help."
_READ: Final = msgspec.json.Decoder(dict[str, Any])


def _seconds(default: float) -> Any:
    return attrs.field(default=default, validator=[attrs.validators.gt(0.0), attrs.validators.le(86_400.0)])


def _count(default: int, least: int, most: int) -> Any:
    return attrs.field(default=default, validator=[attrs.validators.ge(least), attrs.validators.le(most)])


def _engines(_: object, field: attrs.Attribute[Any], urls: tuple[str, ...]) -> None:
    for url in urls:
        if why := _wrong(url):
            # The text may hold a password, so it is not repeated.
            raise ValueError(f"an URL of {field.name!r} {why}; give it as http://host:port")


@attrs.frozen
class RouterOptions:
    """Options of the router; on the command line `_` is `-`."""

    #: Engines that answer, and engines that prefill for them. Without the latter, those that answer prefill as well.
    decode: tuple[str, ...] = attrs.field(validator=_engines)
    prefill: tuple[str, ...] = attrs.field(default=(), validator=_engines)
    host: str = "127.0.0.1"
    port: int = _count(8000, 0, 65_535)
    #: Which engine is asked: the one with the fewest requests of this router, or one after the other.
    choice: Literal["least-loaded", "round-robin"] = "least-loaded"
    #: Bytes of a request from which on a hand-over is worth a second request.
    hand_over_bytes: int = _count(0, 0, 1 << 30)
    #: For a connection, for the prefill, for the first word of a stream, between two words, and for all of a request.
    connect_seconds: float = _seconds(5.0)
    prefill_seconds: float = _seconds(60.0)
    first_seconds: float = _seconds(120.0)
    silence_seconds: float = _seconds(60.0)
    request_seconds: float = _seconds(900.0)
    #: For which a client may take to send its request.
    client_seconds: float = _seconds(30.0)
    #: How many decode engines a request is offered to.
    attempts: int = _count(3, 1, 16)
    #: How often engines are asked whether they are healthy, how long that may take, how many times in a row it fails
    #: before an engine is left alone, and the longest that it is.
    health_seconds: float = _seconds(2.0)
    health_deadline: float = _seconds(5.0)
    health_failures: int = _count(3, 1, 100)
    health_backoff: float = _seconds(10.0)
    #: Requests at once, and bytes of one; an answer that is no stream is held back up to so many bytes.
    most: int = _count(512, 1, 100_000)
    body_bytes: int = _count(8 << 20, 1024, 1 << 30)
    held_bytes: int = _count(8 << 20, 1024, 1 << 30)
    #: For which requests go on after SIGTERM.
    drain_seconds: float = _seconds(60.0)

    def __attrs_post_init__(self) -> None:
        """Each engine once, and at least one that answers."""
        if not self.decode:
            raise ValueError("no decode engine is named; give --decode at least once")
        named = [url.rstrip("/").lower() for url in (*self.prefill, *self.decode)]
        if twice := next((url for url in named if named.count(url) > 1), None):
            raise ValueError(f"the engine {twice} is named twice; an engine prefills or decodes")


def options_of(given: dict[str, Any]) -> RouterOptions:
    """Options from a mapping; raises `OptionsInvalid`, with the nearest name for one that is unknown."""
    return fitted(RouterOptions, given, ASKED, SEE)


def read(path: Path) -> dict[str, Any]:
    """What a file of JSON gives, not checked yet."""
    try:
        return _READ.decode(path.read_bytes())
    except OSError as error:
        raise OptionsInvalid(ASKED, f"{path} cannot be read: {error.strerror}.", "Give a file of JSON.") from None
    except UNREADABLE as error:
        true = f"{path} is no JSON object: {str(error).splitlines()[0]}."
        raise OptionsInvalid(ASKED, true, "Give an object whose names are those of the options.") from None


def _wrong(url: str) -> str | None:
    """Why this is no address of an engine."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is none"
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
        return "is none"
    if parts.username is not None or parts.password is not None:
        return "has a user or a password, which would be in logs and metrics"
    if port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
        return "has more than a host and a port"
    return None
