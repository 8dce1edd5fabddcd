"""What a user may set on the rendezvous `redis`. Imports attrs only."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import attrs


def _is_url(_instance: object, _attribute: attrs.Attribute[Any], value: str) -> None:
    parts = urlsplit(value)
    if parts.scheme not in ("redis", "rediss", "unix"):
        # Without the value: there may be a password in it.
        raise ValueError("url is not like redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///path")


@attrs.frozen
class RedisOptions:
    """Options of the rendezvous `redis`."""

    #: Where Redis is, as its client writes it; `rediss` is over TLS. It may hold a password, so no report shows it.
    url: str = attrs.field(default="redis://127.0.0.1:6379/0", validator=_is_url, repr=False)
    #: What all members of the deployment know; empty takes TENSORWAY_SECRET from the environment.
    secret: str = attrs.field(default="", repr=False)
    #: The file that holds the password, if the URL does not.
    password_file: str = ""
    #: The certificates that a `rediss` server's own is checked with; empty takes the system's.
    ca_file: str = ""
    #: What the names of our keys and channels begin with; who shares it sees the same records.
    namespace: str = attrs.field(default="tensorway", validator=attrs.validators.matches_re(r"[A-Za-z0-9_.-]{1,64}"))
