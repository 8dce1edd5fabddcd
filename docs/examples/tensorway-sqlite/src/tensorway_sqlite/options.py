"""What users may set, with a default for everything: `auto` has nobody to ask."""

from __future__ import annotations

import attrs


@attrs.frozen
class SqliteOffloadTierOptions:
    """The options of offload_tier `sqlite`."""

    #: The file, on a disk of this host; who names the same one shares its blocks. A tier has no file of its own choice.
    path: str = ""
    #: Bytes of blocks that it keeps; what comes when it is full is refused, and nothing goes to make room for it.
    max_bytes: int = attrs.field(default=1 << 30, validator=attrs.validators.gt(0))
