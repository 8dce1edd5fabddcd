"""Options of the policies that have any. Imports attrs alone: a host reads them before it makes a policy."""

from __future__ import annotations

import attrs


@attrs.frozen
class TinyLfuOptions:
    """Options of `tinylfu`."""

    #: Share of all blocks that the window has.
    window: float = attrs.field(default=0.01, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])


@attrs.frozen
class ForesightOptions:
    """Options of `foresight`."""

    #: Begin with what a published trace of conversations showed, and not with nothing.
    prior: bool = True
    #: How sure it must be to be better than recency before it is anything else: standard errors of the lead.
    caution: float = attrs.field(default=2.0, validator=[attrs.validators.ge(1), attrs.validators.le(10)])
