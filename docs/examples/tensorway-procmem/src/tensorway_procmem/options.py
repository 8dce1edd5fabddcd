"""What users may set, with a default for everything: `auto` has nobody to ask."""

from __future__ import annotations

import attrs


@attrs.frozen
class ProcmemTransportOptions:
    """The options of transport `procmem`."""

    #: Who this endpoint is for its peers; keep it over restarts. Empty makes one up. Every transport has this one.
    name: str = ""
