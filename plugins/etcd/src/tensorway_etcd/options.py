"""What a user may set on the rendezvous `etcd`. Imports attrs only."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import attrs


def _are_urls(_instance: object, _attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    if not value:
        raise ValueError("endpoints is empty; give one URL at least")
    for endpoint in value:
        parts = urlsplit(endpoint)
        try:
            port = parts.port
        except ValueError:
            port = None
        plain = not (parts.username or parts.path.strip("/") or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not port or not plain:
            # Without the endpoint itself: somebody may have put a password into it.
            raise ValueError(f"endpoint {value.index(endpoint)} is not like https://host:2379, with nothing after it")


@attrs.frozen
class EtcdOptions:
    """Options of the rendezvous `etcd`."""

    #: The members of the cluster; each is tried in turn until one answers.
    endpoints: tuple[str, ...] = attrs.field(default=("http://127.0.0.1:2379",), validator=_are_urls)
    #: What all members of the deployment know; empty takes TENSORWAY_SECRET from the environment.
    secret: str = attrs.field(default="", repr=False)
    #: The user, where etcd has authentication enabled.
    user: str = ""
    #: The file that holds the user's password.
    password_file: str = ""
    #: The certificates that an `https` endpoint's own is checked with; empty takes the system's.
    ca_file: str = ""
    #: Our certificate and its key, where etcd asks for one.
    cert_file: str = ""
    key_file: str = ""
    #: What one request may have, as etcd's flag of that name says; a larger value is refused before it travels.
    max_request_bytes: int = attrs.field(default=1_572_864, validator=attrs.validators.ge(1024))
