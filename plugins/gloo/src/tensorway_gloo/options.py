"""What a user may set on the gloo communicator. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class GlooOptions:
    """Options of the communicator `gloo`."""

    #: Network interface whose address to listen on; None takes the one from which there is a route to the rendezvous.
    interface: str | None = attrs.field(
        default=None,
        # The kernel's own rule for names of interfaces: up to 15 characters, no slash, no space.
        validator=attrs.validators.optional(attrs.validators.matches_re(r"[^\s/]{1,15}")),
    )
    #: Seconds that the members may take to connect to each other, unless the engine allows fewer.
    timeout_s: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(86_400.0)])
    #: The same by a host policy, `cidr:10.0.0.0/8` for example; empty leaves it to `interface`.
    host: str = ""

    def __attrs_post_init__(self) -> None:
        if self.host and self.interface:
            raise ValueError("host and interface both say where to listen; give one of them")

    @property
    def policy(self) -> str:
        """Where to listen, as a host policy."""
        return f"iface:{self.interface}" if self.interface else self.host
