"""What a user may set on the manager of any primary tier. Imports attrs only."""

from __future__ import annotations

import attrs

_in = attrs.validators


@attrs.frozen
class ManagerOptions:
    """Options of the manager; a backend that uses it has them as its own."""

    #: Seconds for which blocks that a lookup found stay, unless the request asks again, loads them or ends.
    lease_seconds: float = attrs.field(default=10.0, validator=[_in.ge(0.001), _in.le(3600.0)])
    #: Seconds for which a block may be on its way to a request; then it is a miss for this request.
    pending_seconds: float = attrs.field(default=10.0, validator=[_in.ge(0.001), _in.le(3600.0)])
    #: Seconds after which a load, a store or a promotion that nobody completes is given up. Its rows stay out of use
    #: until it is completed all the same, for somebody may still write to them.
    ticket_seconds: float = attrs.field(default=300.0, validator=[_in.ge(0.001), _in.le(86400.0)])
    #: Seconds after which a request that says nothing has ended.
    request_seconds: float = attrs.field(default=3600.0, validator=[_in.ge(0.001), _in.le(86400.0)])
    #: The most seconds for which rows are lent to other engines.
    lend_seconds: float = attrs.field(default=30.0, validator=[_in.ge(0.001), _in.le(3600.0)])
    #: The share of all rows that may be lent at once.
    lend_share: float = attrs.field(default=0.5, validator=[_in.ge(0.0), _in.le(1.0)])
    #: The share of all rows that one request may hold when blocks of lower tiers are promoted for it.
    promote_share: float = attrs.field(default=0.75, validator=[_in.gt(0.0), _in.le(1.0)])
    #: The share of all rows that blocks of one tenant may have; None for no limit.
    tenant_share: float | None = attrs.field(default=None, validator=_in.optional([_in.gt(0.0), _in.le(1.0)]))
    #: Requests that must have asked for a block or offered it before it is stored; 1 stores it at once.
    store_threshold: int = attrs.field(default=1, validator=[_in.ge(1), _in.le(1000)])
    #: Blocks whose requests are counted for that.
    sightings: int = attrs.field(default=1 << 16, validator=[_in.ge(1), _in.le(1 << 24)])
    #: Keys in events that nobody takes; if there are more, all is told to be gone. 0 keeps no events.
    events: int = attrs.field(default=1 << 20, validator=_in.ge(0))
