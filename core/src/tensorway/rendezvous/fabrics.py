"""What a choice of address means to the fabrics: the variables by which each library takes its interface or device.

Room `rendezvous`; may import the ground and its own room. One choice feeds everything, so that control and data cannot
take different ways. What the user has set wins, and where it differs that is said once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from tensorway import settings
from tensorway._logging import logger, warn_once
from tensorway.rendezvous.hosts import HostChoice
from tensorway.rendezvous.interfaces import SYSFS, rdma_devices

_log = logger("rendezvous")

#: Variables that hold this host's own address, to bind and to tell others.
ADDRESSES: Final = (
    "VLLM_HOST_IP",
    "VLLM_NIXL_SIDE_CHANNEL_HOST",
    "VLLM_P2P_SIDE_CHANNEL_HOST",
    "VLLM_EC_SIDE_CHANNEL_HOST",
    "MOONCAKE_REQUESTER_LOCAL_HOSTNAME",
    "MC_TCP_BIND_ADDRESS",
)


def variables(choice: HostChoice, sysfs: Path = SYSFS) -> dict[str, str]:
    """The variables that make every library of this host use the interface of this choice."""
    given = dict.fromkeys(ADDRESSES, choice.address)
    if choice.interface:
        # TCP stays allowed beside RDMA: it is the same card, and UCX_TLS may leave out the other.
        given["UCX_NET_DEVICES"] = ",".join([*rdma_devices(choice.interface, sysfs), choice.interface])
        # Without the sign, NCCL takes every interface whose name begins so.
        given["NCCL_SOCKET_IFNAME"] = f"={choice.interface}"
        given["GLOO_SOCKET_IFNAME"] = choice.interface
    return given


def conflicts(given: Mapping[str, str]) -> dict[str, str]:
    """Those of these variables that the user has set otherwise, with his values, which win."""
    theirs = {name: (settings.get(name) or "").strip() for name in given}
    return {name: theirs[name] for name, ours in given.items() if not _agree(theirs[name], ours)}


def left_unset(choice: HostChoice, names: Iterable[str] | None = None, sysfs: Path = SYSFS) -> dict[str, str]:
    """Those of the variables (or of these) that the user has left unset; one that he set otherwise is said once."""
    given = variables(choice, sysfs)
    if names is not None:
        given = {name: given[name] for name in names if name in given}
    for name, theirs in conflicts(given).items():
        warn_once(
            _log,
            ("host", name, theirs, given[name]),
            "%s=%s is set, and wins over the host policy %s, which gives %s; unset it, or choose by one of them",
            name,
            theirs,
            choice.source,
            given[name],
            rank=settings.local_rank(),
            extra={"variable": name, "set": theirs, "chosen": given[name]},
        )
    return {name: value for name, value in given.items() if not (settings.get(name) or "").strip()}


def apply(choice: HostChoice, sysfs: Path = SYSFS) -> dict[str, str]:
    """Set, for this process, those that the user has left unset; returns what was set.

    A library reads its variables when it is loaded, so do this first.
    """
    free = left_unset(choice, sysfs=sysfs)
    return {name: value for name, value in free.items() if settings.set_default(name, value)}


def _agree(theirs: str, ours: str) -> bool:
    """Whether the user's list is blank or within ours: he may leave out a device, and the sign for an exact name."""
    return not theirs or set(theirs.lstrip("=").split(",")) <= set(ours.lstrip("=").split(","))
