"""What a user may set on the NCCL communicator. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class NcclOptions:
    """Options of the communicator `nccl`."""

    #: Thread blocks that NCCL may take per collective: few leave the device to the model; None is NCCL's choice.
    max_ctas: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional([attrs.validators.ge(1), attrs.validators.le(64)]),
    )
    #: Seconds after which a peer that does not answer is lost and the communicator is aborted.
    timeout_s: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(86_400.0)])
