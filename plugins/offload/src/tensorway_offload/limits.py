"""How tiers are used: what one is called, how long it may take, how much may wait for it, and what all have in common.

May import the core's offload room. These are options of whoever composes tiers, such as a manager's backend.
"""

from __future__ import annotations

from typing import Any

import attrs

from tensorway.offload import Tier

_positive: Any = attrs.validators.gt(0)
_not_negative: Any = attrs.validators.ge(0)


@attrs.frozen
class TierLimits:
    """What one tier may take, and what is asked of it."""

    #: Seconds that one call may take, to look for blocks.
    lookup_seconds: float = attrs.field(default=1.0, validator=_positive)
    #: The same to read them,
    load_seconds: float = attrs.field(default=10.0, validator=_positive)
    #: to write them, to delete them,
    store_seconds: float = attrs.field(default=30.0, validator=_positive)
    #: and to say whether the tier can be used again.
    probe_seconds: float = attrs.field(default=5.0, validator=_positive)
    #: Calls at once, of those that read and of those that write; 0 for as many as the tier serves well, up to 8.
    threads: int = attrs.field(default=0, validator=_not_negative)
    #: Threads that may take the place of those that hang in a call. With none left the tier is not used.
    spare_threads: int = attrs.field(default=2, validator=_not_negative)
    #: Blocks that one call has at most.
    batch_blocks: int = attrs.field(default=64, validator=_positive)
    #: Blocks that may wait to be written or be written, with their rows held; what is more is dropped.
    queue_blocks: int = attrs.field(default=1024, validator=_positive)
    #: The same in bytes.
    queue_bytes: int = attrs.field(default=256 << 20, validator=_positive)
    #: Seconds that a block may be expected to wait, as fast as the tier has been.
    patience: float = attrs.field(default=5.0, validator=_positive)
    #: Bytes a second that are written at most; 0 for no end.
    store_rate: float = attrs.field(default=0.0, validator=_not_negative)
    #: Bytes that the blocks of one tenant may have there; 0 for no end.
    tenant_bytes: int = attrs.field(default=0, validator=_not_negative)
    #: Whether it is asked only for what the tiers before it have not, as when each question costs money.
    asked_last: bool = False
    #: Whether it is to have all blocks of a request, also those that were found.
    whole_requests: bool = False


@attrs.frozen
class BelowOptions:
    """What holds for all tiers."""

    #: Seconds after which a request hears MISS of a block of which no tier has said anything else.
    lookup_deadline: float = attrs.field(default=2.0, validator=_positive)
    #: Seconds for which other requests are told what a tier has said.
    remember: float = attrs.field(default=2.0, validator=_not_negative)
    #: Whether what was read from a tier is written to the tiers before it.
    refill: bool = False
    #: Calls in a row that fail or are late before a tier is left alone; half of the last 16 do it, too.
    failures: int = attrs.field(default=3, validator=_positive)
    #: Seconds for which it is left alone at first; twice as long each time, up to `longest_pause`.
    pause: float = attrs.field(default=0.5, validator=_positive)
    longest_pause: float = attrs.field(default=30.0, validator=_positive)
    #: Keys of each tier in events that nobody takes; if there are more, all is told to be gone. 0 keeps no events.
    events: int = attrs.field(default=1 << 20, validator=_not_negative)


@attrs.frozen
class NamedTier:
    """A tier, and what requests and metrics call it."""

    name: str
    tier: Tier
    limits: TierLimits = TierLimits()
