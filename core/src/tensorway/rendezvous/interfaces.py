"""What the interfaces of this host have: their addresses, and the devices for RDMA behind them.

Room `rendezvous`; may import the standard library only, which knows no address of this host but what names stand for.
So the C library is asked for the addresses, and the kernel's `/sys` for the devices.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final

import attrs

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Where the kernel shows its interfaces.
SYSFS: Final = Path("/sys/class/net")


@attrs.frozen
class Address:
    """One address of this host."""

    interface: str
    ip: IPAddress

    def __str__(self) -> str:
        return f"{self.ip}/{self.interface}"


class _SockAddr(ctypes.Structure):
    _fields_ = [("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26)]


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SockAddr)),
    ("netmask", ctypes.c_void_p),
    ("broadcast", ctypes.c_void_p),
    ("private", ctypes.c_void_p),
]
_UP: Final = 1


def local_addresses() -> list[Address]:
    """The addresses of this host's interfaces that are up, without those that are valid on one link only."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs")
    found, node = [], head
    try:
        while bool(node):
            entry = node.contents
            ip = _ip(entry.address.contents) if entry.flags & _UP and entry.address else None
            if ip is not None and not ip.is_link_local:
                # What comes after a colon is the label of an address (`eth0:1`), and no interface.
                found.append(Address(os.fsdecode(entry.name).partition(":")[0], ip))
            node = entry.next
    finally:
        libc.freeifaddrs(head)
    return found


def _ip(address: _SockAddr) -> IPAddress | None:
    data = bytes(address.data)
    if address.family == socket.AF_INET:
        return ipaddress.IPv4Address(data[2:6])
    if address.family == socket.AF_INET6:
        return ipaddress.IPv6Address(data[6:22])
    return None


def rdma_devices(interface: str, sysfs: Path = SYSFS) -> list[str]:
    """The devices for RDMA behind an interface, each with its port as UCX and NCCL write it (`mlx5_0:1`).

    A VLAN and a bond have none of their own: what lies below them is looked at.
    """
    place = sysfs / interface
    if not interface or "/" in interface or not place.is_dir():
        return []
    found = {f"{device.name}:{_port(place)}" for device in place.glob("device/infiniband/*")}
    for below in place.glob("lower_*"):
        found.update(rdma_devices(below.name.removeprefix("lower_"), sysfs))
    return sorted(found)


def _port(place: Path) -> int:
    """The kernel counts the ports of a card from 0, RDMA from 1; a card with one port may not say."""
    try:
        return int((place / "dev_port").read_text("ascii")) + 1
    except (OSError, ValueError):
        return 1
