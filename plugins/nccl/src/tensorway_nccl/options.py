"""What a user may set on the NCCL communicator. Imports attrs only."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen
class NcclOptions:
    """Options of the communicator `nccl`."""

    #: How NCCL is called: by itself, or by way of torch.distributed; auto is direct where NCCL is a library of its own.
    lane: Literal["auto", "direct", "torch"] = attrs.field(
        default="auto", validator=attrs.validators.in_(["auto", "direct", "torch"])
    )
    #: Network interface on which the members agree; None takes the one from which there is a route to the rendezvous.
    interface: str | None = attrs.field(
        default=None,
        # The kernel's own rule for names of interfaces: up to 15 characters, no slash, no space.
        validator=attrs.validators.optional(attrs.validators.matches_re(r"[^\s/]{1,15}")),
    )
    #: Thread blocks that NCCL may take per round: few leave the device to the model; None is NCCL's choice.
    max_ctas: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional([attrs.validators.ge(1), attrs.validators.le(64)]),
    )
    #: Seconds that the members may take to connect to each other, and a round between two of them; then it is aborted.
    timeout_s: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(86_400.0)])
    #: The same as `interface` by a host policy, `cidr:10.0.0.0/8` for example; empty leaves it to that.
    host: str = ""

    def __attrs_post_init__(self) -> None:
        if self.host and self.interface:
            raise ValueError("host and interface both say where to agree; give one of them")

    @property
    def policy(self) -> str:
        """Where to agree, as a host policy."""
        return f"iface:{self.interface}" if self.interface else self.host
