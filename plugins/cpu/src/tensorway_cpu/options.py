"""What a user may set on offloading to host memory, on its manager, and on the tiers below it.

May import attrs, and the core's errors and check of options.
"""

from __future__ import annotations

from typing import Final, Literal

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted

_ASKED: Final = "Options were given to offloading 'cpu'."
SEE: Final = "See docs/backends/cpu.md."


@attrs.frozen
class TierOptions:
    """One of `tiers`."""

    #: Which `offload_tier`.
    backend: str
    #: What requests and metrics call it; empty for the backend's name.
    name: str = ""
    #: Options of that backend.
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: How it is used: what `tensorway_offload.limits.TierLimits` has.
    limits: dict[str, object] = attrs.field(factory=dict)


@attrs.frozen
class CPUOptions:
    """Options of the offloading `cpu`."""

    #: Host memory for blocks; None takes half of what is available when it is constructed.
    capacity_bytes: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(4096))
    )
    #: Whether to pin the memory; None pins it when there is an accelerator to copy from.
    pin: bool | None = None
    #: Ask the kernel for huge pages; it may decline, and blocks work on either kind.
    huge_pages: bool = True
    #: The same as `capacity_bytes` in blocks; give one of them.
    capacity_blocks: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    #: Take all memory when it is opened, and not when blocks first come.
    populate: bool = False
    #: Threads that copy beside each rank.
    threads: int = attrs.field(
        default=2, validator=attrs.validators.and_(attrs.validators.ge(1), attrs.validators.le(64))
    )
    #: Whether rows go through the heads of a token first, or through the tokens of a head. It is fastest if pages of
    #: the engine do the same; engines that share tiers have one order.
    order: Literal["NHD", "HND"] = "NHD"
    #: Which `eviction_policy` says what goes first, and its options.
    policy: str = "lru"
    policy_options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: What `tensorway_offload.manager_options.ManagerOptions` has.
    manager: dict[str, object] = attrs.field(factory=dict)
    #: Tiers below host memory, the fastest first: for each what `TierOptions` has.
    tiers: list[dict[str, object]] = attrs.field(factory=list, repr=False)
    #: What holds for all of them: what `tensorway_offload.limits.BelowOptions` has.
    below: dict[str, object] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.capacity_bytes is not None and self.capacity_blocks is not None:
            true, to_do = "They have 'capacity_bytes' and 'capacity_blocks'.", "Give one of them."
            raise OptionsInvalid(_ASKED, true, to_do)
        tiers_of(self)


def tiers_of(options: CPUOptions) -> tuple[TierOptions, ...]:
    """The tiers, in their order; raises `OptionsInvalid`."""
    asked = "Options were given to tier {} of offloading 'cpu'."
    return tuple(fitted(TierOptions, given, asked.format(place), SEE) for place, given in enumerate(options.tiers, 1))
