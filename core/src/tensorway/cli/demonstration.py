"""What the dist of a movement says of it in `tensorway demo`, which is in the dist `tensorway-tools`.

Room `cli`; may import every room. The entry-point group is `tensorway.demo`, and the value refers to a `Demonstration`.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tensorway.cli.output import Output


@attrs.frozen
class HandedOver:
    """What was handed over from one engine to another, and how long each way took, in seconds."""

    connector: str
    tokens: int
    blocks: int
    nbytes: int
    #: Whether the tokens that follow are those of an engine that computed everything itself.
    same: bool
    seconds: float
    recomputing: float


@attrs.frozen
class Offloaded:
    """What was kept outside an engine and came back, and how long each way took, in seconds."""

    backend: str
    #: Tiers below it, through which some of it has come back.
    tiers: tuple[str, ...]
    blocks: int
    nbytes: int
    #: Whether every byte is as it was.
    same: bool
    storing: float
    loading: float


#: What an entry point `handover` refers to: a function of the `Output`, for progress, and of the transport's name.
Demonstration = Callable[[Output, str], HandedOver]
#: What an entry point `offload` refers to.
OffloadDemonstration = Callable[[Output], Offloaded]
