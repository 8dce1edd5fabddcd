"""What a user may set on the rendezvous `tcpstore`. Imports attrs only."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import attrs


def _is_address(_instance: object, _attribute: attrs.Attribute[Any], value: str) -> None:
    try:
        parts = urlsplit(f"//{value}")
        good = not value or (parts.hostname and parts.port and parts.netloc == value and "@" not in value)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"address {value!r} is not like host:29500, or [fd00::1]:29500")


@attrs.frozen
class TcpStoreOptions:
    """Options of the rendezvous `tcpstore`."""

    #: `host:port` of the store; torchrun's is MASTER_ADDR:MASTER_PORT. Empty: this process runs one.
    address: str = attrs.field(default="", validator=_is_address)
    #: Where a store of this process listens: a policy, not an address. Empty: TENSORWAY_HOST, else loopback.
    host: str = ""
    #: Its port; 0 lets the system choose a free one.
    port: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.le(65_535)])
    #: What all members know; empty takes TENSORWAY_SECRET from the environment.
    secret: str = attrs.field(default="", repr=False)
    #: Seconds that entering waits for the connection, over which torch looks up names; then calls wait, each its time.
    connect_s: float = attrs.field(default=15.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(300.0)])
