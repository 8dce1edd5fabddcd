"""What a user may set on the connector `handover`. Imports attrs only."""

from __future__ import annotations

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
    #: What tickets are sealed with; empty for the deployment's secret, `TENSORWAY_SECRET`.
    secret: str = attrs.field(default="", repr=False)
    #: Whether each request that was moved is told to OpenTelemetry.
    spans: bool = False
