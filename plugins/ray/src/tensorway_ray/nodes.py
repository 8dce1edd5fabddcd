"""Ray's node as a host: its address, and what tells it from others. May import tensorway's ground and `rendezvous`."""

from __future__ import annotations

import json
import sys

from tensorway import settings
from tensorway.rendezvous import environment


def address() -> str | None:
    """The address that Ray knows this node by; None outside a cluster."""
    ray = sys.modules.get("ray")  # who has not imported it is in no cluster
    if ray is None or not ray.is_initialized():
        return None
    return str(ray.util.get_node_ip_address())


def identity() -> str:
    """This host as the stamp of an environment tells it: two nodes of one machine are two, if their addresses are."""
    plain, own = environment.this_host(), address()
    # A driver that wrote the stamp before it was in the cluster did not know its node.
    before = f'"host": {json.dumps(plain)}' in (settings.get(environment.STAMP) or "")
    return plain if before or own is None else f"{plain} {own}"
