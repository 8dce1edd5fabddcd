"""What a user may set on the gloo communicator. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class GlooOptions:
    """Options of the communicator `gloo`."""

    #: Network interface that gloo binds to; None leaves the choice to GLOO_SOCKET_IFNAME and the host's name.
    interface: str | None = attrs.field(
        default=None,
        # The kernel's own rule for names of interfaces: up to 15 characters, no slash, no space.
        validator=attrs.validators.optional(attrs.validators.matches_re(r"[^\s/]{1,15}")),
    )
    #: Seconds after which a peer that does not answer is lost.
    timeout_s: float = attrs.field(default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(86_400.0)])
