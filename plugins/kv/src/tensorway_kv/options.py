"""What a user may set on the connector `handover`. Imports attrs only."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen
class HandoverOptions:
    """Options of the connector `handover`."""

    #: The transport that reads: a name, or the best that is usable here.
    transport: str = "auto"
    transport_options: dict[str, object] = attrs.field(factory=dict)
    #: Where engines of one deployment meet in the rendezvous.
    path: str = "/kv"
    #: Seconds that a producer keeps blocks for a consumer from which it hears nothing.
    lease: float = attrs.field(default=30.0, validator=[attrs.validators.ge(0.1), attrs.validators.le(3600.0)])
    #: Seconds that one request may take to be handed over.
    deadline: float = attrs.field(default=30.0, validator=[attrs.validators.ge(0.01), attrs.validators.le(3600.0)])
    #: Seconds after which the rendezvous misses an engine that died.
    presence: float = attrs.field(default=10.0, validator=[attrs.validators.ge(0.5), attrs.validators.le(3600.0)])
    #: Whether blocks are read layer by layer, for an engine that computes with the first while the others arrive.
    layerwise: bool = False
    #: What a consumer does with a ticket that allows both: read the blocks, let the producer write them to staging
    #: memory, or read, and where the transport's reads are slow have the producer's mover write to the pages.
    prefer: Literal["auto", "pull", "push"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "pull", "push"))
    )
    #: Blocks of each cache group, in memory of the host, that are set aside for what others write, or for `stage`.
    staging_blocks: int = attrs.field(default=0, validator=[attrs.validators.ge(0), attrs.validators.le(1 << 20)])
    #: Whether pages are where the transport does not reach: blocks go through staging memory in both directions.
    stage: bool = False
    #: Fewer missing tokens than that are computed rather than fetched.
    min_tokens: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    #: What tickets are sealed with; empty for the deployment's secret, `TENSORWAY_SECRET`.
    secret: str = attrs.field(default="", repr=False)
    #: Whether each request that was moved is told to OpenTelemetry.
    spans: bool = False
