"""Which environment variables may travel to other processes, and which must not.

Room `rendezvous`; may import the ground. One registry says of each variable where its value is true: in the whole
cluster, on one host, in one process, or for nobody to see. A launcher copies what `outgoing` returns; a worker drops
what reached it by another way with `leaked`. Unknown variables are not ours to copy.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import attrs

from tensorway.platforms import boot_id

Scope = Literal["cluster", "host", "rank", "secret"]

#: Carries to workers where their environment comes from; see `leaked`.
STAMP: Final = "TENSORWAY_ENVIRONMENT_OF"


@attrs.frozen
class Variable:
    """One variable, or all that fit a pattern."""

    pattern: str
    scope: Scope
    #: Whether what is compiled or laid out depends on it. Opt-in: a forgotten one costs a compilation, not a mix-up.
    cache_key: bool = False

    def __attrs_post_init__(self) -> None:
        if self.cache_key and self.scope != "cluster":
            raise ValueError(f"{self.pattern} is of scope {self.scope}, so a cache key with it would fit nobody else")


#: The first that fits counts, so what is particular stands before what is general.
VARIABLES: Final = (
    *(Variable(name, "secret") for name in ("TENSORWAY_SECRET", "*_TOKEN", "*_API_KEY", "AWS_*", "*_PASSWORD")),
    *(Variable(name, "host") for name in ("*_SIDE_CHANNEL_HOST", "*_HOST_IP", "VLLM_LOOPBACK_IP", "POD_IP", "NODE_IP")),
    *(
        Variable(name, "host")
        for name in ("UCX_NET_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")
    ),
    *(
        Variable(name, "host")
        for name in ("MC_TCP_BIND_ADDRESS", "MOONCAKE_REQUESTER_LOCAL_HOSTNAME", "*_PCIE_MAPPING")
    ),
    *(
        Variable(name, "rank")
        for name in ("*_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "TENSORWAY_LOCAL_RANK", "SLURM_*")
    ),
    *(Variable(name, "rank") for name in ("*_SIDE_CHANNEL_PORT", "*_BOOTSTRAP_PORT", "VLLM_PORT", "VLLM_DP_RANK*")),
    *(
        Variable(name, "cluster")
        for name in ("TENSORWAY_*", "UCX_*", "NIXL_*", "NCCL_*", "GLOO_*", "MC_*", "MOONCAKE_*")
    ),
    *(Variable(name, "cluster") for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")),
)


def scope_of(name: str, variables: tuple[Variable, ...] = VARIABLES) -> Scope | None:
    """Where the value of a variable is true; None for one that is not ours."""
    return next((each.scope for each in variables if fnmatch.fnmatchcase(name, each.pattern)), None)


def outgoing(
    environment: Mapping[str, str], host: str | None = None, variables: tuple[Variable, ...] = VARIABLES
) -> dict[str, str]:
    """What a launcher may copy to processes elsewhere: what is true in the cluster, and the stamp for `leaked`."""
    scopes = {name: scope_of(name, variables) for name in environment}
    left = {name: _digest(environment[name]) for name, scope in scopes.items() if scope in ("host", "rank")}
    copied = {name: environment[name] for name, scope in scopes.items() if scope == "cluster" and name != STAMP}
    return {**copied, STAMP: json.dumps({"host": host or this_host(), "left": left}, sort_keys=True)}


def leaked(environment: Mapping[str, str], host: str | None = None) -> list[str]:
    """On a worker: variables whose values are its launcher's though they are true only there; drop them.

    They came by a way that nobody here controls: a job's environment, `mpirun -x`, a shell that was copied. A value
    that an operator set for this host is another, or this is the launcher's host, and nothing is said about it.
    """
    try:
        stamp = json.loads(environment.get(STAMP) or "{}")
        left = dict(stamp.get("left", {}))
    except (ValueError, AttributeError, TypeError):
        return []  # not written by us: it says nothing about anything
    if not stamp or stamp.get("host") == (host or this_host()):
        return []
    return sorted(name for name, digest in left.items() if name in environment and _digest(environment[name]) == digest)


def cache_key(environment: Mapping[str, str], variables: tuple[Variable, ...] = VARIABLES) -> str:
    """A digest of the variables on which compiled things depend."""
    chosen = {
        name: value
        for name, value in environment.items()
        if any(each.cache_key and fnmatch.fnmatchcase(name, each.pattern) for each in variables)
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def this_host() -> str:
    """What tells this host from others: its name, its boot, and the network that its addresses belong to."""
    return f"{socket.gethostname()} {boot_id()} {Path('/proc/self/ns/net').readlink()}"


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]
