"""What a user may set on a Mooncake transport. Imports attrs, and what tells an address from a word."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

import attrs

#: What `tensorway.rendezvous.choose` resolves when the engine is made.
POLICY: Final = re.compile(r"auto|loopback|runtime|(addr|iface|cidr|peer|any):.+")


def _is_an_address(_instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if not value or POLICY.fullmatch(value):
        return
    # A name would be looked up by Mooncake, at the peer, without a deadline; and it was tried with IPv4 only.
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        raise ValueError(
            f"{attribute.name} is {value!r}; give a host policy, or an IPv4 address of this machine"
        ) from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{attribute.name} is {value}, which nobody can connect to; give an address of this machine")


@attrs.frozen
class MooncakeOptions:
    """Options of the transport `mooncake`."""

    #: Who this endpoint is for its peers; keep it over restarts. Empty makes one up.
    name: str = ""
    #: What peers are told: a host policy, or an IPv4 address of this machine. Empty: TENSORWAY_HOST, else 127.0.0.1.
    host: str = attrs.field(default="", validator=_is_an_address)
    #: Run Mooncake in a process of its own, over shared host memory, so that its crashes are not this process's.
    contained: bool = False
