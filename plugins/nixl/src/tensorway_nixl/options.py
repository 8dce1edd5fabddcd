"""What a user may set on a NIXL transport, on any build of NIXL. Imports attrs, and late what knows the policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

#: UCX transports that reach this host only and cannot carry UCX's control messages with peer failure detection.
_SAME_HOST: Final = frozenset({"cma", "knem", "posix", "self", "shm", "sm", "sysv", "xpmem", "cuda_copy", "cuda_ipc"})


def _carries_control_messages(_instance: object, _attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    # UCX accepts such a list and then refuses every endpoint with "no active messages transport".
    if value and _SAME_HOST.issuperset(value):
        raise ValueError(f"ucx_tls {','.join(value)} has no transport for UCX's control messages; add tcp, or rc")


def _each_names_something(_instance: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    # A comma inside a name would become two names: UCX takes them in one string.
    if bad := [item for item in value if not item.strip() or set(item) & set(",= \t\n")]:
        raise ValueError(f"{attribute.name} has the item {bad[0]!r}; give each name as an item of its own")


@attrs.frozen
class NixlOptions:
    """Options of the transports `nixl` and `rixl`."""

    #: Who this endpoint is for its peers; keep it over restarts. Empty makes one up.
    name: str = ""
    #: Network devices that UCX may use (`mlx5_0:1`, `eth0`); empty for all. UCX_NET_DEVICES wins over it.
    network_devices: tuple[str, ...] = attrs.field(default=(), validator=_each_names_something)
    #: UCX transports (`rc`, `tcp`, `cma`); empty for all. UCX_TLS wins over it.
    ucx_tls: tuple[str, ...] = attrs.field(default=(), validator=[_each_names_something, _carries_control_messages])
    #: Microseconds between two looks of the progress thread; at 0, NIXL's own default, it burns a core while idle.
    progress_interval_us: int = attrs.field(
        default=10_000, validator=[attrs.validators.ge(0), attrs.validators.le(1_000_000)]
    )
    #: Worker threads that split large requests; 0 for none.
    num_threads: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.le(256)])
    #: Run NIXL in a process of its own, over shared host memory, so that its crashes are not this process's.
    contained: bool = False
    #: A host policy (`cidr:10.0.0.0/8`) that decides the devices, in place of `network_devices`. Empty: TENSORWAY_HOST.
    host: str = ""
    #: Seconds without an answer after which UCX gives up a connection over TCP, and everybody on it is lost.
    peer_timeout: float = attrs.field(default=15.0, validator=[attrs.validators.ge(1), attrs.validators.le(3600)])

    def __attrs_post_init__(self) -> None:
        if self.host and self.network_devices:
            raise ValueError("host and network_devices both say which devices UCX may use; give one of them")

    @property
    def policy(self) -> str:
        """The host policy that decides the devices; empty where they are named, and where nothing says one."""
        from tensorway.rendezvous.hosts import policy_of

        return "" if self.network_devices else policy_of(self.host)

    @classmethod
    def from_plain(cls, given: Mapping[str, Any]) -> NixlOptions:
        """Options that went to another process as plain data, in which a tuple is a list."""
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
        }
        return cls(**options)
