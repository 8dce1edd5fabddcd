"""What a user may set on the communicator `onesided`. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class OneSidedOptions:
    """Options of the communicator `onesided`."""

    #: The transport that reads: a name, or the best that is usable here.
    transport: str = "auto"
    transport_options: dict[str, object] = attrs.field(factory=dict)
    #: Layers for which rows may be under way at once.
    layers_in_flight: int = attrs.field(default=2, validator=[attrs.validators.ge(1), attrs.validators.le(64)])
