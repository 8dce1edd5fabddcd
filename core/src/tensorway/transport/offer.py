"""What the core offers of kind `transport`: `local`.

Room `transport`; may import the ground and its own room.
"""

from __future__ import annotations

import attrs

from tensorway.types import HookContext, Offer, ProbeResult


@attrs.frozen
class LocalOptions:
    """Options of the transport `local`."""

    #: Who this endpoint is for its peers; keep it over restarts. Empty makes one up.
    name: str = ""
    #: Run it in a process of its own, as a transport over a native library would be: for tests, and to compare.
    contained: bool = False


def transport(ctx: HookContext) -> Offer:
    """The embedded default: host memory within one machine."""
    return Offer(
        name="local",
        kind="transport",
        summary="Moves host memory within one machine: memmove, or one copy by the kernel between two processes.",
        probe=probe,
        factory=construct,
        options=LocalOptions,
        devices={"cpu"},
        capabilities={"read", "write", "notify"},
        # Only if nothing else can: it does not leave the machine.
        priority=10,
    )


def construct(options: LocalOptions, context: object) -> object:
    """An endpoint over `local`."""
    from tensorway.transport.endpoint import Endpoint
    from tensorway.transport.local import LocalFabric

    if options.contained:
        from tensorway.transport.contained import contain

        return contain("local", "tensorway.transport.local:LocalFabric", endpoint=options.name)
    return Endpoint(LocalFabric(), options.name)


def probe() -> ProbeResult:
    """Read a page of the process that started this one: what the kernel allows here, it allows between engines.

    The parent, not a child: the kernel's ptrace protection always lets a process read its descendants.
    """
    import ctypes
    import os
    from pathlib import Path

    from tensorway.transport.local import PERMISSION

    with Path(f"/proc/{os.getppid()}/maps").open("rb") as maps:
        start = int(maps.readline().partition(b"-")[0], 16)
    page = ctypes.create_string_buffer(16)
    ours, theirs = (ctypes.c_uint64 * 2)(ctypes.addressof(page), 16), (ctypes.c_uint64 * 2)(start, 16)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    if libc.process_vm_readv(os.getppid(), ours, 1, theirs, 1, 0) == 16:
        return ProbeResult.passed(
            "within a process by memmove, between two by process_vm_readv", between_processes=True
        )
    why = os.strerror(ctypes.get_errno())
    reason = f"within a process by memmove only: the kernel refuses process_vm_readv ({why})"
    return ProbeResult(True, reason, PERMISSION, {"between_processes": False})
