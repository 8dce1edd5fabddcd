"""Which headers go on, in both directions. May import the standard library."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from typing import Final

#: They are of one connection, and end with it.
_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: Set anew by this side. Which rank of an engine answers is the engine's affair: prefill and decode have others.
_OURS_UP: Final = frozenset(
    {"host", "content-length", "accept-encoding", "expect", "x-request-id", "x-forwarded-for", "x-data-parallel-rank"}
)
_OURS_DOWN: Final = frozenset({"content-length", "date", "server", "x-request-id"})
REQUEST_ID: Final = "X-Request-Id"
_ID: Final = re.compile(r"[\w.:@+/=-]{1,128}", re.ASCII)
#: Some come several times.
Headers = Iterable[tuple[str, str]]


def request_id(given: str | None) -> str:
    """The client's, if it is one that may stand in a log."""
    return given if given is not None and _ID.fullmatch(given) else uuid.uuid4().hex


def upward(headers: Headers, client: str | None, identity: str) -> list[tuple[str, str]]:
    """What an engine hears. The credentials are among it, and nobody here looks at them."""
    headers = list(headers)
    kept = _without(headers, _OURS_UP)
    # Proxies before this one are named already; the answer is passed on as bytes, so it must not be compressed.
    before = [value for name, value in headers if name.lower() == "x-forwarded-for" and _is_text(value)]
    return [
        *kept,
        ("X-Forwarded-For", ", ".join([*before, client or "unknown"])),
        ("Accept-Encoding", "identity"),
        (REQUEST_ID, identity),
    ]


def downward(headers: Headers, identity: str) -> list[tuple[str, str]]:
    """What the client hears."""
    return [*_without(headers, _OURS_DOWN), (REQUEST_ID, identity)]


def _without(headers: Headers, ours: frozenset[str]) -> list[tuple[str, str]]:
    pairs = list(headers)
    # A connection may name more that end with it.
    named = {each.strip().lower() for name, value in pairs if name.lower() == "connection" for each in value.split(",")}
    return [(name, value) for name, value in pairs if name.lower() not in _HOP | ours | named and _is_text(value)]


def _is_text(value: str) -> bool:
    """Whether it can be written again: bytes that are no text come as halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
