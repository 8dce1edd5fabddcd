"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; loads no NCCL."""

from __future__ import annotations

from typing import Any

from tensorway.errors import BackendUnavailable
from tensorway.types import HookContext, Offer
from tensorway_nccl.options import NcclOptions
from tensorway_nccl.probe import probe


def eplb_communicator(ctx: HookContext) -> Offer:
    """The `nccl` communicator: rows from device to device."""
    return Offer(
        name="nccl",
        kind="eplb_communicator",
        summary="Moves expert weights between GPUs over NCCL (or RCCL, which has the same interface).",
        probe=probe,
        factory=construct,
        options=NcclOptions,
        devices=frozenset({"cuda", "rocm"}),
        priority=70,
    )


def construct(options: NcclOptions, context: Any) -> object:
    """A session for the group of an `EplbContext`; connects to all its members, so every one of them calls it."""
    answer = probe()  # also for who comes here without having asked: NCCL itself would fail in the first round
    if not answer.usable:
        raise BackendUnavailable("A session of nccl was to be opened.", f"{answer.reason}.", answer.remedy)
    from tensorway_nccl.session import NcclSession

    return NcclSession(options, context)
