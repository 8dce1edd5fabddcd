"""Ray's node as a host: its address, for whoever is asked for the runtime's. May import the ground and `rendezvous`."""

from __future__ import annotations

import sys

from tensorway.rendezvous import hosts


def address() -> str | None:
    """The address that Ray knows this node by; None outside a cluster."""
    ray = sys.modules.get("ray")  # who has not imported it is in no cluster
    if ray is None or not ray.is_initialized():
        return None
    return str(ray.util.get_node_ip_address())


def choose(policy: str) -> hosts.HostChoice:
    """Resolve a policy on this node."""
    return hosts.choose(policy, runtime={"ray": address})
