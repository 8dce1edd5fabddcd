"""What a user may set on the tier `peer`. Imports attrs only."""

from __future__ import annotations

from typing import Any

import attrs

_positive: Any = attrs.validators.gt(0)


@attrs.frozen
class PeerOptions:
    """Options of the tier `peer`."""

    #: Where engines meet in their rendezvous; those of equal fingerprint meet below it.
    path: str = "/offload-peers"
    #: Seconds for which rows are lent; a read that takes longer is a miss.
    lease: float = attrs.field(default=5.0, validator=_positive)
    #: Seconds that a peer may take to answer; who takes longer is left alone for a while.
    answer: float = attrs.field(default=0.25, validator=_positive)
    #: Seconds for which it is left alone at first; twice as long each time, up to 30.
    rest: float = attrs.field(default=1.0, validator=_positive)
    #: Peers that are connected to and asked.
    most_peers: int = attrs.field(default=16, validator=_positive)
    #: Rows that one peer may have lent of us at once.
    most_lent: int = attrs.field(default=1024, validator=_positive)
    #: Rows of memory for blocks that are wanted elsewhere than in the primary tier's rows.
    bounce_rows: int = attrs.field(default=32, validator=_positive)
    #: Seconds after which the rendezvous misses an engine that died.
    presence: float = attrs.field(default=10.0, validator=_positive)
    #: Seconds between two looks at what peers say, while nothing is expected of them.
    pause: float = attrs.field(default=0.003, validator=_positive)
