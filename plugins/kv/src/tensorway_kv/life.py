"""One life of an engine, as both halves of its planner need it. May import the core and this package."""

from __future__ import annotations

import attrs

from tensorway.kv import Blocks, RankGeometry, RequestView
from tensorway.metrics import Counters
from tensorway_kv import tickets
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Ids
from tensorway_kv.staging import Pool


@attrs.frozen(eq=False)
class Life:
    """Who we are, what we hold, and what we were told to do."""

    engine: str
    #: Which life it is; never the same twice.
    incarnation: str
    ranks: int
    #: Of any rank, for its groups.
    geometry: RankGeometry
    options: HandoverOptions
    secret: str = attrs.field(repr=False)
    counts: Counters
    #: Staging memory, for what arrives and for what is kept there.
    pool: Pool

    @property
    def states(self) -> bool:
        """Whether anything that it holds is of a whole sequence, and of no use for less of it."""
        return any(not group.block_tokens for group in self.geometry.groups)

    def tenant(self, request: RequestView) -> str:
        """What a ticket for this request says of its tenant."""
        return tickets.tenant_of(request.salt, self.secret) if request.salt else ""


def ids(blocks: Blocks) -> Ids:
    """Block ids as orders carry them."""
    return tuple(tuple(map(int, group)) for group in blocks)
