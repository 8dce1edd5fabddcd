"""What a user may set on offloading to host memory. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class CPUOptions:
    """Options of the offloading `cpu`."""

    #: Host memory for blocks; None takes half of what is available when it is constructed.
    capacity_bytes: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(4096))
    )
    #: Whether to pin the memory; None pins it when there is an accelerator to copy from.
    pin: bool | None = None
    #: Ask the kernel for huge pages; it may decline, and blocks work on either kind.
    huge_pages: bool = True
